// Floating-point arithmetic (PTX ISA, "Floating Point Instructions", "Half Precision Floating Point Instructions",
// "Mixed Precision Floating Point Instructions"). Operands: the destination, then the sources. The approximations of
// the chip's special functions are the C library's here.
#include <cmath>

#include "elementwise.h"
#include "numbers.h"

namespace ptx {
namespace {

// -0 is less than +0. With one NaN the other one is the result, unless .NaN asks for NaN.
template <class T>
T minimum(T x, T y, bool nan) {
    if (x != x || y != y) return nan ? T(NAN) : x != x ? y : x;
    return x < y || (x == y && std::signbit(x)) ? x : y;
}
template <class T>
T maximum(T x, T y, bool nan) {
    if (x != x || y != y) return nan ? T(NAN) : x != x ? y : x;
    return x > y || (x == y && !std::signbit(x)) ? x : y;
}

enum HalfOperation { kAdd, kSub, kMul, kFma, kNeg, kMin, kMax, kAbs };

double half_result(int operation, double x, double y, double z) {
    switch (operation) {
        case kAdd: return sum_to_odd(x, y);
        case kSub: return sum_to_odd(x, -y);
        case kMul: return x * y;  // exact
        case kFma: return sum_to_odd(x * y, z);
        case kNeg: return -x;
        case kMin: return minimum(x, y, false);
        case kMax: return maximum(x, y, false);
        case kAbs: return std::fabs(x);
        default: fail("half-precision operation %d", operation);
    }
}

// f of each lane's sources; bit 0 of `sub` (.ftz) flushes them and the result.
template <class F>
void unary(Step& s, F f) {
    const float* a = s.f32(1);
    if (s.field(0))
        s.each(s.f32(0), [=](int l) { return flush(f(flush(a[l]))); });
    else
        s.each(s.f32(0), [=](int l) { return f(a[l]); });
}
template <class F>
void binary(Step& s, F f) {
    const float *a = s.f32(1), *b = s.f32(2);
    if (s.field(0))
        s.each(s.f32(0), [=](int l) { return flush(f(flush(a[l]), flush(b[l]))); });
    else
        s.each(s.f32(0), [=](int l) { return f(a[l], b[l]); });
}
template <class F>
void ternary(Step& s, F f) {
    const float *a = s.f32(1), *b = s.f32(2), *c = s.f32(3);
    if (s.field(0))
        s.each(s.f32(0), [=](int l) { return flush(f(flush(a[l]), flush(b[l]), flush(c[l]))); });
    else
        s.each(s.f32(0), [=](int l) { return f(a[l], b[l], c[l]); });
}
// Of two sources or, since sm_100, of three.
template <class F>
void extremum(Step& s, F f) {
    if (s.i.operands == 3)
        binary(s, f);
    else
        ternary(s, [=](float x, float y, float z) { return f(f(x, y), z); });
}

// Of both halves of 64-bit registers. Operands that are not there are not looked at.
template <class F>
void packed(Step& s, F f) {
    float* d = s.f32(0);
    const float *a = s.f32(1), *b = s.f32(2), *c = s.i.operands > 3 ? s.f32(3) : a;
    s.for_each_lane([=](int lane) {
        for (int k = 2 * lane; k < 2 * lane + 2; ++k) d[k] = f(a[k], b[k], c[k]);
    });
}

}  // namespace

void execute_ADDF(Step& s) {
    binary(s, [](float x, float y) { return x + y; });
}
void execute_SUBF(Step& s) {
    binary(s, [](float x, float y) { return x - y; });
}
void execute_MULF(Step& s) {
    binary(s, [](float x, float y) { return x * y; });
}
void execute_DIVF(Step& s) {
    binary(s, [](float x, float y) { return x / y; });
}
void execute_FMAF(Step& s) {
    ternary(s, [](float x, float y, float z) { return std::fma(x, y, z); });
}
void execute_NEGF(Step& s) {
    unary(s, [](float x) { return -x; });
}
void execute_ABSF(Step& s) {
    unary(s, [](float x) { return std::fabs(x); });
}
void execute_EX2(Step& s) {
    unary(s, [](float x) { return std::exp2(x); });
}
void execute_LG2(Step& s) {
    unary(s, [](float x) { return std::log2(x); });
}
void execute_RCP(Step& s) {
    unary(s, [](float x) { return 1.0f / x; });
}
void execute_SQRT(Step& s) {
    unary(s, [](float x) { return std::sqrt(x); });
}
void execute_RSQRT(Step& s) {
    unary(s, [](float x) { return 1.0f / std::sqrt(x); });
}
void execute_TANH(Step& s) {
    unary(s, [](float x) { return std::tanh(x); });
}

// sub: bit 1: .NaN
void execute_MINF(Step& s) {
    const bool nan = s.field(1);
    extremum(s, [=](float x, float y) { return minimum(x, y, nan); });
}
void execute_MAXF(Step& s) {
    const bool nan = s.field(1);
    extremum(s, [=](float x, float y) { return maximum(x, y, nan); });
}

void execute_ADDF2(Step& s) {
    packed(s, [](float x, float y, float) { return x + y; });
}
void execute_SUBF2(Step& s) {
    packed(s, [](float x, float y, float) { return x - y; });
}
void execute_MULF2(Step& s) {
    packed(s, [](float x, float y, float) { return x * y; });
}
void execute_FMAF2(Step& s) {
    packed(s, [](float x, float y, float z) { return std::fma(x, y, z); });
}

PTX_BINARY(ADDD, double, double, double, x + y)
PTX_BINARY(SUBD, double, double, double, x - y)
PTX_BINARY(MULD, double, double, double, x* y)
PTX_BINARY(DIVD, double, double, double, x / y)
PTX_BINARY(MIND, double, double, double, minimum(x, y, false))
PTX_BINARY(MAXD, double, double, double, maximum(x, y, false))
PTX_TERNARY(FMAD, double, double, double, double, std::fma(x, y, z))
PTX_UNARY(NEGD, double, double, -x)
PTX_UNARY(ABSD, double, double, std::fabs(x))
PTX_BINARY(COPYSIGNF, float, float, float, std::copysign(y, x))  // the first source has the sign
PTX_BINARY(COPYSIGND, double, double, double, std::copysign(y, x))

// .approx.ftz: the chip looks at 20 bits of mantissa and gives as many; subnormal numbers are zeros.
void execute_RCPD(Step& s) {
    const auto high = [](double x) {
        const double flushed = std::fabs(x) < 0x1p-1022 ? std::copysign(0.0, x) : x;
        return bit_cast<double>(bit_cast<uint64_t>(flushed) & ~uint64_t{0xffffffff});
    };
    const double* a = s.of<double>(1);
    s.each(s.of<double>(0), [=](int l) { return high(1.0 / high(a[l])); });
}

// sub: bits 0-3 a HalfOperation, 4: f16 instead of bf16, 5: two of them (.x2). Rounded once.
void execute_HALF(Step& s) {
    uint32_t* d = s.u32(0);
    const uint32_t *a = s.u32(1), *b = s.i.operands > 2 ? s.u32(2) : a, *c = s.i.operands > 3 ? s.u32(3) : a;
    const int operation = s.field(0, 4), count = s.field(5) ? 2 : 1;
    const bool f16 = s.field(4);
    s.for_each_lane([=](int lane) {
        uint32_t result = 0;
        for (int shift = 0; shift < 16 * count; shift += 16) {
            const auto half = [=](const uint32_t* x) -> double { return from_half(x[lane] >> shift & 0xffff, f16); };
            result |= to_half(to_odd(half_result(operation, half(a), half(b), half(c))), f16) << shift;
        }
        d[lane] = result;
    });
}

// Of a half a (and b) and a float. sub: 1: f16 instead of bf16
void execute_ADDMIX(Step& s) {
    const uint32_t* a = s.u32(1);
    const float* c = s.f32(2);
    const bool f16 = s.i.sub;
    s.each(s.f32(0), [=](int l) { return from_half(a[l] & 0xffff, f16) + c[l]; });
}
void execute_FMAMIX(Step& s) {
    const uint32_t *a = s.u32(1), *b = s.u32(2);
    const float* c = s.f32(3);
    const bool f16 = s.i.sub;
    s.each(s.f32(0),
           [=](int l) { return std::fma(from_half(a[l] & 0xffff, f16), from_half(b[l] & 0xffff, f16), c[l]); });
}

}  // namespace ptx
