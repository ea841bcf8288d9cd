// A warp's part of the score matrix: 16 rows and 8 columns for each of its tiles, as an m16n8 product leaves them.
// Element e of tile j in lane 4 g + t stands in row g + 8 (e / 2) and in column 8 j + 2 t + e % 2. Of such elements,
// bits of a u32 say whether they are seen or kept: element e of tile j has bit 4 j + e.
#pragma once

#include "sequence.cuh"

DEVICE int lane_index() { return thread_index() % 32; }
DEVICE int warp_index() { return thread_index() / 32; }

// Sums and maxima over the four lanes that share rows.
template <class Acc> DEVICE Acc row_sum(Acc x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}
template <class Acc> DEVICE Acc row_max(Acc x) {
    x = larger(x, shuffle_xor(x, 1));
    return larger(x, shuffle_xor(x, 2));
}

// Rows are queries and columns keys, or the other way round where a block owns keys.
template <bool KEYS_ARE_ROWS> struct Patch {
    int row[2];   // this lane's two
    int column;   // its first
    int head[2];  // of the queries: of either row, which differ where heads share a tile

    DEVICE int query(int j, int e) const { return KEYS_ARE_ROWS ? column_at(j, e) : row[e / 2]; }
    DEVICE int key(int j, int e) const { return KEYS_ARE_ROWS ? row[e / 2] : column_at(j, e); }
    DEVICE int head_of(int e) const { return head[KEYS_ARE_ROWS ? 0 : e / 2]; }

   private:
    DEVICE int column_at(int j, int e) const { return column + 8 * j + e % 2; }
};

// The patch whose first row and column are these.
template <bool KEYS_ARE_ROWS> DEVICE Patch<KEYS_ARE_ROWS> patch_at(int row, int column, int head) {
    const int first = row + lane_index() / 4;
    return {{first, first + 8}, column + lane_index() % 4 * 2, {head, head}};
}

DEVICE bool has_bit(u32 bits, int j, int e) { return bits >> (4 * j + e) & 1; }

// use(x, j, e) for every element x of the tiles, which it may change where they are not constant.
template <class X, int TILES, class Use> DEVICE void for_each(X (&tiles)[TILES][4], const Use& use) {
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) use(tiles[j][e], j, e);
    }
}
