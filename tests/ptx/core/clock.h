// Vector clocks: what has happened before what, whatever schedule ran (Mattern 1989; FastTrack, Flanagan and Freund
// 2009).
//
// Agents are the warps and, for what TMA writes, the mbarriers: a copy is done when the phase of its mbarrier is, so
// that phase's number is the copy's clock, and who waited for another mbarrier knows nothing of it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace ptx {

constexpr int kWarps = 32, kMBarriers = 64, kAgents = kWarps + kMBarriers;

struct Clock {
    uint32_t of[kAgents];

    void clear() { memset(of, 0, sizeof of); }
    void join(const Clock& other) {
        for (int agent = 0; agent < kAgents; ++agent) of[agent] = std::max(of[agent], other.of[agent]);
    }
};

// What happened before, and of that, what a proxy fence has followed: the async proxy sees no more (PTX ISA,
// "Proxies").
struct Known {
    Clock seen, fenced;

    void clear() { seen.clear(), fenced.clear(); }
    void join(const Known& other) { seen.join(other.seen), fenced.join(other.fenced); }
};

// A warp as the clocks have it.
struct Agent {
    int id;
    Known known;
    uint32_t ordered;  // what its lanes did up to this time is ordered between them

    uint32_t now() const { return known.seen.of[id]; }
    void tick() { ++known.seen.of[id]; }
    void begin(int its_id) {
        id = its_id;
        known.clear();
        known.seen.of[id] = 1;  // 0 is before everything
        ordered = 0;
    }
    // Hands on what it did and knows; what it does from now on is not part of that.
    void release(Known& to) {
        to.join(known);
        tick();
    }
    // Learns what was released; what came back of its own, by a barrier, every lane of it has seen.
    void acquire(const Known& from) {
        known.join(from);
        ordered = std::max(ordered, from.seen.of[id]);
    }
    void order_lanes() {
        ordered = now();
        tick();
    }
    void fence_proxy() {
        known.fenced = known.seen;
        tick();
    }
};

}  // namespace ptx
