// Floating-point formats of 16 bits, and the roundings that are not C++'s own.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace ptx {

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

inline float from_bf16(uint32_t x) { return bit_cast<float>(x << 16); }
inline float from_f16(uint32_t x) { return _cvtsh_ss(static_cast<uint16_t>(x)); }
inline float from_half(uint32_t x, bool f16) { return f16 ? from_f16(x) : from_bf16(x); }

// Round to nearest even. The NaN of a conversion to bf16 is 0x7fff (PTX ISA, "cvt").
inline uint32_t to_bf16(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t to_f16(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
inline uint32_t to_half(float x, bool f16) { return f16 ? to_f16(x) : to_bf16(x); }

// What the tensor cores read of a register that is said to hold tf32.
inline float from_tf32(uint32_t x) { return bit_cast<float>(x & 0xffffe000u); }

inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }  // .ftz

inline float toward_zero(double x) {
    const float nearest = static_cast<float>(x);
    const bool beyond = std::isfinite(nearest) && std::fabs(static_cast<double>(nearest)) > std::fabs(x);
    return beyond ? std::nextafterf(nearest, 0.0f) : nearest;
}

// Rounds to odd: a second rounding, to 16 bits, is then as if it were the only one (Boldo and Melquiond, 2005).
inline float to_odd(double x) {
    const float nearest = static_cast<float>(x);
    if (!std::isfinite(nearest) || static_cast<double>(nearest) == x) return nearest;
    return bit_cast<float>(bit_cast<uint32_t>(toward_zero(x)) | 1);
}

// x + y rounded to odd, so that it may be rounded again: the error is Knuth's TwoSum's.
inline double sum_to_odd(double x, double y) {
    const double sum = x + y, of_y = sum - x, error = (x - (sum - of_y)) + (y - of_y);
    if (!std::isfinite(sum) || !std::isfinite(error) || error == 0 || bit_cast<uint64_t>(sum) & 1) return sum;
    return std::nextafter(sum, error > 0 ? INFINITY : -INFINITY);
}

}  // namespace ptx
