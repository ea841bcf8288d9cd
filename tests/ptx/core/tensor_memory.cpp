// tcgen05 (PTX ISA, "TensorCore 5th Generation Family Instructions"): alloc, ld, st, mma kind::f16 and commit, of one
// CTA.
#include "tensor_memory.h"

#include "matrix.h"
#include "product.h"
#include "step.h"

namespace ptx {
namespace {

constexpr uint32_t kMostRows = 128, kMostColumns = 256;
constexpr uint32_t kShapeBits = ~(15u << 13);  // of an instruction descriptor: all but what negates and transposes

MatrixDescriptor decode(uint64_t bits) {
    static constexpr int kSwizzle[8] = {0, -1, 3, -1, 2, -1, 1, -1};
    const auto offset = [=](int at) { return static_cast<uint32_t>(bits >> at & 0x3fff) << 4; };
    const int swizzle = kSwizzle[bits >> 61];
    const bool version = (bits >> 46 & 7) == 1, base_offset = bits >> 49 & 7, absolute = bits >> 52 & 1;
    if (!version || base_offset || absolute || swizzle < 0)
        fail("tcgen05 descriptor %llx", static_cast<unsigned long long>(bits));
    return {offset(0), offset(16), offset(32), swizzle};
}
bool is_f16(const TensorOperation& product) { return product.shape.format() == 0; }
Matrix matrix_a(const TensorOperation& product) {
    return {decode(product.a_descriptor), product.shape.a_mn_major(), is_f16(product), "tcgen05.mma read"};
}
Matrix matrix_b(const TensorOperation& product) {
    return {decode(product.b_descriptor), product.shape.b_mn_major(), is_f16(product), "tcgen05.mma read"};
}

// Of A, two elements lie in a column.
void read_a(const Machine& machine, const TensorOperation& product, double (*a)[kMostRows]) {
    for (uint32_t row = 0; row < product.shape.rows(); ++row)
        for (int k = 0; k < kDepth; ++k) {
            const uint32_t lane = lane_of_row(product.a, row, product.shape.rows());
            const uint32_t cell = machine.tensor.cell(lane, column_of(product.a) + k / 2, "tcgen05.mma's read");
            if (!machine.tensor.written(cell)) fail("tcgen05.mma reads tensor memory that was never written");
            a[k][row] = from_half(machine.tensor.read(cell) >> 16 * (k & 1) & 0xffff, is_f16(product));
        }
}

void add_to(Machine& machine, const TensorOperation& product, uint32_t row, uint32_t column, double sum) {
    const uint32_t lane = lane_of_row(product.d, row, product.shape.rows());
    const uint32_t cell = machine.tensor.cell(lane, column_of(product.d) + column, "tcgen05.mma's write");
    if (product.accumulate) {
        if (!machine.tensor.written(cell)) fail("tcgen05.mma adds to tensor memory that was never written");
        sum += bit_cast<float>(machine.tensor.read(cell));
    }
    machine.tensor.write(cell, bit_cast<uint32_t>(machine.round_sum(sum)));
}

uint64_t version_of_sources(const Machine& machine, const TensorOperation& product) {
    const uint64_t version = matrix_b(product).version(machine.shared, 0, product.shape.columns());
    return product.a_in_memory ? version : version ^ matrix_a(product).version(machine.shared, 0, product.shape.rows());
}

TensorUse use_of(const TensorOperation& product) {
    const bool spread = product.shape.rows() == 64;  // over the first 16 lanes of every 32
    const auto lanes = [=](uint32_t address) { return (spread ? 0x55u : 0xffu) << lane_of(address) / 16 & 0xff; };
    const Region sums{lanes(product.d), column_of(product.d), product.shape.columns()};
    const Region a{lanes(product.a), column_of(product.a), product.a_in_memory ? kDepth / 2 : 0u};
    return {product.warp, sums, a, product.shape.bits & kShapeBits};
}

void compute(Machine& machine, const TensorOperation& product) {
    static thread_local double a[kDepth][kMostRows], b[kMostColumns][kDepth];
    const uint32_t rows = product.shape.rows(), columns = product.shape.columns();
    if (version_of_sources(machine, product) != product.version && machine.checks(kCheckRaces))
        fail("race: shared memory was written while a tcgen05.mma on its way reads it");
    if (product.a_in_memory)
        read_a(machine, product, a);
    else
        matrix_a(product).gather(machine.shared, 0, rows, a[0], 1, kMostRows);
    matrix_b(product).gather(machine.shared, 0, columns, b[0], kDepth, 1);
    for (uint32_t column = 0; column < columns; ++column) {
        double sums[kMostRows] = {};
        add_products<kMostRows>(a, b[column], kDepth, sums);
        for (uint32_t row = 0; row < rows; ++row) add_to(machine, product, row, column, sums[row]);
    }
}

// Operands of ld and st: address, offset, registers. sub: bits 0-7 how many, 8: .16x32bx2 instead of .32x32b, 16-: the
// columns to its second half
struct Cells {
    uint32_t lane, column, count, second;
    bool halves;
    const char* what;

