// A warp: 32 lanes in lockstep, their registers, and the asynchronous work that the warp has begun.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "clock.h"
#include "cp_async.h"
#include "groups.h"
#include "tma.h"
#include "wgmma.h"

namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = ~0u;
constexpr uint32_t kFirstEpoch = 1;  // before any wgmma.fence

struct Path {  // lanes that are at the same instruction
    int32_t pc;
    uint32_t lanes;
};

enum class Wait : uint8_t { kNone, kNamedBarrier, kMBarrier, kRegisters };

// Of a register, by what is in flight (PTX ISA, "wgmma.mma_async": such registers may not be touched).
enum class Use : uint8_t { kFree, kRead, kWritten };

struct Summed {
    uint32_t epoch;
    int columns;  // N: wgmmas of one shape are ordered
};

struct Warp : Agent {
    std::vector<uint32_t> registers;   // [register][lane]; two words a lane for one of 64 bits
    std::vector<uint32_t> predicates;  // bit: lane
    std::vector<uint8_t> local;        // [lane][byte]: local memory
    std::vector<Path> paths;           // the first one runs
    bool exited;
    double weight;  // its share of the turns
    Wait wait;
    uint32_t awaited, parity;  // the barrier, or how many registers
    int register_count;        // of a thread, for setmaxnreg

    std::vector<Use> use;                     // of each register
    std::vector<uint32_t> accessed, written;  // the epoch of its last access, and write
    std::vector<Summed> summed;               // by which wgmma last
    uint32_t epoch;                           // a wgmma.fence begins a new one
    std::vector<int32_t> loading;             // registers that a tcgen05.ld fills

    Groups<CpAsync> copies;
    Groups<Wgmma> products;
    Groups<TmaStore> stores;

    // The lowest instruction goes first, and lanes that meet there go on together.
    void reconverge() {
        if (paths.size() == 1) return;
        std::sort(paths.begin(), paths.end(), [](const Path& a, const Path& b) { return a.pc < b.pc; });
        size_t last = 0;
        for (size_t k = 1; k < paths.size(); ++k)
            if (paths[k].pc == paths[last].pc)
                paths[last].lanes |= paths[k].lanes;
            else
                paths[++last] = paths[k];
        paths.resize(last + 1);
    }
    bool has_registers_in_flight() const { return !products.empty() || !loading.empty(); }
};

}  // namespace ptx
