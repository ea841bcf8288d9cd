// Moves, conversions, comparisons and predicates (PTX ISA, "Data Movement and Conversion Instructions: mov, cvt",
// "Comparison and Selection Instructions"). Operands: the destinations, then the sources.
#include "elementwise.h"
#include "numbers.h"

namespace ptx {
namespace {

uint32_t saturated(float x) {  // toward zero; NaN becomes 0
    if (x != x) return 0;
    return x >= 0x1p31f ? INT32_MAX : x <= -0x1p31f ? static_cast<uint32_t>(INT32_MIN) : static_cast<int32_t>(x);
}

template <class F>
uint32_t mask_where(F f) {
    uint32_t mask = 0;
    for (int lane = 0; lane < kLanes; ++lane) mask |= static_cast<uint32_t>(f(lane)) << lane;
    return mask;
}

template <class T>
uint32_t compare(int how, const T* a, const T* b) {
    switch (how) {
        case 0: return mask_where([=](int l) { return a[l] == b[l]; });
        case 1: return mask_where([=](int l) { return a[l] != b[l]; });
        case 2: return mask_where([=](int l) { return a[l] < b[l]; });
        case 3: return mask_where([=](int l) { return a[l] <= b[l]; });
        case 4: return mask_where([=](int l) { return a[l] > b[l]; });
        case 5: return mask_where([=](int l) { return a[l] >= b[l]; });
        // Unordered: true of NaN.
        case 6: return mask_where([=](int l) { return a[l] != b[l]; });                   // neu
        case 7: return mask_where([=](int l) { return !(a[l] >= b[l]); });                // ltu
        case 8: return mask_where([=](int l) { return !(a[l] > b[l]); });                 // leu
        case 9: return mask_where([=](int l) { return !(a[l] <= b[l]); });                // gtu
        case 10: return mask_where([=](int l) { return !(a[l] < b[l]); });                // geu
        case 11: return mask_where([=](int l) { return a[l] != a[l] || b[l] != b[l]; });  // nan
        case 12: return mask_where([=](int l) { return a[l] == a[l] && b[l] == b[l]; });  // num
        case 13: return mask_where([=](int l) { return a[l] < b[l] || a[l] > b[l]; });    // ne of floats: false of NaN
        default: fail("comparison %d", how);
    }
}
// sub: bits 0-3 the comparison, 4: and a predicate, 5: or. Operands: predicate, two sources, [predicate].
void set_predicate(Step& s, uint32_t mask) {
    if (s.field(4)) mask &= s.predicate(3);
    if (s.field(5)) mask |= s.predicate(3);
    s.set_predicate(0, mask);
}
template <class T>
void setp(Step& s) {
    set_predicate(s, compare(s.field(0, 4), s.of<T>(1), s.of<T>(2)));
}
template <class T>
void setp16(Step& s) {  // the lower half of the registers
    T a[kLanes], b[kLanes];
    for (int lane = 0; lane < kLanes; ++lane)
        a[lane] = static_cast<T>(s.u32(1)[lane]), b[lane] = static_cast<T>(s.u32(2)[lane]);
    set_predicate(s, compare(s.field(0, 4), a, b));
}
template <class T>
void selp(Step& s) {
    const T *a = s.of<T>(1), *b = s.of<T>(2);
    const uint32_t p = s.predicate(3);
    s.each(s.of<T>(0), [=](int l) { return p >> l & 1 ? a[l] : b[l]; });
}

}  // namespace

void execute_NOP(Step&) {}
PTX_UNARY(MOV32, uint32_t, uint32_t, x)
PTX_UNARY(MOV64, uint64_t, uint64_t, x)
PTX_BINARY(PACK16, uint32_t, uint32_t, uint32_t, (x & 0xffff) | y << 16)
PTX_BINARY(PACK32, uint64_t, uint32_t, uint32_t, x | uint64_t(y) << 32)
void execute_UNPACK16(Step& s) {
    uint32_t *low = s.u32(0), *high = s.u32(1);
    const uint32_t* a = s.u32(2);
    s.for_each_lane([=](int l) {
        const uint32_t x = a[l];
        low[l] = x & 0xffff, high[l] = x >> 16;
    });
}
void execute_UNPACK32(Step& s) {
    uint32_t *low = s.u32(0), *high = s.u32(1);
    const uint64_t* a = s.u64(2);
    s.for_each_lane([=](int l) {
        const uint64_t x = a[l];
        low[l] = static_cast<uint32_t>(x), high[l] = static_cast<uint32_t>(x >> 32);
    });
}

PTX_UNARY(CVT_F32_BF16, float, uint32_t, from_bf16(x))
PTX_UNARY(CVT_BF16_F32, uint32_t, float, to_bf16(x))
PTX_BINARY(CVT_BF16X2_F32, uint32_t, float, float, to_bf16(x) << 16 | to_bf16(y))
PTX_UNARY(CVT_F32_F16, float, uint32_t, from_f16(x))
PTX_UNARY(CVT_F16_F32, uint32_t, float, to_f16(x))
PTX_BINARY(CVT_F16X2_F32, uint32_t, float, float, to_f16(x) << 16 | to_f16(y))
PTX_UNARY(CVT_F32_S32, float, int32_t, static_cast<float>(x))
PTX_UNARY(CVT_F32_U32, float, uint32_t, static_cast<float>(x))
PTX_UNARY(CVT_S32_F32_RZ, uint32_t, float, saturated(x))
PTX_UNARY(CVT_F32_F64, float, double, static_cast<float>(x))
PTX_UNARY(CVT_F64_F32, double, float, x)
PTX_UNARY(CVT_F64_S32, double, int32_t, x)
PTX_UNARY(RINTF, float, float, std::nearbyint(x))
PTX_UNARY(CVT_S64_S32, int64_t, int32_t, x)
PTX_UNARY(CVT_U64_U32, uint64_t, uint32_t, x)
PTX_UNARY(CVT_U32_U64, uint32_t, uint64_t, static_cast<uint32_t>(x))
PTX_UNARY(CVT_U16_U32, uint32_t, uint32_t, x & 0xffff)
PTX_UNARY(CVT_S32_S16, int32_t, uint32_t, static_cast<int16_t>(x))
PTX_UNARY(CVT_S32_S8, int32_t, uint32_t, static_cast<int8_t>(x))
PTX_UNARY(SEXT64, int64_t, uint64_t, static_cast<int32_t>(x))  // of the lower half of a 64-bit register
PTX_UNARY(ZEXT64, uint64_t, uint64_t, static_cast<uint32_t>(x))

void execute_SETP_S32(Step& s) { setp<int32_t>(s); }
void execute_SETP_U32(Step& s) { setp<uint32_t>(s); }
void execute_SETP_S64(Step& s) { setp<int64_t>(s); }
void execute_SETP_U64(Step& s) { setp<uint64_t>(s); }
void execute_SETP_F32(Step& s) { setp<float>(s); }
void execute_SETP_F64(Step& s) { setp<double>(s); }
void execute_SETP_U16(Step& s) { setp16<uint16_t>(s); }
void execute_SETP_S16(Step& s) { setp16<int16_t>(s); }
void execute_SELP32(Step& s) { selp<uint32_t>(s); }
void execute_SELP64(Step& s) { selp<uint64_t>(s); }

void execute_MOVP(Step& s) { s.set_predicate(0, s.predicate(1)); }
void execute_NOTP(Step& s) { s.set_predicate(0, ~s.predicate(1)); }
void execute_ANDP(Step& s) { s.set_predicate(0, s.predicate(1) & s.predicate(2)); }
void execute_ORP(Step& s) { s.set_predicate(0, s.predicate(1) | s.predicate(2)); }
void execute_XORP(Step& s) { s.set_predicate(0, s.predicate(1) ^ s.predicate(2)); }

}  // namespace ptx
