// Tiles: their size, the scratch they live in, and moving rows of a tensor into and out of them.
#pragma once

#include <cstddef>

#include "../attention_args.h"
#include "gemm.h"
#include "plan.h"
#include "vec.h"

namespace pyattn {
namespace PYATTN_ISA {

// Hands out pieces of one block of memory; with a null block it only counts the bytes.
class Scratch {
  public:
    explicit Scratch(void* base) : base_(static_cast<char*>(base)) {}

    template <class A>
    A* take(int64_t count) {
        char* piece = base_ ? base_ + used_ : nullptr;
        used_ += round_up(count * static_cast<int64_t>(sizeof(A)), 64);
        return reinterpret_cast<A*>(piece);
    }
    int64_t used() const { return used_; }

  private:
    char* base_;
    int64_t used_ = 0;
};

// Columns of a row-major tile, padded so that it can serve as lanes.
template <class A>
static inline int64_t padded(int64_t columns) {
    return round_up(columns, kWidth<A>);
}

// Operands that a row of `columns` numbers takes.
template <class E>
static inline int64_t operands(int64_t columns) {
    return (columns + kStep<E> - 1) / kStep<E>;
}

// One row of T as operands, the depth running along the row; what is missing up to `width` operands is 0.
template <class E, class T>
static inline void copy_row(const T* from, int64_t columns, E* to, int64_t width) {
    if constexpr (kStep<E> == 1) {
        for (int64_t c = 0; c < columns; ++c) to[c] = static_cast<E>(widen(from[c]));
        for (int64_t c = columns; c < width; ++c) to[c] = 0;
    } else {
        std::memset(to, 0, static_cast<size_t>(width) * sizeof(E));
        std::memcpy(to, from, static_cast<size_t>(columns) * sizeof(T));
    }
}

// `count` rows of T as rows of operands with the depth along the row: in place where they already are that, else
// converted into `scratch`. Rows whose `wanted` byte is 0 come as zeros, so that a NaN in them goes nowhere. A padded
// tile has whole vectors.
template <class E, class T>
static inline Lanes<const E> load_rows(const T* from, int64_t ld, int64_t count, int64_t columns, E* scratch,
                                       const uint8_t* wanted, bool pad) {
    const int64_t width = round_up(operands<E>(columns), kWidth<E>);
    if constexpr (sizeof(T) * kStep<E> == sizeof(E)) {
        const bool whole = columns % kStep<E> == 0 && ld % kStep<E> == 0 &&
                           reinterpret_cast<uintptr_t>(from) % alignof(E) == 0;
        if (!wanted && whole && (!pad || width * kStep<E> == columns)) {
            return {reinterpret_cast<const E*>(from), ld / kStep<E>};
        }
    }
    for (int64_t r = 0; r < count; ++r) {
        copy_row(from + r * ld, !wanted || wanted[r] ? columns : 0, scratch + r * width, width);
    }
    return {scratch, width};
}

// The same rows with the depth across rows: operand [r][c] holds column c of kStep neighbouring rows.
template <class E, class T>
static inline Lanes<const E> load_rows_across(const T* from, int64_t ld, int64_t count, int64_t columns, E* scratch,
                                              const uint8_t* wanted, bool pad) {
    if constexpr (kStep<E> == 1) {
        return load_rows(from, ld, count, columns, scratch, wanted, pad);
    } else {
        const int64_t width = round_up(columns, kWidth<E>);
        static const T zeros[kMaxHeadDim] = {};
        for (int64_t r = 0; r < count; r += 2) {
            const T* low = !wanted || wanted[r] ? from + r * ld : zeros;
            const T* high = r + 1 < count && (!wanted || wanted[r + 1]) ? from + (r + 1) * ld : zeros;
            E* to = scratch + r / 2 * width;
            for (int64_t c = 0; c < columns; c += 2 * kWidth<E>) {
                Vec<E> pairs[2];
                Product<E>::interleave(low + c, high + c, smaller(2 * kWidth<E>, columns - c), pairs);
                store(to + c, pairs[0]);
                if (c + kWidth<E> < width) store(to + c + kWidth<E>, pairs[1]);
            }
        }
        return {scratch, width};
    }
}

// A tile of sums [key][lane] as operands with the depth along the lanes, in place: rows of kQueries operands.
template <class E>
static inline const E* along_lanes(Sum<E>* tile, int64_t keys, int64_t lanes) {
    E* const to = reinterpret_cast<E*>(tile);
    if constexpr (kStep<E> == 2) {
        constexpr int W = kWidth<E>;
        for (int64_t at = 0; at < keys * kQueries; at += kQueries) {
            for (int64_t lane = 0; lane < lanes; lane += 2 * W) {
                const Vec<float> high = lane + W < lanes ? load(tile + at + lane + W) : Vec<float>{};
                store(to + at + lane / 2, Product<E>::along(load(tile + at + lane), high));
            }
        }
    }
    return to;
}

// The same with the depth across keys: operand [key][lane] holds kStep neighbouring keys. Not in place.
template <class E>
static inline const E* across_keys(Sum<E>* tile, int64_t keys, int64_t lanes, E* scratch) {
    if constexpr (kStep<E> == 1) {
        return tile;
    } else {
        for (int64_t key = 0; key < keys; key += 2) {
            const Sum<E>* row = tile + key * kQueries;
            for (int64_t lane = 0; lane < lanes; lane += kWidth<E>) {
                const Vec<float> high = key + 1 < keys ? load(row + kQueries + lane) : Vec<float>{};
                store(scratch + key / 2 * kQueries + lane, Product<E>::across(load(row + lane), high));
            }
        }
        return scratch;
    }
}

// to[c][r] = from[r][c], the rows beyond `count` as zeros. `from` has whole vectors of columns,
// `to` has padded(columns) rows of `lanes` (a multiple of kWidth).
template <class A>
static inline void transpose(Lanes<const A> from, int64_t count, int64_t columns, Lanes<A> to, int64_t lanes) {
    constexpr int W = kWidth<A>;
    for (int64_t r = 0; r < lanes; r += W) {
        for (int64_t c = 0; c < columns; c += W) {
            Vec<A> square[W];
            for (int k = 0; k < W; ++k) {
                square[k] = r + k < count ? load(from.ptr + (r + k) * from.ld + c) : Vec<A>{};
            }
            transpose_square<A>(square);
            for (int k = 0; k < W; ++k) store(to.ptr + (c + k) * to.ld + r, square[k]);
        }
    }
}

// f of an element of that dtype, for its type.
template <class F>
static inline void with_dtype(Dtype dtype, const F& f) {
    switch (dtype) {
        case Dtype::float32: return f(float{});
        case Dtype::bfloat16: return f(bfloat16{});
        case Dtype::float16: return f(float16{});
        case Dtype::float64: return f(double{});
    }
}

template <class T, class A>
static inline void store_row(const A* from, int64_t columns, A factor, T* to) {
    for (int64_t c = 0; c < columns; ++c) to[c] = Narrow<T>::from(from[c] * factor);
}

}  // namespace PYATTN_ISA
}  // namespace pyattn
