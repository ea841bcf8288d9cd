// The machine: a program, a launch of it, and the CTA that runs. CTAs run one after another, the warps of one by turns.
//
// ops.h has the bytecode, step.h what an instruction sees, scheduler.cpp who runs when. Memory and what orders accesses
// to it: clock.h, shared_memory.h, global_memory.h, barriers.h, tensor_order.h. The other .cpp files execute one family
// of instructions each. The build is one call of g++ on all of them.
#pragma once

#include <cstdint>
#include <vector>

#include "barriers.h"
#include "global_memory.h"
#include "numbers.h"
#include "ops.h"
#include "options.h"
#include "random.h"
#include "shared_memory.h"
#include "statistics.h"
#include "tensor_memory.h"
#include "tensor_order.h"
#include "warp.h"

namespace ptx {

constexpr int kNamedBarriers = 16;

struct Constant {
    int64_t offset;  // in a warp's registers
    int64_t bytes;   // 4, 8, or 0 for a predicate
    int64_t value;
};

// Special registers, in the order in which the caller gives their offsets.
enum Special { kTidX, kTidY, kTidZ, kCtaX, kCtaY, kCtaZ, kGridX, kGridY, kGridZ, kNtidX, kLaneId, kWarpId, kSpecials };

struct Program {
    std::vector<Instruction> code;
    std::vector<int32_t> operands;
    std::vector<Constant> constants;
    int32_t special[kSpecials];  // offsets; -1 where it is not used
    int words, predicates;       // of a warp's registers
    uint32_t granule;            // the fewest bytes of an access to shared memory
    uint32_t local_bytes = 0;    // of each thread's local memory
    bool keeps_registers;        // by wgmma or tcgen05, so that their use in flight must be watched
};

struct Machine {
    Program program;

    // The launch.
    Options options;
    uint32_t grid[3];
    int threads;
    uint32_t shared_bytes;
    const uint8_t* parameters;
    uint32_t parameter_bytes;
    GlobalMemory global;
    Random random;
    Statistics statistics;

    // The CTA.
    uint32_t cta[3];
    std::vector<Warp> warps;
    SharedMemory shared;
    NamedBarrier barriers[kNamedBarriers];
    MBarriers mbarriers;
    std::vector<TmaLoad> loads;                 // on their way
    std::vector<TensorOperation> tensor_queue;  // in the order of the tensor core
    TensorMemory tensor;
    TensorOrder tensor_order;
    int register_pool;  // that setmaxnreg has freed

    // What runs, for the text of a fault.
    Warp* warp = nullptr;
    const Instruction* instruction = nullptr;

    size_t pc(const Instruction& i) const { return &i - program.code.data(); }
    bool checks(Checks check) const { return options.checks & check; }
    bool lands_at_once() { return options.landing == kEarly || (options.landing == kEither && random.coin()); }
    float round_sum(double sum) const { return options.truncate ? toward_zero(sum) : static_cast<float>(sum); }

    void run();  // the whole grid

  private:
    void begin_cta();
    void begin_warp(Warp& warp, int id);
    void run_cta();
    void end_cta();
    void run_warp(int turn);
    void end_warp();
    [[noreturn]] void fail_deadlock();
};

}  // namespace ptx
