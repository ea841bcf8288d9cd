// Products of bfloat16 pairs on AMX tiles of 16 rows by 64 bytes (Intel SDM, vol. 1, chapter 18).
#pragma once

#include <immintrin.h>

#include "operand.h"

namespace pyattn {
namespace PYATTN_ISA {

constexpr int64_t kTile = 16;  // rows of a tile, and operands in a row

// Claims this thread's tiles for the time of a task; other libraries configure them for themselves.
struct MatrixUnit {
    MatrixUnit() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        _tile_loadconfig(&config);
    }
    ~MatrixUnit() { _tile_release(); }
    MatrixUnit(const MatrixUnit&) = delete;
    MatrixUnit& operator=(const MatrixUnit&) = delete;
};

// A square of y with the depth along its rows, where it lies or turned into `scratch`.
struct Square {
    const Pair* ptr;
    int64_t bytes;  // from row to row
};
static inline Square square_of(const Pair* y, int64_t stride_c, int64_t stride_t, Pair* scratch) {
    if (stride_t == 1) return {y, stride_c * static_cast<int64_t>(sizeof(Pair))};
    Vec<Pair> row[kTile];
    for (int t = 0; t < kTile; ++t) row[t] = load(y + t * stride_t);
    transpose_square<Pair>(row);
    for (int c = 0; c < kTile; ++c) store(scratch + c * kTile, row[c]);
    return {scratch, kTile * static_cast<int64_t>(sizeof(Pair))};
}

// out[16 columns][32 lanes] += over `depth` operands, a multiple of 16; the second half of the lanes only where `two`.
static inline void add_tiles(const Pair* x, int64_t ldx, const Pair* y, int64_t stride_c, int64_t stride_t,
                             int64_t depth, float* out, int64_t ldo, bool two) {
    const auto bytes = [](int64_t ld) { return ld * static_cast<int64_t>(sizeof(float)); };
    alignas(64) Pair scratch[kTile * kTile];
    _tile_loadd(0, out, bytes(ldo));
    if (two) _tile_loadd(1, out + kTile, bytes(ldo));
    for (int64_t t = 0; t < depth; t += kTile) {
        const Square square = square_of(y + t * stride_t, stride_c, stride_t, scratch);
        _tile_loadd(2, square.ptr, square.bytes);
        _tile_loadd(3, x + t * ldx, bytes(ldx));
        _tile_dpbf16ps(0, 2, 3);
        if (two) {
            _tile_loadd(4, x + t * ldx + kTile, bytes(ldx));
            _tile_dpbf16ps(1, 2, 4);
        }
    }
    _tile_stored(0, out, bytes(ldo));
    if (two) _tile_stored(1, out + kTile, bytes(ldo));
}

}  // namespace PYATTN_ISA
}  // namespace pyattn
