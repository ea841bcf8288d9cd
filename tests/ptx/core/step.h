// One instruction of one warp, as the function that executes it sees it.
#pragma once

#include <cstdint>

#include "machine.h"
#include "ops.h"

namespace ptx {

struct Step {
    Machine& machine;
    Warp& warp;
    const Instruction& i;
    const int32_t* operands;
    uint32_t lanes;  // that execute it: its predicate holds there

    Step(Machine& of, const Instruction& instruction, uint32_t active)
        : machine(of),
          warp(*of.warp),
          i(instruction),
          operands(of.program.operands.data() + instruction.first),
          lanes(active) {}

    // Operand k: the 32 lanes of a register, a predicate, or a number.
    template <class T>
    T* of(int k) const {
        return reinterpret_cast<T*>(&warp.registers[operands[k]]);
    }
    uint32_t* u32(int k) const { return of<uint32_t>(k); }
    uint64_t* u64(int k) const { return of<uint64_t>(k); }
    float* f32(int k) const { return of<float>(k); }
    uint32_t predicate(int k) const { return warp.predicates[operands[k]]; }
    void set_predicate(int k, uint32_t value) const {
        uint32_t& predicate = warp.predicates[operands[k]];
        predicate = (predicate & ~lanes) | (value & lanes);
    }
    int immediate(int k) const { return operands[k]; }

    // Bits [first, first + n) of `sub`.
    int field(int first, int n = 1) const { return i.sub >> first & ((1 << n) - 1); }

    // d[lane] = f(lane) for every lane that executes.
    template <class T, class F>
    void each(T* d, F f) const {
        if (lanes == kAllLanes) {
#pragma GCC ivdep
            for (int lane = 0; lane < kLanes; ++lane) d[lane] = f(lane);
        } else {
            for_each_lane([&](int lane) { d[lane] = f(lane); });
        }
    }
    template <class F>
    void for_each_lane(F f) const {
        for (uint32_t rest = lanes; rest; rest &= rest - 1) f(__builtin_ctz(rest));
    }
    int first_lane() const { return __builtin_ctz(lanes); }

    // An address in shared or tensor memory: a register of 32 or, where `wide`, 64 bits and a number.
    uint32_t address(int k, int lane, bool wide = false) const {
        return static_cast<uint32_t>(wide ? u64(k)[lane] : u32(k)[lane]) + immediate(k + 1);
    }

    // .aligned: all lanes of the warp execute the same instruction.
    void need_all_lanes(const char* what) const {
        if (lanes != kAllLanes)
            fail("%s by %d of 32 lanes (mask %08x): the warp is not converged", what, __builtin_popcount(lanes), lanes);
    }
};

using Execute = void (*)(Step&);

#define PTX_OP(NAME) void execute_##NAME(Step&);
PTX_OPS(PTX_OP)
#undef PTX_OP

// One that waits (mbarriers, registers) is executed again once that is over; bar.sync is not.
constexpr Execute kExecute[kOps] = {
#define PTX_OP(NAME) execute_##NAME,
    PTX_OPS(PTX_OP)
#undef PTX_OP
};

}  // namespace ptx
