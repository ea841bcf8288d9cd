// Tiles: their size, the scratch they live in, and moving rows of a tensor into and out of them.
#pragma once

#include <cstddef>

#include "../attention_args.h"
#include "gemm.h"
#include "halves.h"
#include "vec.h"

namespace pyattn {
namespace PYATTN_ISA {

constexpr int kQueries = 64;  // queries per tile; the lanes of a score tile
constexpr int kKeys = 64;     // keys per tile; a multiple of 4, so that one Philox call never spans two tiles

static inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
static inline int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
static inline int64_t larger(int64_t x, int64_t y) { return x > y ? x : y; }

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

template <class T>
static inline const T* row_pointer(const TensorArg& tensor, int64_t batch, int64_t head, int64_t row) {
    return static_cast<const T*>(tensor.ptr) + batch * tensor.stride[0] + head * tensor.stride[1] +
           row * tensor.stride[2];
}

// `count` rows of T as rows of A: in place where they already are that, else converted into `scratch`.
// Rows whose `wanted` byte is 0 come as zeros, so that a NaN in them goes nowhere. A padded tile has whole vectors.
template <class T, class A = Accumulator<T>>
static inline Lanes<const A> load_rows(const T* from, int64_t ld, int64_t count, int64_t columns, A* scratch,
                                       const uint8_t* wanted, bool pad) {
    const int64_t width = padded<A>(columns);
    if constexpr (sizeof(T) == sizeof(A)) {
        if (!wanted && (!pad || width == columns)) return {from, ld};
    }
    for (int64_t r = 0; r < count; ++r) {
        A* row = scratch + r * width;
        const int64_t filled = !wanted || wanted[r] ? columns : 0;
        for (int64_t c = 0; c < filled; ++c) row[c] = static_cast<A>(widen(from[r * ld + c]));
        for (int64_t c = filled; c < width; ++c) row[c] = 0;
    }
    return {scratch, width};
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

template <class T, class A = Accumulator<T>>
static inline void store_rows(Lanes<const A> from, int64_t count, int64_t columns, A factor, T* to, int64_t ld) {
    for (int64_t r = 0; r < count; ++r) {
        for (int64_t c = 0; c < columns; ++c) to[r * ld + c] = Narrow<T>::from(from.ptr[r * from.ld + c] * factor);
    }
}

}  // namespace PYATTN_ISA
}  // namespace pyattn
