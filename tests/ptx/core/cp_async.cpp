// cp.async (PTX ISA, "Data Movement and Conversion Instructions: Asynchronous copy").
#include "cp_async.h"

#include "step.h"

namespace ptx {
namespace {

void land(Machine& machine, CpAsync& copy) {
    if (copy.landed) return;
    copy.landed = true;
    uint8_t* to = machine.shared.bytes(copy.to);
    memset(to, 0, copy.bytes);
    memcpy(to, copy.from, copy.copied);
}
// Waited for: from now on the warp's own writes.
void complete(Machine& machine, const Warp& warp, CpAsync& copy) {
    land(machine, copy);
    machine.shared.settle(copy.to, copy.bytes, warp.id, warp.now(), State::kWritten, copy.lane);
}

}  // namespace

void complete_copies(Machine& machine, Warp& warp, int all_but) {
    warp.copies.complete_all_but(all_but, [&](CpAsync& copy) { complete(machine, warp, copy); });
}

// Operands: shared address, offset, global address, offset, [size]. sub: bits 0-7 bytes, 8: how many of them to copy is
// given
void execute_CPASYNC(Step& s) {
    Machine& machine = s.machine;
    const uint32_t bytes = s.field(0, 8);
    uint64_t from[kLanes];
    uint32_t reading = 0;
    for (int lane = 0; lane < kLanes; ++lane) from[lane] = s.u64(2)[lane] + s.immediate(3);
    s.for_each_lane([&](int lane) {
        const Access access{s.address(0, lane), bytes, lane, "cp.async"};
        const uint32_t copied = s.field(8) ? s.u32(4)[lane] : bytes;
        if (copied > bytes) fail("cp.async of %u bytes with a source of %u", bytes, copied);
        machine.shared.at(access);
        if (copied) {
            reading |= 1u << lane;
            machine.global.read(from[lane], copied, lane, "cp.async read");
            GlobalMemory::check_aligned(from[lane], bytes, lane, "cp.async read");
        }
        machine.shared.write(s.warp, access, State::kCopying);
        CpAsync copy{access.at, reinterpret_cast<const uint8_t*>(from[lane]), bytes, copied, false, lane};
        if (machine.lands_at_once()) land(machine, copy);
        s.warp.copies.open.push_back(copy);
    });
    machine.statistics.global(machine.pc(s.i), from, reading, bytes);
}
void execute_CPASYNC_COMMIT(Step& s) { s.warp.copies.commit(); }

// sub: how many groups may be pending; -1: wait_all, of those not committed, too
void execute_CPASYNC_WAIT(Step& s) {
    if (s.i.sub < 0) s.warp.copies.commit();
    complete_copies(s.machine, s.warp, std::max(s.i.sub, 0));
}

}  // namespace ptx
