// TMA: cp.async.bulk.tensor between global and shared memory (PTX ISA, "Data Movement and Conversion Instructions:
// Tensor copy"). Tiled mode, within one CTA.
#include "tma.h"

#include "step.h"

namespace ptx {
namespace {

constexpr uint32_t kMapBytes = 128, kMapAlign = 64, kSharedAlign = 128;

TensorMap read_map(const Machine& machine, uint64_t at, int dimensions) {
    const uint64_t begin = reinterpret_cast<uint64_t>(machine.parameters);
    if (at < begin || at + kMapBytes > begin + machine.parameter_bytes) fail("tensor map that is not a parameter");
    if ((at - begin) % kMapAlign) fail("tensor map is misaligned");
    TensorMap map;
    memcpy(&map, reinterpret_cast<const void*>(at), sizeof map);
    if (static_cast<int>(map.rank) != dimensions) fail("TMA of %d dimensions with a map of %u", dimensions, map.rank);
    return map;
}

// Operands: ..., map, coordinates, ... of which `map` is the first one. sub: how many coordinates
Box read_box(Step& s, int lane, int map, uint32_t shared, const char* what) {
    Box box{read_map(s.machine, s.u64(map)[lane], s.i.sub), {}, shared};
    for (int d = 0; d < s.i.sub; ++d) box.at[d] = static_cast<int32_t>(s.u32(map + 1 + d)[lane]);
    if (shared % kSharedAlign) fail("%s offset %u, not a multiple of %u", what, shared - kSharedBase, kSharedAlign);
    return box;
}

// Checks a store's reads, and returns the version of what they read.
uint64_t read_source(Machine& machine, const Warp& warp, const Box& box) {
    uint64_t version = 0;
    for_each_chunk(box, [&](uint32_t at, uint64_t, uint32_t, uint32_t valid) {
        if (!valid) return;
        const Access access{at, 16, 0, "TMA store's read", Proxy::kAsync};
        machine.shared.at(access);
        machine.shared.read(warp, access);
        version = machine.shared.version(version, at, 16);
    });
    return version;
}
void store(Machine& machine, TmaStore& operation) {
    if (operation.done) return;
    operation.done = true;
    for_each_chunk(operation.box, [&](uint32_t at, uint64_t to, uint32_t first, uint32_t valid) {
        if (!valid) return;
        machine.global.write(to, valid, 0, "TMA store");
        memcpy(reinterpret_cast<void*>(to), machine.shared.bytes(at) + first, valid);
    });
}

}  // namespace

// Its bytes have come. They are the mbarrier's: known to who waits for this phase of it.
void land(Machine& machine, size_t k) {
    const TmaLoad load = machine.loads[k];
    machine.loads.erase(machine.loads.begin() + k);
    const Instruction* before = machine.instruction;
    machine.instruction = load.instruction;
    MBarrier& barrier = machine.mbarriers.at(load.mbarrier);
    for_each_chunk(load.box, [&](uint32_t at, uint64_t from, uint32_t first, uint32_t valid) {
        uint8_t* to = machine.shared.bytes(at);
        memset(to, 0, 16);
        if (valid) {
            machine.global.read(from, valid, 0, "TMA load");
            memcpy(to + first, reinterpret_cast<const void*>(from), valid);
        }
        machine.shared.settle(at, 16, barrier.agent, barrier.phase + 1, State::kWritten);
    });
    barrier.bytes -= load.box.map.box_bytes();
    barrier.complete();
    machine.instruction = before;
}

// Operands: shared address, offset, map, coordinates[sub], mbarrier, offset
void execute_TMA_LD(Step& s) {
    Machine& machine = s.machine;
    s.for_each_lane([&](int lane) {
        const Box box = read_box(s, lane, 2, s.address(0, lane), "TMA load to shared");
        const uint32_t mbarrier = s.address(3 + s.i.sub, lane);
        machine.mbarriers.at(mbarrier);
        machine.shared.check_order(s.warp, {mbarrier, 8, lane, "use of the mbarrier", Proxy::kAsync});
        for_each_chunk(box, [&](uint32_t at, uint64_t, uint32_t, uint32_t) {
            const Access access{at, 16, lane, "TMA load", Proxy::kAsync};
            machine.shared.at(access);
            machine.shared.write(s.warp, access, State::kLoading);
        });
        machine.loads.push_back({box, mbarrier, &s.i});
        if (machine.options.landing == kEarly) land(machine, machine.loads.size() - 1);
    });
}

// Operands: map, coordinates[sub], shared address, offset
void execute_TMA_ST(Step& s) {
    Machine& machine = s.machine;
    s.for_each_lane([&](int lane) {
        const Box box = read_box(s, lane, 0, s.address(1 + s.i.sub, lane), "TMA store from shared");
        TmaStore operation{box, false, read_source(machine, s.warp, box)};
        if (machine.lands_at_once()) store(machine, operation);
        s.warp.stores.open.push_back(operation);
    });
}
void execute_BULK_COMMIT(Step& s) { s.warp.stores.commit(); }

// sub: how many groups may be pending
void execute_BULK_WAIT(Step& s) {
    s.warp.stores.complete_all_but(s.i.sub, [&](TmaStore& operation) {
        if (read_source(s.machine, s.warp, operation.box) != operation.version && s.machine.checks(kCheckRaces))
            fail("race: shared memory was written while a TMA store that was not waited for reads it");
        store(s.machine, operation);
    });
}

}  // namespace ptx
