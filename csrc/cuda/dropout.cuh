// Which weights dropout keeps: Philox on the absolute position, one call for each lane and tile. Four keys in a row
// share a call, so lanes draw for one another.
#pragma once

#include "args.cuh"
#include "patch.cuh"
#include "philox.h"

struct Dropout {
    u64 seed;
    u32 threshold, sequence;

    // Bit w: whether key 4 (key / 4) + w is kept.
    DEVICE u32 draw(int key, int query, int head) const {
        u32 words[4] = {static_cast<u32>(key) / 4, static_cast<u32>(query), static_cast<u32>(head), sequence};
        philox(seed, words);
        u32 kept = 0;
        for (int w = 0; w < 4; ++w) kept |= static_cast<u32>(words[w] >= threshold) << w;
        return kept;
    }

    // Bits of the elements that are kept.
    template <int TILES> DEVICE u32 kept(const Patch<false>& patch) const {
        // A lane's two keys are half of a call's; its neighbour has the other half, in the same two rows.
        const int odd = lane_index() % 2;
        u32 bits = 0;
#pragma unroll 2
        for (int j = 0; j < TILES; ++j) {
            const u32 mine = draw(patch.key(j, 0), odd ? patch.row[1] : patch.row[0], patch.head[0]);
            const u32 other = shuffle_xor(mine, 1);
            const u32 of_rows[2] = {odd ? other : mine, odd ? mine : other};
            for (int r = 0; r < 2; ++r) bits |= (of_rows[r] >> (2 * odd) & 3) << (4 * j + 2 * r);
        }
        return bits;
    }

    template <int TILES> DEVICE u32 kept(const Patch<true>& patch) const {
        // Four lanes have a call's keys, in four elements each: every one of them draws for one of these.
        const int share = lane_index() / 4 % 4;
        u32 bits = 0;
#pragma unroll 2
        for (int j = 0; j < TILES; ++j) {
            const int key = share / 2 ? patch.row[1] : patch.row[0];
            const u32 mine = draw(key, patch.query(j, share % 2), patch.head[0]);
            for (int e = 0; e < 4; ++e) {
                const u32 drawn = shuffle(mine, (lane_index() & ~12) | e << 2);
                bits |= (drawn >> share & 1) << (4 * j + e);
            }
        }
        return bits;
    }
};

// Of a kernel with these flags; without the one of dropout nothing is read of it.
template <int FLAGS> DEVICE Dropout dropout_of(const Args& a, int sequence) {
    Dropout dropout = {0, a.threshold, static_cast<u32>(sequence)};
    if constexpr (FLAGS & Flags::DROPOUT) dropout.seed = *a.seed;
    return dropout;
}
