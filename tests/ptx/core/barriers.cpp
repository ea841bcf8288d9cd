// bar and barrier, mbarrier, fence, setmaxnreg (PTX ISA, "Parallel Synchronization and Communication Instructions",
// "Miscellaneous Instructions: setmaxnreg").
#include "step.h"

namespace ptx {
namespace {

constexpr uint32_t kMBarrierBytes = 8;
constexpr int64_t kMostBytes = (1 << 20) - 1;  // of a phase's tx-count

// Operands: barrier, [threads]. sub: 1 if their number is given
NamedBarrier& arrive(Step& s) {
    s.need_all_lanes("barrier");
    Machine& machine = s.machine;
    const int id = static_cast<int>(s.u32(0)[0]);
    const int threads = s.i.sub ? static_cast<int>(s.u32(1)[0]) : machine.threads;
    if (id < 0 || id >= kNamedBarriers) fail("barrier %d", id);
    if (threads % kLanes || threads <= 0 || threads > machine.threads)
        fail("barrier %d for %d threads of %d", id, threads, machine.threads);
    NamedBarrier& barrier = machine.barriers[id];
    if (barrier.arrived && barrier.expected != threads)
        fail("barrier %d for %d threads, others said %d", id, threads, barrier.expected);
    barrier.expected = threads;
    barrier.arrived += kLanes;
    if (barrier.arrived > threads) fail("barrier %d: more than %d threads arrive", id, threads);
    s.warp.release(barrier.gathering);
    return barrier;
}
void complete(Machine& machine, NamedBarrier& barrier) {
    if (barrier.arrived < barrier.expected) return;
    for (int waiting : barrier.waiting) {
        machine.warps[waiting].wait = Wait::kNone;
        machine.warps[waiting].acquire(barrier.gathering);
    }
    barrier.clear();
}

MBarrier& use(Step& s, uint32_t at, int lane) {
    MBarrier& barrier = s.machine.mbarriers.at(at);
    s.machine.shared.check_order(s.warp, {at, kMBarrierBytes, lane, "use of the mbarrier"});
    return barrier;
}

}  // namespace

void execute_BAR_SYNC(Step& s) {
    NamedBarrier& barrier = arrive(s);
    barrier.waiting.push_back(s.warp.id);
    s.warp.wait = Wait::kNamedBarrier;
    s.warp.awaited = s.u32(0)[0];
    complete(s.machine, barrier);
}
void execute_BAR_ARRIVE(Step& s) { complete(s.machine, arrive(s)); }

// Operands of all: address, offset, [count or bytes]
void execute_MBAR_INIT(Step& s) {
    s.for_each_lane([&](int lane) {
        const Access access{s.address(0, lane), kMBarrierBytes, lane, "mbarrier.init"};
        s.machine.shared.at(access);
        s.machine.shared.write(s.warp, access, State::kBarrier);
        s.machine.mbarriers.init(access.at, static_cast<int>(s.u32(2)[lane]));
    });
}
void execute_MBAR_INVAL(Step& s) {
    s.for_each_lane([&](int lane) {
        const uint32_t at = s.address(0, lane);
        s.machine.mbarriers.invalidate(at);
        s.machine.shared.settle(at, kMBarrierBytes, s.warp.id, s.warp.now(), State::kUnwritten);
    });
}
// sub: bit 0: a count is given
void execute_MBAR_ARRIVE(Step& s) {
    s.for_each_lane([&](int lane) {
        const uint32_t at = s.address(0, lane);
        MBarrier& barrier = use(s, at, lane);
        s.warp.release(barrier.gathering);
        s.machine.mbarriers.arrive(barrier, s.field(0) ? static_cast<int>(s.u32(2)[lane]) : 1, at);
        barrier.complete();
    });
}
// sub: bit 1: of bytes only, no arrival
void execute_MBAR_EXPECT(Step& s) {
    s.for_each_lane([&](int lane) {
        const uint32_t at = s.address(0, lane);
        MBarrier& barrier = use(s, at, lane);
        barrier.bytes += s.u32(2)[lane];
        if (barrier.bytes > kMostBytes) fail("mbarrier's bytes overflow");
        s.warp.release(barrier.gathering);
        if (!s.field(1)) s.machine.mbarriers.arrive(barrier, 1, at);
        barrier.complete();
    });
}
// Operands: predicate, address, offset, parity. Returns only once the phase is complete.
void execute_MBAR_WAIT(Step& s) {
    const int first = s.first_lane();
    const uint32_t at = s.address(1, first), parity = s.u32(3)[first];
    s.for_each_lane([&](int lane) {
        if (s.address(1, lane) != at || s.u32(3)[lane] != parity) fail("lanes wait for different mbarriers or phases");
    });
    const bool alone = (s.lanes & (s.lanes - 1)) == 0;
    const MBarrier& barrier = use(s, at, alone ? first : kWholeWarp);
    if (parity > 1) fail("mbarrier parity %u", parity);
    if (barrier.waiting(parity)) {
        s.warp.wait = Wait::kMBarrier;
        s.warp.awaited = at;
        s.warp.parity = parity;
        return;
    }
    s.warp.acquire(barrier.done);
    s.set_predicate(0, kAllLanes);
}

void execute_FENCE_PROXY(Step& s) { s.warp.fence_proxy(); }
// Memory is sequentially consistent here: a fence between threads orders nothing more, and no check relies on it.
void execute_FENCE(Step&) {}

// sub: registers of a thread; target: 1: .inc, 0: .dec. Each warp of a warpgroup takes and frees its own.
void execute_SETMAXNREG(Step& s) {
    s.need_all_lanes("setmaxnreg");
    const int wanted = s.i.sub, more = (wanted - s.warp.register_count) * kLanes;
    if (wanted % 8 || wanted < 24 || wanted > 256) fail("setmaxnreg %d", wanted);
    if (s.i.target == 1 && more < 0) fail("setmaxnreg.inc to %d of a warp that has %d", wanted, s.warp.register_count);
    if (s.i.target == 0 && more > 0) fail("setmaxnreg.dec to %d of a warp that has %d", wanted, s.warp.register_count);
    if (more > s.machine.register_pool) {
        s.warp.wait = Wait::kRegisters;
        s.warp.awaited = more;
        return;
    }
    s.machine.register_pool -= more;
    s.warp.register_count = wanted;
}

}  // namespace ptx
