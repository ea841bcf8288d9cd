// Products of few rows with many: out[row][key] = x_row . y_key, where both lie, with the depth in lanes.
//
// gemm.h would have one side transposed first, which for few rows takes longer than the product.
#pragma once

#include "gemm.h"

namespace pyattn {
namespace PYATTN_ISA {

// Lane k of the result is the sum of the lanes of x[k].
template <class A>
PYATTN_INLINE Vec<A> sums_of_lanes(Vec<A>* x) {
    transpose_square<A>(x);
#pragma GCC unroll 4
    for (int half = kWidth<A> / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
        for (int r = 0; r < half; ++r) x[r] += x[r + half];
    }
    return x[0];
}

// R rows with K keys, of `depth` whole vectors: lane sums to sums[row][key].
template <class E, int R, int K>
PYATTN_INLINE void dots_kernel(const E* x, int64_t ldx, const E* const* y, int64_t depth,
                               Vec<Sum<E>> (*sums)[kWidth<Sum<E>>]) {
    Vec<Sum<E>> acc[R][K] = {};
    for (int64_t t = 0; t < depth; t += kWidth<E>) {
        Vec<E> row[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) row[r] = load(x + r * ldx + t);
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) {
            const Vec<E> key = load(y[k] + t);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) acc[r][k] = Product<E>::add(acc[r][k], row[r], key);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) sums[r][k] = acc[r][k];
    }
}

// R rows with a vector's keys, which begin at y[0]. Eight sums at a time hide the latency of each.
template <class E, int R>
static inline void dots_of_rows(Lanes<const E> x, int64_t rows, const E* const* y, int64_t depth, Sum<E>* out,
                                int64_t ldo) {
    using A = Sum<E>;
    constexpr int W = kWidth<A>, K = W < 8 / R ? W : 8 / R;
    int64_t row = 0;
    for (; row + R <= rows; row += R) {
        Vec<A> sums[R][W];
        for (int k = 0; k < W; k += K) {
            Vec<A> some[R][W];
            dots_kernel<E, R, K>(x.ptr + row * x.ld, x.ld, y + k, depth, some);
            for (int r = 0; r < R; ++r) {
                for (int i = 0; i < K; ++i) sums[r][k + i] = some[r][i];
            }
        }
        for (int r = 0; r < R; ++r) store(out + (row + r) * ldo, sums_of_lanes<A>(sums[r]));
    }
    if constexpr (R > 1) {
        const Lanes<const E> rest{x.ptr + row * x.ld, x.ld};
        if (row < rows) dots_of_rows<E, R / 2>(rest, rows - row, y, depth, out + row * ldo, ldo);
    }
}

// x and y have zeros up to whole vectors of `depth` operands. Behind `keys`, up to a whole vector, out has anything.
template <class E, class Next = Nothing>
static inline void dots(Lanes<const E> x, int64_t rows, Lanes<const E> y, int64_t keys, int64_t depth,
                        Lanes<Sum<E>> out, const Next& next = {}) {
    constexpr int W = kWidth<Sum<E>>;
    for (int64_t key = 0; key < keys; key += W) {
        const E* from[W];
        for (int k = 0; k < W; ++k) {
            next.fetch(key + k);
            from[k] = y.ptr + smaller(key + k, keys - 1) * y.ld;
        }
        dots_of_rows<E, 4>(x, rows, from, depth, out.ptr + key, out.ld);
    }
}

}  // namespace PYATTN_ISA
}  // namespace pyattn
