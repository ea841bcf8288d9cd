// The one predicate of who sees whom, and what keeps a NaN that nobody sees out of sums.
#pragma once

#include "patch.cuh"

DEVICE i64 segment_id(const void* ids, bool wide, i64 at) {
    return wide ? static_cast<const i64*>(ids)[at] : static_cast<const int*>(ids)[at];
}

template <bool RICH> DEVICE bool sees(const Args& a, const Limits& l, int batch, int head, int i, int j) {
    if (i >= l.queries || j >= l.keys || j < i + l.offset - l.left || j > i + l.offset + l.right) return false;
    if constexpr (RICH) {
        if (a.q_segments) {
            const i64 q_id = segment_id(a.q_segments, a.wide_q_ids, static_cast<i64>(batch) * a.m + i);
            if (q_id != segment_id(a.k_segments, a.wide_k_ids, static_cast<i64>(batch) * a.n + j)) return false;
        }
        if (a.mask.at) {
            const i64 at = batch * a.mask.batch + head * a.mask.head + i * a.mask.query + j * a.mask.key;
            return static_cast<const u8*>(a.mask.at)[at] != 0;
        }
    }
    return true;
}

// Bits of the elements of a patch whose query sees their key.
template <int TILES, bool RICH, bool KEYS_ARE_ROWS>
DEVICE u32 visible(const Args& a, const Limits& l, int batch, const Patch<KEYS_ARE_ROWS>& patch) {
    // What reads memory is not unrolled: its addresses would take registers.
    constexpr int AT_ONCE = RICH ? 1 : TILES;
    u32 see = 0;
#pragma unroll AT_ONCE
    for (int j = 0; j < TILES; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const bool seen = sees<RICH>(a, l, batch, patch.head_of(e), patch.query(j, e), patch.key(j, e));
            see |= static_cast<u32>(seen) << (4 * j + e);
        }
    }
    return see;
}

// Whether keys may be hidden in the middle of what the band leaves: then tiles must be rid of what nobody sees, because
// a NaN there survives multiplication by a weight of 0. What lies outside the band is not even loaded.
template <bool RICH> DEVICE bool hides(const Args& a) { return RICH && (a.mask.at || a.q_segments); }

// Bits of the columns of a block's tiles that one of its rows sees, in four words of shared memory. Column x is in word
// x % 8 / 2, which is where the lane that has it adds it, at bit x / 8 * 2 + x % 2.
struct SeenColumns {
    u32* words;

    DEVICE bool operator[](int x) const { return words[x % 8 / 2] >> (x / 8 * 2 + x % 2) & 1; }

    // From every warp's elements, whose tiles are those of the block from `first_tile` on. All threads take part.
    template <int TILES> DEVICE void collect(u32 see, int first_tile) const {
        u32 columns = 0;
#pragma unroll
        for (int j = 0; j < TILES; ++j) {
            const u32 of_tile = see >> (4 * j);
            columns |= ((of_tile | of_tile >> 2) & 3) << (2 * j);
        }
        for (int by = 4; by < 32; by *= 2) columns |= shuffle_xor(columns, by);
        barrier();  // the last collection has been read
        if (thread_index() < 4) words[thread_index()] = 0;
        barrier();
        if (lane_index() < 4) atomic_or(words + lane_index(), columns << (2 * first_tile));
        barrier();
    }
};
