// Products of the tensor cores: exact and summed in float64, then rounded once.
#pragma once

#include <cstdint>

#include "numbers.h"
#include "step.h"

namespace ptx {

constexpr int kDepth = 16;  // of an instruction on 16-bit elements: K

// sums[row] += sum over k of a[k][row] b[k].
template <int kRows>
inline void add_products(const double (*a)[kRows], const double* b, int depth, double* sums) {
    double total[kRows];
    for (int row = 0; row < kRows; ++row) total[row] = sums[row];
    for (int k = 0; k < depth; ++k)
        for (int row = 0; row < kRows; ++row) total[row] += a[k][row] * b[k];
    for (int row = 0; row < kRows; ++row) sums[row] = total[row];
}

// The 16 rows of A that a warp holds in four registers, from operand `first` on (PTX ISA, "Matrix Fragments for
// mma.m16n8k16 with floating point type", "wgmma.m64k16: Matrix A in registers").
inline void read_fragment_a(const Step& s, int first, bool f16, double (*a)[16]) {
    for (int r = 0; r < 4; ++r)
        for (int lane = 0; lane < kLanes; ++lane) {
            const uint32_t pair = s.u32(first + r)[lane];
            const int row = lane / 4 + (r & 1) * 8, k = lane % 4 * 2 + (r >> 1) * 8;
            a[k][row] = from_half(pair & 0xffff, f16);
            a[k + 1][row] = from_half(pair >> 16, f16);
        }
}

}  // namespace ptx
