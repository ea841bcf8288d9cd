// A non-bulk asynchronous copy from global to shared memory, of one lane (PTX ISA, "cp.async").
#pragma once

#include <cstdint>

namespace ptx {

struct CpAsync {
    uint32_t to;
    const uint8_t* from;
    uint32_t bytes, copied;  // the rest becomes zero
    bool landed;
    int lane;
};

struct Machine;
struct Warp;

// Waits for all but that many groups of the warp.
void complete_copies(Machine& machine, Warp& warp, int all_but);

}  // namespace ptx