    Cells(Step& s, const char* name) : what(name) {
        s.need_all_lanes(what);
        const uint32_t address = s.address(0, 0);
        for (int l = 1; l < kLanes; ++l)
            if (s.u32(0)[l] != s.u32(0)[0]) fail("lanes give different addresses of tensor memory");
        lane = lane_of(address), column = column_of(address);
        count = s.field(0, 8), halves = s.field(8), second = halves ? s.i.sub >> 16 : 0;
        if (lane / kLanes != static_cast<uint32_t>(s.warp.id % 4) || (!halves && lane % kLanes))
            fail("warp %d may not use lane %u of tensor memory", s.warp.id, lane);
        of(s.machine.tensor, 0, count - 1), of(s.machine.tensor, kLanes - 1, count - 1);  // the farthest lie inside
    }
    uint32_t of(const TensorMemory& tensor, uint32_t l, uint32_t k) const {
        if (!halves) return tensor.cell(lane + l, column + k, what);
        return tensor.cell(lane + l % 16, column + k + (l < 16 ? 0 : second), what);
    }
    // What it touches, of which the second half may be empty.
    Region region(bool second_half) const {
        if (!halves) return {3u << lane / 16, column, second_half ? 0 : count};
        return {1u << lane / 16, column + (second_half ? second : 0), count};
    }
};

void enqueue(Machine& machine, const TensorOperation& operation) {
    machine.tensor_queue.push_back(operation);
    if (machine.options.landing == kEarly) advance_tensor_core(machine);
}

}  // namespace

void advance_tensor_core(Machine& machine) {
    const TensorOperation operation = machine.tensor_queue.front();
    machine.tensor_queue.erase(machine.tensor_queue.begin());
    const Instruction* before = machine.instruction;
    machine.instruction = operation.instruction;
    if (operation.commit) {
        MBarrier& barrier = machine.mbarriers.at(operation.mbarrier);
        barrier.gathering.join(operation.known);
        machine.tensor_order.commit(operation.warp, operation.last, barrier.agent, barrier.phase + 1,
                                    barrier.gathering);
        machine.mbarriers.arrive(barrier, 1, operation.mbarrier);
        barrier.complete();
    } else {
        compute(machine, operation);
    }
    machine.instruction = before;
}

// Operands: shared address for the address, offset, columns
void execute_T5_ALLOC(Step& s) {
    s.need_all_lanes("tcgen05.alloc");
    Machine& machine = s.machine;
    const uint32_t columns = s.u32(2)[0], address = 0;
    if (columns < 32 || columns > TensorMemory::kColumns || columns & (columns - 1))
        fail("tcgen05.alloc of %u columns", columns);
    if (machine.tensor.columns) fail("a second tcgen05.alloc");
    machine.tensor.allocate(columns);
    machine.shared.store(s.warp, {s.address(0, 0), sizeof address, 0, "tcgen05.alloc"}, &address);
}
// Operands: address, columns
void execute_T5_DEALLOC(Step& s) {
    s.need_all_lanes("tcgen05.dealloc");
    Machine& machine = s.machine;
    if (s.u32(1)[0] != machine.tensor.columns || s.u32(0)[0]) fail("tcgen05.dealloc of what is not allocated");
    if (!machine.tensor_queue.empty()) fail("tcgen05.dealloc while a tcgen05.mma is on its way");
    machine.tensor.columns = 0;
}

// What was never written reads as NaN and is no fault: Triton loads the result of a product that was skipped, and drops
// it.
void execute_T5_LD(Step& s) {
    const Cells cells(s, "tcgen05.ld");
    for (int half = 0; half < 2; ++half) s.machine.tensor_order.load(s.warp, cells.region(half));
    for (uint32_t k = 0; k < cells.count; ++k) {
        for (int lane = 0; lane < kLanes; ++lane)
            s.u32(2 + k)[lane] = s.machine.tensor.read(cells.of(s.machine.tensor, lane, k));
        const int32_t r = s.operands[2 + k] / kLanes;
        s.warp.use[r] = Use::kWritten;
        s.warp.loading.push_back(r);
    }
}
void execute_T5_ST(Step& s) {
    const Cells cells(s, "tcgen05.st");
    for (int half = 0; half < 2; ++half) s.machine.tensor_order.store(s.warp, cells.region(half));
    for (uint32_t k = 0; k < cells.count; ++k)
        for (int lane = 0; lane < kLanes; ++lane)
            s.machine.tensor.write(cells.of(s.machine.tensor, lane, k), s.u32(2 + k)[lane]);
}
void execute_T5_WAIT_LD(Step& s) {
    for (int32_t r : s.warp.loading) s.warp.use[r] = Use::kFree;
    s.warp.loading.clear();
    s.machine.tensor_order.wait_loads(s.warp);
}
void execute_T5_WAIT_ST(Step& s) { s.machine.tensor_order.wait_stores(s.warp); }
void execute_T5_FENCE_BEFORE(Step& s) { s.machine.tensor_order.fence_before(s.warp); }
void execute_T5_FENCE_AFTER(Step& s) { s.machine.tensor_order.fence_after(s.warp); }

// Operands: D, offset, A or its descriptor, offset, descriptor of B, instruction descriptor, predicate: accumulate.
// sub: 1: A in tensor memory
void execute_T5_MMA(Step& s) {
    s.for_each_lane([&](int lane) {
        TensorOperation product{};
        product.instruction = &s.i;
        product.warp = s.warp.id;
        product.a_in_memory = s.i.sub & 1;
        product.accumulate = s.predicate(6) >> lane & 1;
        product.d = s.address(0, lane);
        if (product.a_in_memory)
            product.a = s.address(2, lane);
        else
            product.a_descriptor = s.u64(2)[lane];
        product.b_descriptor = s.u64(4)[lane];
        product.shape.bits = s.u32(5)[lane];
        product.shape.check();
        if (!product.a_in_memory) matrix_a(product).check(s.machine.shared, s.warp, lane, 0, product.shape.rows());
        matrix_b(product).check(s.machine.shared, s.warp, lane, 0, product.shape.columns());
        product.version = version_of_sources(s.machine, product);
        const uint32_t last_row = lane_of_row(product.d, product.shape.rows() - 1, product.shape.rows());
        s.machine.tensor.cell(last_row, column_of(product.d) + product.shape.columns() - 1, "tcgen05.mma's write");
        if (product.a_in_memory) s.machine.tensor.cell(0, column_of(product.a) + kDepth / 2 - 1, "tcgen05.mma's read");
        s.machine.tensor_order.multiply(s.warp, use_of(product));
        enqueue(s.machine, product);
    });
}
// Operands: mbarrier, offset
void execute_T5_COMMIT(Step& s) {
    s.for_each_lane([&](int lane) {
        TensorOperation commit{};
        commit.instruction = &s.i;
        commit.warp = s.warp.id;
        commit.commit = true;
        commit.mbarrier = s.address(0, lane);
        s.machine.mbarriers.at(commit.mbarrier);
        s.machine.shared.check_order(s.warp, {commit.mbarrier, 8, lane, "use of the mbarrier"});
        commit.last = s.machine.tensor_order.issued();
        s.warp.release(commit.known);
        enqueue(s.machine, commit);
    });
}

}  // namespace ptx
