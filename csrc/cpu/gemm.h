// The one matrix product: out[c][lane] (+)= sum_t x[t][lane] * y(c, t), lanes in vectors, y broadcast one by one.
// Every product of attention has this form once scores are kept transposed (keys by queries):
//   scores^T = K  * Q^T      lanes are queries      d_v = P^T * d_out     lanes are value columns
//   out^T    = V^T * P^T     lanes are queries      d_k = dS^T * Q        lanes are key columns
//   d_q^T    = K^T * dS^T    lanes are queries
// so that K and V are read where they lie, and neither they nor the scores are ever transposed.
#pragma once

#include "operand.h"
#ifdef PYATTN_AMX
#include "amx.h"
#endif

namespace pyattn {
namespace PYATTN_ISA {

// A matrix with one contiguous dimension of lanes.
template <class E>
struct Lanes {
    E* ptr;
    int64_t ld;
};

// The broadcast operand y(c, t).
template <class E>
struct Broadcast {
    const E* ptr;
    int64_t stride_c, stride_t;
};

// What happens to the old content of `out`.
template <class A>
struct Old {
    bool keep;
    const A* factor;  // per lane; null is 1
};

// Rows of memory that are read after the product, one brought in per step of its depth. The default is none.
struct Later {
    const char* ptr = nullptr;
    int64_t rows = 0, stride = 0, bytes = 0;

    void fetch(int64_t row) const {
        if (row >= rows) return;
        for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(ptr + row * stride + at);
    }
};
struct Nothing {
    void fetch(int64_t) const {}
};

template <class E, int R, int C, class Next>
PYATTN_INLINE void gemm_kernel(const E* x, int64_t ldx, Broadcast<E> y, int64_t depth, Sum<E>* out, int64_t ldo,
                               bool keep, const Sum<E>* factor, const Next& next) {
    constexpr int W = kWidth<E>;
    Vec<Sum<E>> acc[C][R] = {};
    for (int64_t t = 0; t < depth; ++t) {
        next.fetch(t);
        Vec<E> row[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) row[r] = load(x + t * ldx + r * W);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            const Vec<E> scalar = Product<E>::broadcast(y.ptr[c * y.stride_c + t * y.stride_t]);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) acc[c][r] = Product<E>::add(acc[c][r], row[r], scalar);
        }
    }
    // The old content joins last: a sum of per-tile sums rounds less than one long chain.
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            Sum<E>* at = out + c * ldo + r * W;
            if (keep) acc[c][r] += factor ? load(at) * load(factor + r * W) : load(at);
            store(at, acc[c][r]);
        }
    }
}

// One strip of R vectors of lanes: all columns, C at a time, then fewer.
template <class E, int R, int C, class Next>
static inline void gemm_strip(int64_t columns, const E* x, int64_t ldx, Broadcast<E> y, int64_t depth, Sum<E>* out,
                              int64_t ldo, Old<Sum<E>> old, const Next& next) {
    int64_t c = 0;
    for (; c + C <= columns; c += C) {
        Broadcast<E> part = y;
        part.ptr += c * y.stride_c;
        // Fixing the stride that is 1 turns the addresses of the other operand's columns into constants.
        if (y.stride_c == 1) {
            part.stride_c = 1;
            gemm_kernel<E, R, C>(x, ldx, part, depth, out + c * ldo, ldo, old.keep, old.factor, next);
        } else {
            part.stride_t = 1;
            gemm_kernel<E, R, C>(x, ldx, part, depth, out + c * ldo, ldo, old.keep, old.factor, next);
        }
    }
    if constexpr (C > 1) {
        y.ptr += c * y.stride_c;
        constexpr int fewer = C == 6 ? 4 : C / 2;
        if (c < columns) gemm_strip<E, R, fewer>(columns - c, x, ldx, y, depth, out + c * ldo, ldo, old, next);
    }
}

// C: the most columns that are taken at a time. `next` is brought in by the first strip.
template <class E, int R = PYATTN_STRIP_VECTORS, int C = 6, class Next = Nothing>
static inline void gemm_vectors(int64_t lanes, int64_t columns, int64_t depth, Lanes<const E> x, Broadcast<E> y,
                                Lanes<Sum<E>> out, Old<Sum<E>> old, const Next& next = {}) {
    constexpr int strip = R * kWidth<E>;
    int64_t lane = 0;
    for (; lane + strip <= lanes; lane += strip) {
        const Old<Sum<E>> part{old.keep, old.factor ? old.factor + lane : nullptr};
        gemm_strip<E, R, C>(columns, x.ptr + lane, x.ld, y, depth, out.ptr + lane, out.ld, part,
                            lane == 0 ? next : Next{});
    }
    if constexpr (R > 1) {
        const Old<Sum<E>> rest{old.keep, old.factor ? old.factor + lane : nullptr};
        if (lane < lanes) {
            gemm_vectors<E, R / 2, C>(lanes - lane, columns, depth, {x.ptr + lane, x.ld}, y,
                                      {out.ptr + lane, out.ld}, rest, lane == 0 ? next : Next{});
        }
    }
}

