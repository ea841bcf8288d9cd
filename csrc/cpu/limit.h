// The machine's own rate of multiply-adds, in registers alone: what no kernel can beat.
#pragma once

#include "gemm.h"

namespace pyattn {
namespace PYATTN_ISA {

template <class E>
static double spin_on(int64_t rounds, E x) {
    constexpr int chains = 12;  // independent sums: more than the latency of a multiply-add times its rate
    Vec<Sum<E>> sum[chains] = {};
    Vec<E> factor = Product<E>::broadcast(x);
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
        for (int chain = 0; chain < chains; ++chain) {
            sum[chain] = Product<E>::add(sum[chain], factor, factor);
            __asm__ volatile("" : "+v"(sum[chain]));  // every one of them is carried out
        }
    }
    return 2.0 * kStep<E> * kWidth<E> * chains * static_cast<double>(rounds);
}

#ifdef PYATTN_AMX
static double spin_on_tiles(int64_t rounds) {
    const MatrixUnit unit;
    for (int64_t round = 0; round < rounds; ++round) {
        _tile_dpbf16ps(0, 6, 7);
        _tile_dpbf16ps(1, 6, 7);
        _tile_dpbf16ps(2, 6, 7);
        _tile_dpbf16ps(3, 6, 7);
    }
    return 4.0 * 2 * kTile * kTile * 2 * kTile * static_cast<double>(rounds);
}
#endif

// Returns the operations it has carried out, a multiply-add counting as two.
double spin(Dtype dtype, int64_t rounds) {
    if (dtype == Dtype::float64) return spin_on<double>(rounds, 0);
#ifdef PYATTN_AMX
    if (dtype == Dtype::bfloat16) return spin_on_tiles(rounds);
#endif
    if (dtype == Dtype::bfloat16) return spin_on<Operand<bfloat16>>(rounds, {});
    return spin_on<float>(rounds, 0);
}

}  // namespace PYATTN_ISA
}  // namespace pyattn
