// ldmatrix, stmatrix and mma.sync (PTX ISA, "Warp Level Matrix Instructions"). Of 8x8 matrices of 16-bit elements, lane
// l holds (l / 4, 2 (l % 4)) and its neighbour to the right.
#include "product.h"
#include "step.h"

namespace ptx {
namespace {

struct Tile {
    uint16_t element[8][8];

    void put(const uint32_t* pairs, bool transposed) {
        for (int lane = 0; lane < kLanes; ++lane)
            for (int k = 0; k < 2; ++k) at(lane, k, transposed) = static_cast<uint16_t>(pairs[lane] >> 16 * k);
    }
    void get(uint32_t* pairs, bool transposed) {
        for (int lane = 0; lane < kLanes; ++lane)
            pairs[lane] = at(lane, 0, transposed) | static_cast<uint32_t>(at(lane, 1, transposed)) << 16;
    }

  private:
    uint16_t& at(int lane, int k, bool transposed) {
        const int row = lane / 4, column = lane % 4 * 2 + k;
        return transposed ? element[column][row] : element[row][column];
    }
};

// Operands: address, offset, registers. Lane 8 k + r has the address of row r of matrix k.
// sub: bits 0-2 how many matrices, 3: .trans, 4: the address has 64 bits
struct Rows {
    uint64_t at[kLanes];

    Rows(Step& s, const char* what) {
        s.need_all_lanes(what);
        const int count = s.field(0, 3);
        for (int lane = 0; lane < kLanes; ++lane) at[lane] = s.address(0, lane, s.field(4));
        s.machine.statistics.shared(s.machine.pc(s.i), at, count == 4 ? kAllLanes : (1u << 8 * count) - 1, 16);
    }
    Access access(int row, const char* what) const { return {static_cast<uint32_t>(at[row]), 16, kWholeWarp, what}; }
};

// D = A B + C: 16 rows a[k][row], 8 columns b[column][k]. Of D and C, lane l holds (l / 4, 2 (l % 4)), its right
// neighbour, and those 8 rows below. Operands: 4 of D, 4 of A, 2 of B, 4 of C.
void multiply(Step& s, const double (*a)[16], const double* b, int depth) {
    double sums[8][16];
    const auto element = [&](int lane, int k) -> double& {
        return sums[lane % 4 * 2 + (k & 1)][lane / 4 + (k >> 1) * 8];
    };
    for (int k = 0; k < 4; ++k)
        for (int lane = 0; lane < kLanes; ++lane) element(lane, k) = s.f32(10 + k)[lane];
    for (int column = 0; column < 8; ++column) add_products<16>(a, b + column * depth, depth, sums[column]);
    for (int k = 0; k < 4; ++k)
        for (int lane = 0; lane < kLanes; ++lane) s.f32(k)[lane] = s.machine.round_sum(element(lane, k));
}

}  // namespace

void execute_LDMATRIX(Step& s) {
    const Rows rows(s, "ldmatrix");
    for (int k = 0; k < s.field(0, 3); ++k) {
        Tile tile;
        for (int r = 0; r < 8; ++r) {
            const Access access = rows.access(8 * k + r, "ldmatrix");
            const uint8_t* from = s.machine.shared.at(access);
            s.machine.shared.read(s.warp, access);
            memcpy(tile.element[r], from, 16);
        }
        tile.get(s.u32(2 + k), s.field(3));
    }
}

void execute_STMATRIX(Step& s) {
    const Rows rows(s, "stmatrix");
    for (int k = 0; k < s.field(0, 3); ++k) {
        Tile tile;
        tile.put(s.u32(2 + k), s.field(3));
        for (int r = 0; r < 8; ++r) s.machine.shared.store(s.warp, rows.access(8 * k + r, "stmatrix"), tile.element[r]);
    }
}

// m16n8k16 of 16-bit elements. sub: 1: f16 instead of bf16
void execute_MMA(Step& s) {
    s.need_all_lanes("mma.sync");
    const bool f16 = s.i.sub;
    double a[16][16], b[8][16];
    read_fragment_a(s, 4, f16, a);
    for (int r = 0; r < 2; ++r)
        for (int lane = 0; lane < kLanes; ++lane) {
            const uint32_t pair = s.u32(8 + r)[lane];
            double* to = &b[lane / 4][lane % 4 * 2 + r * 8];
            to[0] = from_half(pair & 0xffff, f16), to[1] = from_half(pair >> 16, f16);
        }
    multiply(s, a, b[0], 16);
}

// m16n8k8 of tf32.
void execute_MMA_TF32(Step& s) {
    s.need_all_lanes("mma.sync");
    double a[8][16], b[8][8];
    for (int lane = 0; lane < kLanes; ++lane) {
        for (int r = 0; r < 4; ++r) a[lane % 4 + (r >> 1) * 4][lane / 4 + (r & 1) * 8] = from_tf32(s.u32(4 + r)[lane]);
        for (int r = 0; r < 2; ++r) b[lane / 4][lane % 4 + r * 4] = from_tf32(s.u32(8 + r)[lane]);
    }
    multiply(s, a, b[0], 8);
}

}  // namespace ptx