// For few columns: strips of lanes as wide as the registers hold.
template <class E, class Next = Nothing>
static inline void gemm_few(int64_t lanes, int64_t columns, int64_t depth, Lanes<const E> x, Broadcast<E> y,
                            Lanes<Sum<E>> out, Old<Sum<E>> old, const Next& next = {}) {
    if (columns == 1) {
        gemm_vectors<E, 8, 1>(lanes, columns, depth, x, y, out, old, next);
    } else if (columns == 2) {
        gemm_vectors<E, 4, 2>(lanes, columns, depth, x, y, out, old, next);
    } else {
        gemm_vectors<E>(lanes, columns, depth, x, y, out, old, next);
    }
}

#ifdef PYATTN_AMX
// Whole squares on tiles, what is left over of columns and depth in vectors.
static inline void gemm_tiles(int64_t lanes, int64_t columns, int64_t depth, Lanes<const Pair> x, Broadcast<Pair> y,
                              Lanes<float> out, Old<float> old) {
    const int64_t whole_columns = columns / kTile * kTile, whole_depth = depth / kTile * kTile;
    for (int64_t c = 0; c < whole_columns; ++c) {
        for (int64_t lane = 0; lane < lanes; lane += kTile) {
            float* at = out.ptr + c * out.ld + lane;
            const Vec<float> factor = old.factor ? load(old.factor + lane) : fill(1.0f);
            store(at, old.keep ? load(at) * factor : Vec<float>{});
        }
    }
    for (int64_t c = 0; c < whole_columns; c += kTile) {
        for (int64_t lane = 0; lane < lanes; lane += 2 * kTile) {
            add_tiles(x.ptr + lane, x.ld, y.ptr + c * y.stride_c, y.stride_c, y.stride_t, whole_depth,
                      out.ptr + c * out.ld + lane, out.ld, lane + kTile < lanes);
        }
    }
    Broadcast<Pair> rest = y;
    rest.ptr += whole_depth * y.stride_t;
    gemm_vectors<Pair>(lanes, whole_columns, depth - whole_depth, {x.ptr + whole_depth * x.ld, x.ld}, rest, out,
                       {true, nullptr});
    rest.ptr = y.ptr + whole_columns * y.stride_c;
    gemm_vectors<Pair>(lanes, columns - whole_columns, depth, x, rest, {out.ptr + whole_columns * out.ld, out.ld}, old);
}
#else
struct MatrixUnit {};
#endif

// The scores of large heads are sums of sums, too: of kPart operands each, where they have more than kDeepest.
constexpr int64_t kDeepest = 128, kPart = 64;
template <class E>
static void deep_gemm(int64_t lanes, int64_t columns, int64_t depth, Lanes<const E> x, Broadcast<E> y,
                      Lanes<Sum<E>> out, Old<Sum<E>> old);

// lanes: a multiple of kWidth. Either y.stride_c or y.stride_t is 1. A task that calls it holds a MatrixUnit.
template <class E>
PYATTN_INLINE void gemm(int64_t lanes, int64_t columns, int64_t depth, Lanes<const E> x, Broadcast<E> y,
                        Lanes<Sum<E>> out, Old<Sum<E>> old) {
    if (depth > kDeepest) return deep_gemm(lanes, columns, depth, x, y, out, old);
#ifdef PYATTN_AMX
    if constexpr (kStep<E> == 2) return gemm_tiles(lanes, columns, depth, x, y, out, old);
#endif
    gemm_vectors<E>(lanes, columns, depth, x, y, out, old);
}

template <class E>
__attribute__((noinline)) static void deep_gemm(int64_t lanes, int64_t columns, int64_t depth, Lanes<const E> x,
                                                Broadcast<E> y, Lanes<Sum<E>> out, Old<Sum<E>> old) {
    for (int64_t t = 0; t < depth; t += kPart) {
        const Broadcast<E> part{y.ptr + t * y.stride_t, y.stride_c, y.stride_t};
        gemm(lanes, columns, smaller(depth - t, kPart), {x.ptr + t * x.ld, x.ld}, part, out, old);
        old = {true, nullptr};
    }
}

}  // namespace PYATTN_ISA
}  // namespace pyattn
