// ld and st (PTX ISA, "Data Movement and Conversion Instructions: ld, st"). Operands: address, offset, values.
// sub: bits 0-1 space (global, shared, parameters, local), 2-3 log2 of an element's bytes, 4-7 how many, 8 signed, 9
// the address has 64 bits, 10 the values' registers have 64 bits though the elements are smaller.
#include "step.h"

namespace ptx {
namespace {

enum Space { kGlobal, kShared, kParameters, kLocal };

struct Elements {
    Space space;
    uint32_t bytes, count;
    bool is_signed, wide_address, wide_values;

    explicit Elements(const Step& s)
        : space(static_cast<Space>(s.field(0, 2))),
          bytes(1u << s.field(2, 2)),
          count(s.field(4, 4)),
          is_signed(s.field(8)),
          wide_address(s.field(9)),
          wide_values(s.field(10)) {}

    uint32_t all() const { return bytes * count; }
};

struct Addresses {
    uint64_t of[kLanes];

    Addresses(Step& s, const Elements& e) {
        const int64_t offset = s.immediate(1);
        for (int lane = 0; lane < kLanes; ++lane)
            of[lane] = (e.wide_address ? s.u64(0)[lane] : s.u32(0)[lane]) + offset;
        if (!s.machine.statistics.on) return;
        if (e.space == kGlobal) s.machine.statistics.global(s.machine.pc(s.i), of, s.lanes, e.all());
        if (e.space == kShared) s.machine.statistics.shared(s.machine.pc(s.i), of, s.lanes, e.all());
    }
};

void load_values(Step& s, const Elements& e, int lane, const uint8_t* from) {
    for (uint32_t k = 0; k < e.count; ++k, from += e.bytes) {
        uint64_t value = 0;
        memcpy(&value, from, e.bytes);
        if (e.bytes == 8 || e.wide_values) {
            s.u64(2 + k)[lane] = value;
            continue;
        }
        if (e.is_signed && e.bytes == 1) value = static_cast<uint32_t>(static_cast<int8_t>(value));
        if (e.is_signed && e.bytes == 2) value = static_cast<uint32_t>(static_cast<int16_t>(value));
        s.u32(2 + k)[lane] = static_cast<uint32_t>(value);
    }
}
void store_values(Step& s, const Elements& e, int lane, uint8_t* to) {
    for (uint32_t k = 0; k < e.count; ++k, to += e.bytes)
        memcpy(to, e.bytes == 8 ? static_cast<void*>(&s.u64(2 + k)[lane]) : &s.u32(2 + k)[lane], e.bytes);
}

// At an offset in parameter space or, out of a register that a mov filled, at a generic address (see conversions.py).
const uint8_t* parameter(Step& s, uint64_t at, uint32_t bytes, bool in_register) {
    const uint64_t offset = in_register ? at - reinterpret_cast<uint64_t>(s.machine.parameters) : at;
    if (offset > s.machine.parameter_bytes || offset + bytes > s.machine.parameter_bytes)
        fail("parameter out of bounds");
    return s.machine.parameters + offset;
}

// Local memory is the lane's own: the frame of its kernel, from address 0 on.
uint8_t* local(Step& s, uint64_t at, uint32_t bytes, int lane, const char* what) {
    const uint32_t size = s.machine.program.local_bytes;
    if (at + bytes > size || at > size)
        fail("%s of %u bytes of local memory out of bounds, lane %d: offset %lld of %u", what, bytes, lane,
             static_cast<long long>(at), size);
    if (at & (bytes - 1))
        fail("misaligned %s of local memory, lane %d: offset %lld", what, lane, static_cast<long long>(at));
    return &s.warp.local[size_t(lane) * size + at];
}

}  // namespace

void execute_LD(Step& s) {
    const Elements e(s);
    const Addresses addresses(s, e);
    Machine& machine = s.machine;
    s.for_each_lane([&](int lane) {
        const uint64_t at = addresses.of[lane];
        const uint8_t* from;
        if (e.space == kGlobal) {
            machine.global.read(at, e.all(), lane, "read");
            GlobalMemory::check_aligned(at, e.all(), lane, "read");
            from = reinterpret_cast<const uint8_t*>(at);
        } else if (e.space == kShared) {
            const Access access{static_cast<uint32_t>(at), e.all(), lane, "read"};
            from = machine.shared.at(access);
            machine.shared.read(s.warp, access);
        } else if (e.space == kLocal) {
            from = local(s, at, e.all(), lane, "read");
        } else {
            from = parameter(s, at, e.all(), e.wide_address);
        }
        load_values(s, e, lane, from);
    });
}

void execute_ST(Step& s) {
    const Elements e(s);
    const Addresses addresses(s, e);
    Machine& machine = s.machine;
    s.for_each_lane([&](int lane) {
        const uint64_t at = addresses.of[lane];
        if (e.space == kGlobal) {
            machine.global.write(at, e.all(), lane, "write");
            GlobalMemory::check_aligned(at, e.all(), lane, "write");
            store_values(s, e, lane, reinterpret_cast<uint8_t*>(at));
        } else if (e.space == kLocal) {
            store_values(s, e, lane, local(s, at, e.all(), lane, "write"));
        } else {
            const Access access{static_cast<uint32_t>(at), e.all(), lane, "write"};
            uint8_t values[8 * 8];
            store_values(s, e, lane, values);
            machine.shared.store(s.warp, access, values);
        }
    });
}

}  // namespace ptx
