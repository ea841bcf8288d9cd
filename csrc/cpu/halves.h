// Storage types of 16 bits and their conversions, branch-free so that loops over them vectorise.
#pragma once

#include <cstdint>
#include <cstring>

namespace pyattn {
namespace PYATTN_ISA {

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

template <class To, class From>
static inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

static inline float widen(float x) { return x; }
static inline double widen(double x) { return x; }
static inline float widen(bfloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
static inline float widen(float16 x) {
    const uint32_t magnitude = uint32_t{x.bits & 0x7fffu} << 13;
    // Reading the half's exponent field as a float's is off by the difference of the biases: a factor of 2^112.
    const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
    const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u | magnitude : finite;
    return bit_cast<float>(special | (uint32_t{x.bits & 0x8000u} << 16));
}

template <class T>
struct Narrow {  // T(x), rounded to nearest, ties to even
    static T from(T x) { return x; }
};
template <>
struct Narrow<bfloat16> {
    static bfloat16 from(float x) {
        const uint32_t bits = bit_cast<uint32_t>(x);
        const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        const uint32_t nan = (bits >> 16) | 0x40u;
        return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
    }
};
template <>
struct Narrow<float16> {
    static float16 from(float x) {
        const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
        // Adding 0.5 aligns a subnormal half's last bit with the float's, so that the addition itself rounds.
        const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
        const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
        const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
        const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
        const uint32_t half = magnitude >= 0x47800000u ? special : finite;
        return {static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u))};
    }
};

template <class T>
struct AccumulatorOf {
    using type = float;
};
template <>
struct AccumulatorOf<double> {
    using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

}  // namespace PYATTN_ISA
}  // namespace pyattn
