// Named barriers (PTX ISA, "Parallel Synchronization and Communication Instructions: bar") and mbarriers (":
// mbarrier").
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "clock.h"
#include "fault.h"
#include "shared_memory.h"

namespace ptx {

struct NamedBarrier {
    int arrived = 0, expected = 0;  // threads
    Known gathering;                // what those that arrived know
    std::vector<int> waiting;       // warps

    void clear() {
        arrived = expected = 0;
        gathering.clear();
        waiting.clear();
    }
};

struct MBarrier {
    int agent;      // whose clock its phases are
    bool valid;     // between mbarrier.init and mbarrier.inval
    int count;      // of arrivals in a phase
    int pending;    // of them, in this one
    int64_t bytes;  // tx-count
    uint32_t phase;
    Known gathering, done;  // what is known to those that arrive in this phase; to those that waited for an earlier one

    // A phase completes with its last arrival and its last byte.
    void complete() {
        if (pending || bytes) return;
        ++phase;
        pending = count;
        done.join(gathering);
        done.seen.of[agent] = done.fenced.of[agent] = phase;
        gathering.clear();
    }
    bool waiting(uint32_t parity) const { return (phase & 1) == parity; }  // whether that phase is not complete
};

class MBarriers {
  public:
    void clear() { barriers_.clear(); }

    MBarrier& at(uint32_t at) {
        const auto found = barriers_.find(at);
        if (found == barriers_.end() || !found->second.valid) fail("no mbarrier at shared offset %u", at - kSharedBase);
        return found->second;
    }
    void init(uint32_t at, int count) {
        if (count <= 0) fail("mbarrier.init with count %d", count);
        if (barriers_.size() == kMBarriers && !barriers_.count(at)) fail("more than %d mbarriers", kMBarriers);
        const int agent = kWarps + static_cast<int>(barriers_.size());
        MBarrier& barrier = barriers_.try_emplace(at, MBarrier{agent, false, 0, 0, 0, 0, {}, {}}).first->second;
        if (barrier.valid) fail("mbarrier.init of an mbarrier");
        barrier.valid = true;
        barrier.count = barrier.pending = count;
        barrier.phase += barrier.phase & 1;  // of the same place, the clock goes on: the next even phase stands for 0
        barrier.gathering.clear(), barrier.done.clear();
    }
    void invalidate(uint32_t at) {
        MBarrier& barrier = this->at(at);
        if (barrier.bytes) fail("mbarrier.inval with bytes on their way");
        barrier.valid = false;
    }
    void arrive(MBarrier& barrier, int count, uint32_t at) {
        if (barrier.pending < count)
            fail("%d arrivals too many at the mbarrier at shared offset %u", count - barrier.pending, at - kSharedBase);
        barrier.pending -= count;
    }

  private:
    std::map<uint32_t, MBarrier> barriers_;  // by address
};

}  // namespace ptx
