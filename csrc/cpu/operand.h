// Operands of matrix products. An operand is one number or, where the CPU multiplies pairs of bfloat16 (AVX512_BF16),
// two neighbours along the depth of the product, at twice the rate of float32.
#pragma once

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "halves.h"
#include "vec.h"

namespace pyattn {
namespace PYATTN_ISA {

template <class E>
struct Product {
    using Sum = E;
    static constexpr int step = 1;  // numbers along the depth that an operand holds
    static Vec<E> broadcast(E x) { return fill<E>(x); }
    static Vec<E> add(Vec<E> sum, Vec<E> x, Vec<E> y) { return sum + x * y; }
};

// What tensors of T are multiplied as.
template <class T>
struct OperandOf {
    using type = Accumulator<T>;
};

#ifdef __AVX512BF16__
struct __attribute__((may_alias)) Pair {
    uint32_t bits;  // the earlier number in the low half
};
template <>
struct VecOf<Pair> {
    typedef int32_t type __attribute__((vector_size(PYATTN_VECTOR_BYTES)));
    using bits = type;
};
template <>
struct OperandOf<bfloat16> {
    using type = Pair;
};

template <>
struct Product<Pair> {
    using Sum = float;
    static constexpr int step = 2;
    static Vec<Pair> broadcast(Pair x) { return Vec<Pair>{} + static_cast<int32_t>(x.bits); }
    static Vec<float> add(Vec<float> sum, Vec<Pair> x, Vec<Pair> y) {
        return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
    }
    // 32 lanes in their order, the first 16 of them in `low`.
    static Vec<Pair> along(Vec<float> low, Vec<float> high) {
        return (Vec<Pair>)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    }
    // Lane by lane (low, high).
    static Vec<Pair> across(Vec<float> low, Vec<float> high) {
        const __m512i order = _mm512_set_epi32(0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009,
                                               0x180008, 0x170007, 0x160006, 0x150005, 0x140004, 0x130003, 0x120002,
                                               0x110001, 0x100000);
        return (Vec<Pair>)_mm512_permutexvar_epi16(order, (__m512i)along(low, high));
    }
    // The same of rows of `count` <= 32 numbers that are bfloat16 already, and zeros after them, to two vectors.
    static void interleave(const bfloat16* low, const bfloat16* high, int64_t count, Vec<Pair>* to) {
        const auto some = static_cast<__mmask32>((1ull << count) - 1);
        const __m512i a = _mm512_maskz_loadu_epi16(some, low), b = _mm512_maskz_loadu_epi16(some, high);
        const auto lane = [](int64_t first) {
            constexpr Vec<Pair> pairs = {0x200000, 0x210001, 0x220002, 0x230003, 0x240004, 0x250005, 0x260006, 0x270007,
                                         0x280008, 0x290009, 0x2a000a, 0x2b000b, 0x2c000c, 0x2d000d, 0x2e000e, 0x2f000f};
            return (__m512i)(pairs + static_cast<int32_t>(first * 0x10001));
        };
        to[0] = (Vec<Pair>)_mm512_permutex2var_epi16(a, lane(0), b);
        to[1] = (Vec<Pair>)_mm512_permutex2var_epi16(a, lane(16), b);
    }
};
#endif

template <class T>
using Operand = typename OperandOf<T>::type;
template <class E>
using Sum = typename Product<E>::Sum;
template <class E>
constexpr int kStep = Product<E>::step;

// x as a product takes it.
template <class E>
PYATTN_INLINE Vec<Sum<E>> as_operand(Vec<Sum<E>> x) {
    if constexpr (kStep<E> == 1) {
        return x;
    } else {
        const Bits<float> bits = (Bits<float>)x;
        return (Vec<float>)((bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff);
    }
}

}  // namespace PYATTN_ISA
}  // namespace pyattn
