// atom and red (PTX ISA, "Parallel Synchronization and Communication Instructions: atom, red"). The memory is
// sequentially consistent here, so that scopes and .relaxed, .acquire and .release say nothing more.
#include <algorithm>
#include <type_traits>

#include "numbers.h"
#include "step.h"

namespace ptx {
namespace {

enum Operation { kAdd, kMin, kMax, kCas, kExch, kAnd, kOr, kXor, kInc, kDec };
enum Type { kU32, kS32, kU64, kS64, kF32, kF16x2, kBF16x2 };

template <class T>
T of_integers(int operation, T old, T b, T c) {
    switch (operation) {
        case kAdd: return static_cast<T>(static_cast<std::make_unsigned_t<T>>(old) + b);
        case kMin: return std::min(old, b);
        case kMax: return std::max(old, b);
        case kCas: return old == b ? c : old;
        case kExch: return b;
        case kAnd: return old & b;
        case kOr: return old | b;
        case kXor: return old ^ b;
        case kInc: return old >= b ? 0 : old + 1;
        case kDec: return old == 0 || old > b ? b : old - 1;
        default: fail("atomic operation %d", operation);
    }
}
uint32_t sum_of_halves(uint32_t x, uint32_t y, bool f16) {  // exact in float64, then rounded once
    uint32_t sum = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const double a = from_half(x >> shift & 0xffff, f16), b = from_half(y >> shift & 0xffff, f16);
        sum |= to_half(to_odd(sum_to_odd(a, b)), f16) << shift;
    }
    return sum;
}
uint64_t result(int operation, int type, uint64_t old, uint64_t b, uint64_t c) {
    const auto low = [](uint64_t x) { return static_cast<uint32_t>(x); };
    switch (type) {
        case kU32: return of_integers<uint32_t>(operation, low(old), low(b), low(c));
        case kS32: return low(of_integers<int32_t>(operation, low(old), low(b), low(c)));
        case kU64: return of_integers<uint64_t>(operation, old, b, c);
        case kS64: return of_integers<int64_t>(operation, old, b, c);
    }
    if (operation != kAdd) fail("atomic operation %d of floating-point numbers", operation);
    if (type == kF32) return bit_cast<uint32_t>(bit_cast<float>(low(old)) + bit_cast<float>(low(b)));
    return sum_of_halves(low(old), low(b), type == kF16x2);
}

}  // namespace

// Operands: address, offset, [d], b, [c]. sub: bits 0-1 space (0 global, 1 shared), 2-5 an Operation, 6-9 a Type, 10:
// the address has 64 bits, 11: red, without d. One lane after another; cas stores c where b was found.
void execute_ATOM(Step& s) {
    Machine& machine = s.machine;
    const bool shared = s.field(0, 2) == 1, red = s.field(11);
    const int operation = s.field(2, 4), type = s.field(6, 4), b = red ? 2 : 3;
    const uint32_t bytes = type == kU64 || type == kS64 ? 8 : 4;
    const auto value = [&](int k, int lane) { return bytes == 8 ? s.u64(k)[lane] : s.u32(k)[lane]; };
    s.for_each_lane([&](int lane) {
        const uint64_t at = (s.field(10) ? s.u64(0)[lane] : s.u32(0)[lane]) + static_cast<int64_t>(s.immediate(1));
        uint8_t* memory;
        if (shared) {
            const Access access{static_cast<uint32_t>(at), bytes, lane, "atomic"};
            memory = machine.shared.at(access);
            machine.shared.atomic(s.warp, access);
        } else {
            machine.global.atomic(at, bytes, lane, "atomic");
            GlobalMemory::check_aligned(at, bytes, lane, "atomic");
            memory = reinterpret_cast<uint8_t*>(at);
        }
        uint64_t old = 0;
        memcpy(&old, memory, bytes);
        const uint64_t updated =
            result(operation, type, old, value(b, lane), operation == kCas ? value(b + 1, lane) : 0);
        memcpy(memory, &updated, bytes);
        if (red) return;
        if (bytes == 8)
            s.u64(2)[lane] = old;
        else
            s.u32(2)[lane] = static_cast<uint32_t>(old);
    });
}

}  // namespace ptx
