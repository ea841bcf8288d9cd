// SIMD vectors by the compilers' vector extensions (GCC, Clang): one source for every instruction set.
// The including file sets PYATTN_ISA, the namespace, and PYATTN_VECTOR_BYTES.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

// Vectors live in registers only as long as nothing is called.
#define PYATTN_INLINE static inline __attribute__((always_inline))

namespace pyattn {
namespace PYATTN_ISA {

static inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
static inline int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
static inline int64_t larger(int64_t x, int64_t y) { return x > y ? x : y; }

template <class A>
struct VecOf;
template <>
struct VecOf<float> {
    typedef float type __attribute__((vector_size(PYATTN_VECTOR_BYTES)));
    typedef int32_t bits __attribute__((vector_size(PYATTN_VECTOR_BYTES)));
};
template <>
struct VecOf<double> {
    typedef double type __attribute__((vector_size(PYATTN_VECTOR_BYTES)));
    typedef int64_t bits __attribute__((vector_size(PYATTN_VECTOR_BYTES)));
};
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
using Bits = typename VecOf<A>::bits;
template <class A>
constexpr int kWidth = PYATTN_VECTOR_BYTES / static_cast<int>(sizeof(A));

template <class A>
PYATTN_INLINE Vec<A> load(const A* from) {
    Vec<A> x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
template <class A>
PYATTN_INLINE void store(A* to, Vec<A> x) {
    std::memcpy(to, &x, sizeof x);
}
template <class A>
PYATTN_INLINE Vec<A> fill(A x) {
    return x - Vec<A>{};  // x - 0 is x, -0 too, so the subtraction folds away; x + 0 would stay
}

// -1 in the first `count` lanes, else 0.
template <class A, int... L>
PYATTN_INLINE Bits<A> first_lanes(int64_t count, std::integer_sequence<int, L...>) {
    return Bits<A>{L...} < static_cast<std::remove_reference_t<decltype(Bits<A>{}[0])>>(count);
}
template <class A>
PYATTN_INLINE Bits<A> first_lanes(int64_t count) {
    return first_lanes<A>(count, std::make_integer_sequence<int, kWidth<A>>{});
}

// A NaN in x is passed over: the exponentials that follow bring it back.
template <class A>
PYATTN_INLINE Vec<A> running_max(Vec<A> so_far, Vec<A> x) {
    return x > so_far ? x : so_far;
}

// Coefficients are Chebyshev fits of (e^f - 1 - f) / f^2 on [-ln2/2, ln2/2], highest power first.
// `round` is 1.5 * 2^mantissa, which rounds what is added to it to an integer, plus the exponent's bias.
template <class A>
struct ExpConstants;
template <>
struct ExpConstants<float> {
    static constexpr float lowest = -87.33654f;  // ln of the smallest normal number; below it the result is 0
    static constexpr float round = 0x1.8p23f + 127, ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
    static constexpr int mantissa = 23;
    static constexpr float poly[] = {1.39262508e-3f, 8.36323288e-3f, 4.16665542e-2f, 1.66665766e-1f, 0.5f};
};
template <>
struct ExpConstants<double> {
    static constexpr double lowest = -708.396418532264;
    static constexpr double round = 0x1.8p52 + 1023, ln2_high = 0x1.62e42fefap-1, ln2_low = 0x1.cf79abc9e3b39p-40;
    static constexpr int mantissa = 52;
    static constexpr double poly[] = {2.5100472505694996e-8,  2.7620201591031549e-7, 2.7557268276905697e-6,
                                      2.4801521057868205e-5,  1.9841269863171556e-4, 1.3888888917367081e-3,
                                      8.3333333333300382e-3,  4.1666666666623821e-2, 1.6666666666666667e-1,
                                      0.5};
};

// e^x for x <= 0 (and a little above), to 1.2 ulp. e^-inf is exactly 0; a NaN stays one.
template <class A>
PYATTN_INLINE Vec<A> exp(Vec<A> x) {
    using C = ExpConstants<A>;
    // The low mantissa bits of `shifted` are the nearest integer of x / ln2 plus the bias: an exponent field.
    const Vec<A> shifted = x * fill<A>(static_cast<A>(1.4426950408889634)) + C::round;
    const Vec<A> whole = shifted - C::round;
    const Vec<A> f = (x - whole * C::ln2_high) - whole * C::ln2_low;
    Vec<A> poly = fill<A>(C::poly[0]);
#pragma GCC unroll 10
    for (int i = 1; i < static_cast<int>(sizeof C::poly / sizeof(A)); ++i) poly = poly * f + C::poly[i];
    poly = (poly * f + A(1)) * f + A(1);
    const Vec<A> power = (Vec<A>)((Bits<A>)shifted << C::mantissa);
    return x < C::lowest ? Vec<A>{} : poly * power;
}

// e^x, and to less_one e^x - 1 without loss where x is small. |x| <= 80 (700 for double); a NaN stays one.
template <class A>
PYATTN_INLINE Vec<A> exp(Vec<A> x, Vec<A>& less_one) {
    using C = ExpConstants<A>;
    const Vec<A> shifted = x * fill<A>(static_cast<A>(1.4426950408889634)) + C::round;
    const Vec<A> whole = shifted - C::round;
    const Vec<A> f = (x - whole * C::ln2_high) - whole * C::ln2_low;
    Vec<A> poly = fill<A>(C::poly[0]);
#pragma GCC unroll 10
    for (int i = 1; i < static_cast<int>(sizeof C::poly / sizeof(A)); ++i) poly = poly * f + C::poly[i];
    const Vec<A> power = (Vec<A>)((Bits<A>)shifted << C::mantissa);
    const Vec<A> beyond = (poly * f) * f + f;
    less_one = power * beyond + (power - A(1));
    return power * beyond + power;
}

// tanh after Cephes: a rational function near 0, where 1 - 2 / (e^2x + 1) would cancel, and that elsewhere.
template <class A>
PYATTN_INLINE Vec<A> tanh(Vec<A> x) {
    const Vec<A> magnitude = x < A(0) ? -x : x;
    const Vec<A> z = x * x;
    const Vec<A> top = (z * A(-9.64399179425052238628e-1) + A(-9.92877231001918586564e1)) * z +
                       A(-1.61468768441708447952e3);
    const Vec<A> bottom = ((z + A(1.12811678491632931402e2)) * z + A(2.23548839060100448583e3)) * z +
                          A(4.84406305325125486048e3);
    const Vec<A> small = x + x * z * top / bottom;
    const Vec<A> e = exp<A>(magnitude * A(-2));
    const Vec<A> large = (A(1) - e) / (A(1) + e);
    return magnitude < A(0.625) ? small : (x < A(0) ? -large : large);
}

// Lanes of a where the lane number lacks bit S, else lanes of b moved up by S; and the other half.
template <class A, int S, int... L>
PYATTN_INLINE void exchange(Vec<A>& a, Vec<A>& b, std::integer_sequence<int, L...>) {
    constexpr int W = kWidth<A>;
#ifdef __clang__
    const Vec<A> low = __builtin_shufflevector(a, b, ((L & S) ? W + L - S : L)...);
    const Vec<A> high = __builtin_shufflevector(a, b, ((L & S) ? W + L : L + S)...);
#else
    const Vec<A> low = __builtin_shuffle(a, b, Bits<A>{((L & S) ? W + L - S : L)...});
    const Vec<A> high = __builtin_shuffle(a, b, Bits<A>{((L & S) ? W + L : L + S)...});
#endif
    a = low;
    b = high;
}

template <class A, int S>
PYATTN_INLINE void transpose_network(Vec<A>* row) {
    if constexpr (S > 0) {
#pragma GCC unroll 16
        for (int r = 0; r < kWidth<A>; ++r) {
            if (!(r & S)) exchange<A, S>(row[r], row[r + S], std::make_integer_sequence<int, kWidth<A>>{});
        }
        transpose_network<A, S / 2>(row);
    }
}

// Transposes a square of kWidth rows in registers (Eklundh's exchange network).
template <class A>
PYATTN_INLINE void transpose_square(Vec<A>* row) {
    transpose_network<A, kWidth<A> / 2>(row);
}

}  // namespace PYATTN_ISA
}  // namespace pyattn
