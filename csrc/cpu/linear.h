// y = x w^T + bias for few rows of x. Its time is that of bringing in the weights, so each is read from memory once.
#pragma once

#include "../linear_args.h"
#include "parallel.h"
#include "tile.h"

namespace pyattn {
namespace PYATTN_ISA {

constexpr int kLinearRows = PYATTN_STRIP_VECTORS, kLinearOutputs = 4;  // of a tile: sums that fit the registers
constexpr int64_t kOutputsOfTask = 32;  // enough to pay for handing a task out, few enough to keep threads even

// to[k] = the sum of the lanes of vectors[k].
template <class A, int Count>
PYATTN_INLINE void add_lanes(const Vec<A>* vectors, A* to) {
    constexpr int W = kWidth<A>;
#pragma GCC unroll 16
    for (int first = 0; first < Count; first += W) {
        Vec<A> square[W];
#pragma GCC unroll 16
        for (int k = 0; k < W; ++k) square[k] = first + k < Count ? vectors[first + k] : Vec<A>{};
        transpose_square<A>(square);
        Vec<A> sum = square[0];
#pragma GCC unroll 16
        for (int k = 1; k < W; ++k) sum += square[k];
        alignas(PYATTN_VECTOR_BYTES) A lanes[W];
        store(lanes, sum);
        for (int k = 0; k < W && first + k < Count; ++k) to[first + k] = lanes[k];
    }
}

template <class T>
struct Linear {
    using E = Operand<T>;
    using A = Sum<E>;

    const LinearArgs& args;
    const Lanes<const E> x;
    const int64_t width;  // operands of a row, in whole vectors

    static void run(const LinearArgs& args) {
        const int64_t width = round_up(operands<E>(args.in), kWidth<E>), bytes = width * static_cast<int64_t>(sizeof(E));
        const Block rows(args.rows * bytes);
        const Linear self{args, load_rows(static_cast<const T*>(args.x.ptr), args.x.stride[0], args.rows, args.in,
                                          static_cast<E*>(rows.get()), nullptr, true), width};
        const int64_t tasks = (args.out + kOutputsOfTask - 1) / kOutputsOfTask;
        const auto body = [](const void* context, int64_t task, void* scratch) {
            static_cast<const Linear*>(context)->run_task(task, static_cast<E*>(scratch));
        };
        parallel_for(tasks, args.threads, kLinearOutputs * bytes, body, &self);
    }

    void run_task(int64_t task, E* scratch) const {
        const int64_t end = smaller((task + 1) * kOutputsOfTask, args.out);
        for (int64_t o = task * kOutputsOfTask; o < end; o += kLinearOutputs) {
            const int64_t count = smaller(kLinearOutputs, end - o);
            const auto w = load_rows(weights(o), args.w.stride[0], count, args.in, scratch, nullptr, true);
            int64_t r = 0;
            for (; r + kLinearRows <= args.rows; r += kLinearRows) run_tile<kLinearRows>(w, o, count, r);
            for (; r < args.rows; ++r) run_tile<1>(w, o, count, r);
        }
    }

    const T* weights(int64_t o) const { return static_cast<const T*>(args.w.ptr) + o * args.w.stride[0]; }

    // Rows [r, r + R) of y in its columns [o, o + count). Each sum has one order, whatever other rows there are.
    template <int R>
    void run_tile(Lanes<const E> w, int64_t o, int64_t count, int64_t r) const {
        const E* row[kLinearOutputs];
        const char* next[kLinearOutputs];  // the weights after these, which memory is asked for in time
        for (int64_t c = 0; c < kLinearOutputs; ++c) {
            row[c] = w.ptr + (c < count ? c : 0) * w.ld;
            next[c] = reinterpret_cast<const char*>(weights(smaller(o + kLinearOutputs + c, args.out - 1)));
        }
        Vec<A> acc[R * kLinearOutputs] = {};
        for (int64_t t = 0; t < width; t += kWidth<E>) {
            Vec<E> of_w[kLinearOutputs];
#pragma GCC unroll 4
            for (int c = 0; c < kLinearOutputs; ++c) {
                of_w[c] = load(row[c] + t);
                __builtin_prefetch(next[c] + t * kStep<E> * static_cast<int64_t>(sizeof(T)), 0, 2);
            }
#pragma GCC unroll 4
            for (int k = 0; k < R; ++k) {
                const Vec<E> of_x = load(x.ptr + (r + k) * x.ld + t);
#pragma GCC unroll 4
                for (int c = 0; c < kLinearOutputs; ++c) {
                    Vec<A>& sum = acc[k * kLinearOutputs + c];
                    sum = Product<E>::add(sum, of_x, of_w[c]);
                }
            }
        }
        A sums[R * kLinearOutputs];
        add_lanes<A, R * kLinearOutputs>(acc, sums);
        for (int k = 0; k < R; ++k) {
            T* const to = static_cast<T*>(args.y.ptr) + (r + k) * args.y.stride[0] + o;
            for (int64_t c = 0; c < count; ++c) {
                const A bias = args.bias ? widen(static_cast<const T*>(args.bias.ptr)[o + c]) : A(0);
                to[c] = Narrow<T>::from(sums[k * kLinearOutputs + c] + bias);
            }
        }
    }
};

}  // namespace PYATTN_ISA
}  // namespace pyattn
