// Blackwell's tensor memory, 128 lanes of 512 columns of 32 bits, and what the tensor core has yet to do there (PTX
// ISA, "Tensor Memory", "TensorCore 5th Generation Family Instructions").
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "clock.h"
#include "fault.h"

namespace ptx {

struct Instruction;
struct Machine;

// The instruction descriptor of tcgen05.mma's kind::f16.
struct TensorShape {
    uint32_t bits;
    uint32_t rows() const { return (bits >> 24 & 31) * 16; }
    uint32_t columns() const { return (bits >> 17 & 63) * 8; }
    uint32_t format() const { return bits >> 7 & 7; }  // of A; 0: f16, 1: bf16
    bool a_mn_major() const { return bits >> 15 & 1; }
    bool b_mn_major() const { return bits >> 16 & 1; }
    void check() const {
        const uint32_t m = rows(), n = columns();
        const bool sparse = bits & 4, saturates = bits & 8, selects = bits & 3, negates = bits >> 13 & 3;
        const bool f32 = (bits >> 4 & 3) == 1, alike = (bits >> 10 & 7) == format();
        if (!f32 || format() > 1 || !alike || sparse || saturates || selects || negates || (m != 64 && m != 128) ||
            n % 8 || n == 0 || n > 256)
            fail("tcgen05 instruction descriptor %x", bits);
    }
};

struct TensorOperation {  // a tcgen05.mma or a tcgen05.commit
    const Instruction* instruction;
    int warp;
    bool commit;
    uint32_t mbarrier;  // of a commit
    Known known;        // to the thread that committed
    uint32_t last;      // of the products that it covers, by TensorOrder's numbers
    uint64_t version;   // of what a product reads in shared memory, when it was issued
    bool a_in_memory, accumulate;
    uint32_t d, a;  // addresses in tensor memory
    uint64_t a_descriptor, b_descriptor;
    TensorShape shape;
};

class TensorMemory {
  public:
    static constexpr uint32_t kLanes = 128, kColumns = 512;

    uint32_t columns = 0;  // allocated, from 0 on

    void allocate(uint32_t n) {
        columns = n;
        cells_.assign(kLanes * kColumns, 0x7fc0dead);
        written_.assign(kLanes * kColumns, false);
    }
    // The cell's place in what follows.
    uint32_t cell(uint32_t lane, uint32_t column, const char* what) const {
        if (lane >= kLanes || column >= columns)
            fail("%s of tensor memory out of bounds: lane %u, column %u of %u", what, lane, column, columns);
        return lane * kColumns + column;
    }
    bool written(uint32_t cell) const { return written_[cell]; }
    uint32_t read(uint32_t cell) const { return cells_[cell]; }
    void write(uint32_t cell, uint32_t value) { cells_[cell] = value, written_[cell] = true; }

  private:
    std::vector<uint32_t> cells_;
    std::vector<uint8_t> written_;
};

// An address holds a lane and a column. With 64 rows, every 16 are followed by 16 lanes that are not used (PTX ISA,
// "Data Path Layout Organization": layout F).
inline uint32_t lane_of(uint32_t address) { return address >> 16; }
inline uint32_t column_of(uint32_t address) { return address & 0xffff; }
inline uint32_t lane_of_row(uint32_t address, uint32_t row, uint32_t rows) {
    return lane_of(address) + (rows == 64 ? row / 16 * 32 + row % 16 : row);
}

// The next of machine.tensor_queue takes effect.
void advance_tensor_core(Machine& machine);

}  // namespace ptx
