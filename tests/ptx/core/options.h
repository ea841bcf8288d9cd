// How a launch is run, as the caller gives it.
#pragma once

#include <cstdint>

namespace ptx {

enum Checks : int64_t {
    kCheckRaces = 1,           // between warps, in shared memory and tensor memory
    kCheckInitialized = 2,     // reads of shared memory that nobody wrote
    kCheckRegisters = 4,       // that a wgmma or tcgen05.ld in flight holds, and the wgmma.fence before
    kCheckCopyProxy = 8,       // fence.proxy.async between cp.async and wgmma; see shared_memory.h
    kCheckGlobalRaces = 16,    // between CTAs, in global memory
    kCheckFragments = 32,      // wgmma.fence between the write of a register and its product; see wgmma.cpp
    kCheckLanes = 64,          // races between the lanes of a warp, in shared memory; see shared_memory.h
    kCheckTensorFences = 128,  // tcgen05.fence around synchronization; see tensor_order.h
};

// When asynchronous work takes effect: as late as its wait allows, when issued, or as the seed has it.
enum Landing : int64_t { kLate = 0, kEarly = 1, kEither = 2 };

struct Options {
    int64_t seed;
    int64_t checks;
    int64_t statistics;  // whether to count
    int64_t quantum;     // the most instructions of a warp before another one's turn
    int64_t truncate;    // whether tensor cores round sums towards zero instead of to nearest
    int64_t registers;   // of a thread at the start (.maxnreg), for setmaxnreg's pool
    int64_t landing;
    int64_t instructions;  // the most of a CTA: a kernel that runs on for ever ends here
};

}  // namespace ptx
