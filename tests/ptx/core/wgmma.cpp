// wgmma (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"): D = A B + D of 64 rows, of which each of the
// four warps of a warpgroup computes its 16. m64nNk16 of f16 or bf16, summed in float32.
#include "wgmma.h"

#include "matrix.h"
#include "product.h"
#include "step.h"

namespace ptx {
namespace {

constexpr int kRows = 16, kMostColumns = 256;

// Operands: N / 2 registers of D; 4 of A, or its descriptor; the descriptor of B; the predicate scale-d.
// sub: bits 0-8 N, 9: f16 instead of bf16, 10: A in registers, 11: A is M-major, 12: B is N-major, 13, 14: A, B negated
struct Shape {
    int columns, sums;  // N; registers of D
    bool f16, a_in_registers, a_mn_major, b_mn_major, negated;

    explicit Shape(const Instruction& i)
        : columns(i.sub & 511),
          sums(columns / 2),
          f16(i.sub >> 9 & 1),
          a_in_registers(i.sub >> 10 & 1),
          a_mn_major(i.sub >> 11 & 1),
          b_mn_major(i.sub >> 12 & 1),
          negated((i.sub >> 13 ^ i.sub >> 14) & 1) {}

    int registers() const { return sums + (a_in_registers ? 4 : 0); }
    bool sums_into(int operand) const { return operand < sums; }
};

MatrixDescriptor decode(uint64_t bits) {
    const auto offset = [=](int at) { return static_cast<uint32_t>(bits >> at & 0x3fff) << 4; };
    const int mode = static_cast<int>(bits >> 62);
    if (bits >> 49 & 7) fail("wgmma descriptor with base offset %d", static_cast<int>(bits >> 49 & 7));
    return {offset(0), offset(16), offset(32), mode ? 4 - mode : 0};
}
Matrix matrix_a(const Wgmma& product, const Shape& shape) {
    return {decode(product.a), shape.a_mn_major, shape.f16, "wgmma read"};
}
Matrix matrix_b(const Wgmma& product, const Shape& shape) {
    return {decode(product.b), shape.b_mn_major, shape.f16, "wgmma read"};
}
uint32_t first_row(const Warp& warp) { return kRows * (warp.id % 4); }

// Checks the reads of shared memory, and returns the version of what they read.
uint64_t read_sources(Machine& machine, const Warp& warp, const Wgmma& product) {
    const Shape shape(*product.instruction);
    uint64_t version = matrix_b(product, shape).check(machine.shared, warp, kWholeWarp, 0, shape.columns);
    if (!shape.a_in_registers)
        version ^= matrix_a(product, shape).check(machine.shared, warp, kWholeWarp, first_row(warp), kRows);
    return version;
}

void compute(Machine& machine, Wgmma& product) {
    if (product.done) return;
    product.done = true;
    Step s(machine, *product.instruction, kAllLanes);
    const Shape shape(s.i);
    double a[kDepth][kRows];
    static thread_local double b[kMostColumns][kDepth];
    if (shape.a_in_registers)
        read_fragment_a(s, shape.sums, shape.f16, a);
    else
        matrix_a(product, shape).gather(machine.shared, first_row(s.warp), kRows, a[0], 1, kRows);
    matrix_b(product, shape).gather(machine.shared, 0, shape.columns, b[0], kDepth, 1);
    for (int column = 0; column < shape.columns; ++column) {
        double sums[kRows] = {};
        add_products<kRows>(a, b[column], kDepth, sums);
        for (int row = 0; row < kRows; ++row) {
            // The fragment of D: PTX ISA, "Matrix Fragments for wgmma.mma_async.m64nNk16".
            float& d = s.f32(column / 8 * 4 + row / 8 * 2 + column % 2)[row % 8 * 4 + column % 8 / 2];
            const double sum = shape.negated ? -sums[row] : sums[row];
            d = machine.round_sum(product.accumulate ? d + sum : sum);
        }
    }
}

// Registers are in flight, or no more.
void mark(const Step& s, const Wgmma& product, bool in_flight) {
    const Shape shape(*product.instruction);
    const int32_t* operands = s.machine.program.operands.data() + product.instruction->first;
    for (int k = 0; k < shape.registers(); ++k) {
        Use& use = s.warp.use[operands[k] / kLanes];
        use = !in_flight ? Use::kFree : shape.sums_into(k) ? Use::kWritten : std::max(use, Use::kRead);
    }
}

// Where wgmma.fence must stand (PTX ISA, "wgmma.fence"): before the first wgmma, and between an access to a register
// and a wgmma that uses it, but for wgmmas of one shape that sum into it one after another. Between the write of A's
// fragments and their use, LLVM moves writes behind the fence, and ptxas puts its own (WARPGROUP.ARRIVE) where one is
// needed: an option.
void check_registers(const Step& s, const Shape& shape) {
    const Warp& warp = s.warp;
    if (warp.epoch == kFirstEpoch) fail("wgmma: no wgmma.fence before the first one");
    for (int k = 0; k < shape.registers(); ++k) {
        const int r = s.operands[k] / kLanes;
        if (!shape.sums_into(k)) {
            if (warp.written[r] == warp.epoch && s.machine.checks(kCheckFragments))
                fail("wgmma: no wgmma.fence after the write of a register that it multiplies");
            if (warp.use[r] == Use::kWritten) fail("wgmma: multiplies a register that another one is writing");
            continue;
        }
        if (warp.accessed[r] == warp.epoch)
            fail("wgmma: no wgmma.fence after the %s of a register that it sums into",
                 warp.written[r] == warp.epoch ? "write" : "read");
        if (warp.summed[r].epoch == warp.epoch && warp.summed[r].columns != shape.columns)
            fail("wgmma: no wgmma.fence after one of another shape that sums into the same register");
        if (warp.use[r] == Use::kRead) fail("wgmma: sums into a register that another one multiplies");
    }
}

}  // namespace

void execute_WGMMA(Step& s) {
    Machine& machine = s.machine;
    s.need_all_lanes("wgmma");
    if (machine.threads < 4 * kLanes) fail("wgmma needs a warpgroup");
    const Shape shape(s.i);
    const int b = shape.sums + (shape.a_in_registers ? 4 : 1);
    const uint32_t scale = s.predicate(b + 1);
    if (scale != 0 && scale != kAllLanes) fail("wgmma's scale-d differs between lanes");
    if (machine.checks(kCheckRegisters)) check_registers(s, shape);
    Wgmma product{&s.i, shape.a_in_registers ? 0 : s.u64(b - 1)[0], s.u64(b)[0], scale != 0, false, 0};
    product.version = read_sources(machine, s.warp, product);
    // The sums of one that still waits come first.
    if (machine.options.landing == kEarly || (s.warp.products.empty() && machine.lands_at_once()))
        compute(machine, product);
    mark(s, product, true);
    for (int k = 0; k < shape.sums; ++k) s.warp.summed[s.operands[k] / kLanes] = {s.warp.epoch, shape.columns};
    s.warp.products.open.push_back(product);
}

void execute_WGMMA_FENCE(Step& s) { ++s.warp.epoch; }
void execute_WGMMA_COMMIT(Step& s) { s.warp.products.commit(); }

// sub: how many groups may be pending
void execute_WGMMA_WAIT(Step& s) {
    s.warp.products.complete_all_but(s.i.sub, [&](Wgmma& product) {
        const Instruction* before = s.machine.instruction;
        s.machine.instruction = product.instruction;
        if (read_sources(s.machine, s.warp, product) != product.version && s.machine.checks(kCheckRaces))
            fail("race: shared memory was written while a wgmma that was not waited for reads it");
        compute(s.machine, product);
        mark(s, product, false);
        s.machine.instruction = before;
    });
    s.warp.products.for_each([&](const Wgmma& product) { mark(s, product, true); });
}

}  // namespace ptx
