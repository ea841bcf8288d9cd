// A wgmma.mma_async on its way: a warp's quarter of it.
#pragma once

#include <cstdint>

namespace ptx {

struct Instruction;

struct Wgmma {
    const Instruction* instruction;
    uint64_t a, b;  // descriptors
    bool accumulate;
    bool done;
    uint64_t version;  // of what it reads in shared memory, when it was issued
};

}  // namespace ptx
