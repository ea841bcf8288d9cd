// Integer arithmetic, logic and shifts (PTX ISA, "Integer Arithmetic Instructions", "Logic and Shift Instructions").
// Operands: the destination, then the sources. Registers of 16 bits lie in 32, their upper half zero.
#include <algorithm>
#include <type_traits>

#include "elementwise.h"

namespace ptx {
namespace {

using s32 = int32_t;
using u32 = uint32_t;
using s64 = int64_t;
using u64 = uint64_t;

// By zero is unspecified, and no fault: LLVM hoists divisions whose result is then not used.
template <class T>
T quotient(T x, T y) {
    using Unsigned = std::make_unsigned_t<T>;
    if (y == 0) return static_cast<T>(~Unsigned(0));
    if (std::is_signed_v<T> && y == T(-1)) return static_cast<T>(-static_cast<Unsigned>(x));  // of INT_MIN it overflows
    return x / y;
}
template <class T>
T remainder(T x, T y) {
    if (y == 0) return x;
    if (std::is_signed_v<T> && y == T(-1)) return 0;
    return x % y;
}

template <class Word>
Word mask_of(u32 bits) {
    return bits >= 8 * sizeof(Word) ? ~Word(0) : (Word(1) << bits) - 1;
}

template <class Word>
Word bit_field(Word x, u32 position, u32 length, bool is_signed) {  // bfe
    constexpr u32 last = 8 * sizeof(Word) - 1;
    position &= 255, length &= 255;
    if (!length) return 0;
    const u32 top = std::min(position + length - 1, last);
    const Word kept = mask_of<Word>(length) & (position > last ? 0 : ~Word(0) >> position);
    const Word sign = is_signed && (x >> top & 1) ? ~Word(0) : 0;
    return ((position > last ? 0 : x >> position) & kept) | (sign & ~kept);
}
u32 insert_field(u32 field, u32 into, u32 position, u32 length) {  // bfi
    position &= 255, length &= 255;
    if (position > 31) return into;
    const u32 mask = mask_of<u32>(length) << position;
    return (into & ~mask) | (field << position & mask);
}
u32 permute_bytes(u32 x, u32 y, u32 selector) {  // prmt, its default mode
    const u64 bytes = x | u64(y) << 32;
    u32 result = 0;
    for (int k = 0; k < 4; ++k) {
        const u32 choice = selector >> 4 * k & 15, byte = static_cast<u32>(bytes >> 8 * (choice & 7)) & 255;
        const u32 sign = byte & 128 ? 255 : 0;
        result |= (choice & 8 ? sign : byte) << 8 * k;
    }
    return result;
}
u32 truth_table(u32 x, u32 y, u32 z, u32 table) {  // lop3
    u32 result = 0;
    for (int row = 0; row < 8; ++row)
        if (table >> row & 1) result |= (row & 4 ? x : ~x) & (row & 2 ? y : ~y) & (row & 1 ? z : ~z);
    return result;
}
u32 funnel_left(u32 low, u32 high, u32 n) { return static_cast<u32>(((u64(high) << 32 | low) << n) >> 32); }
u32 funnel_right(u32 low, u32 high, u32 n) { return static_cast<u32>((u64(high) << 32 | low) >> n); }

}  // namespace

PTX_BINARY(ADD32, u32, u32, u32, x + y)
PTX_BINARY(SUB32, u32, u32, u32, x - y)
PTX_BINARY(ADD16, u32, u32, u32, (x + y) & 0xffff)
PTX_BINARY(SUB16, u32, u32, u32, (x - y) & 0xffff)
PTX_BINARY(ADD64, u64, u64, u64, x + y)
PTX_BINARY(SUB64, u64, u64, u64, x - y)

PTX_BINARY(MULLO16, u32, u32, u32, (x * y) & 0xffff)
PTX_BINARY(MULLO32, u32, u32, u32, x * y)
PTX_BINARY(MULLO64, u64, u64, u64, x * y)
PTX_BINARY(MULHI_S32, s32, s32, s32, static_cast<s32>(s64(x) * y >> 32))
PTX_BINARY(MULHI_U32, u32, u32, u32, static_cast<u32>(u64(x) * y >> 32))
PTX_BINARY(MULHI_U64, u64, u64, u64, static_cast<u64>(static_cast<unsigned __int128>(x) * y >> 64))
PTX_BINARY(MULWIDE_S16, s32, u32, u32, s32(int16_t(x)) * s32(int16_t(y)))
PTX_BINARY(MULWIDE_U16, u32, u32, u32, (x & 0xffff) * (y & 0xffff))
PTX_BINARY(MULWIDE_S32, s64, s32, s32, s64(x) * y)
PTX_BINARY(MULWIDE_U32, u64, u32, u32, u64(x) * y)
PTX_TERNARY(MADLO32, u32, u32, u32, u32, x * y + z)
PTX_TERNARY(MADLO64, u64, u64, u64, u64, x * y + z)
PTX_TERNARY(MADWIDE_S16, u32, u32, u32, u32, static_cast<u32>(s32(int16_t(x)) * s32(int16_t(y))) + z)
PTX_TERNARY(MADWIDE_U16, u32, u32, u32, u32, (x & 0xffff) * (y & 0xffff) + z)
PTX_TERNARY(MADWIDE_S32, u64, s32, s32, u64, static_cast<u64>(s64(x) * y) + z)
PTX_TERNARY(MADWIDE_U32, u64, u32, u32, u64, u64(x) * y + z)

PTX_BINARY(DIV_S32, s32, s32, s32, quotient(x, y))
PTX_BINARY(DIV_U32, u32, u32, u32, quotient(x, y))
PTX_BINARY(REM_S32, s32, s32, s32, remainder(x, y))
PTX_BINARY(REM_U32, u32, u32, u32, remainder(x, y))
PTX_BINARY(DIV_S64, s64, s64, s64, quotient(x, y))
PTX_BINARY(DIV_U64, u64, u64, u64, quotient(x, y))
PTX_BINARY(REM_S64, s64, s64, s64, remainder(x, y))
PTX_BINARY(REM_U64, u64, u64, u64, remainder(x, y))

PTX_BINARY(MIN_S32, s32, s32, s32, std::min(x, y))
PTX_BINARY(MAX_S32, s32, s32, s32, std::max(x, y))
PTX_BINARY(MIN_U32, u32, u32, u32, std::min(x, y))
PTX_BINARY(MAX_U32, u32, u32, u32, std::max(x, y))
PTX_BINARY(MIN_S64, s64, s64, s64, std::min(x, y))
PTX_BINARY(MAX_S64, s64, s64, s64, std::max(x, y))
PTX_BINARY(MIN_U64, u64, u64, u64, std::min(x, y))
PTX_BINARY(MAX_U64, u64, u64, u64, std::max(x, y))
PTX_BINARY(MINRELU_S32, s32, s32, s32, std::max(std::min(x, y), 0))
PTX_BINARY(MAXRELU_S32, s32, s32, s32, std::max(std::max(x, y), 0))
PTX_UNARY(ABS32, u32, s32, x < 0 ? -u32(x) : u32(x))
PTX_UNARY(NEG32, u32, u32, -x)
PTX_UNARY(NEG64, u64, u64, -x)

PTX_BINARY(AND32, u32, u32, u32, x & y)
PTX_BINARY(OR32, u32, u32, u32, x | y)
PTX_BINARY(XOR32, u32, u32, u32, x ^ y)
PTX_UNARY(NOT32, u32, u32, ~x)
PTX_UNARY(NOT16, u32, u32, ~x & 0xffff)
PTX_BINARY(AND64, u64, u64, u64, x & y)
PTX_BINARY(OR64, u64, u64, u64, x | y)
PTX_BINARY(XOR64, u64, u64, u64, x ^ y)
PTX_UNARY(NOT64, u64, u64, ~x)

// Counts beyond the register's width are clamped to it; they have 32 bits whatever the type.
PTX_BINARY(SHL16, u32, u32, u32, y > 15 ? 0 : x << y & 0xffff)
PTX_BINARY(SHL32, u32, u32, u32, y > 31 ? 0 : x << (y & 31))
PTX_BINARY(SHL64, u64, u64, u32, y > 63 ? 0 : x << (y & 63))
PTX_BINARY(SHR_U32, u32, u32, u32, y > 31 ? 0 : x >> (y & 31))
PTX_BINARY(SHR_U64, u64, u64, u32, y > 63 ? 0 : x >> (y & 63))
PTX_BINARY(SHR_S32, s32, s32, u32, x >> std::min(y, 31u))
PTX_BINARY(SHR_S64, s64, s64, u32, x >> std::min(y, 63u))
// sub: 1 clamps the count at 32 (.clamp), 0 takes it modulo 32 (.wrap).
PTX_TERNARY(SHF_L, u32, u32, u32, u32, sub && z >= 32 ? x : funnel_left(x, y, z & 31))
PTX_TERNARY(SHF_R, u32, u32, u32, u32, sub && z >= 32 ? y : funnel_right(x, y, z & 31))

PTX_UNARY(POPC32, u32, u32, static_cast<u32>(__builtin_popcount(x)))
PTX_UNARY(CLZ32, u32, u32, x ? static_cast<u32>(__builtin_clz(x)) : 32)
PTX_TERNARY(BFE_U32, u32, u32, u32, u32, bit_field(x, y, z, false))
PTX_TERNARY(BFE_S32, u32, u32, u32, u32, bit_field(x, y, z, true))
PTX_TERNARY(BFE_U64, u64, u64, u32, u32, bit_field(x, y, z, false))
PTX_TERNARY(BFE_S64, u64, u64, u32, u32, bit_field(x, y, z, true))
PTX_TERNARY(PRMT, u32, u32, u32, u32, permute_bytes(x, y, z))
PTX_TERNARY(LOP3, u32, u32, u32, u32, truth_table(x, y, z, sub))  // sub: the table

void execute_BFI32(Step& s) {
    const u32 *field = s.u32(1), *into = s.u32(2), *position = s.u32(3), *length = s.u32(4);
    s.each(s.u32(0), [=](int l) { return insert_field(field[l], into[l], position[l], length[l]); });
}

}  // namespace ptx
