// Products by plain multiply-adds, in any precision, on any GPU, for any head size; with the layout and the interface
// of tensor.cuh. Operands pass through shared memory CHUNK columns at a time, as accumulators. A block has SLICE
// columns of results, so that these fit registers; where there are more, other blocks compute the same scores again.
// Sums are those of chunks, added: they round less than one long sum.
#pragma once

#include "mask.cuh"
#include "rows.cuh"

template <class T_, int WARPS_, int STREAMED_, int SLICE_> struct Plain {
    using T = T_;
    using Acc = typename AccumulatorOf<T>::type;
    static constexpr int WARPS = WARPS_, THREADS = 32 * WARPS, STREAMED = STREAMED_, SLICE = SLICE_, AHEAD = 0;
    static constexpr int OWNED = 16 * WARPS;  // rows, at most
    static constexpr int CHUNK = 32;
    static constexpr int AT_ONCE = sizeof(Acc) == 8 ? 1 : 2;  // columns; more of them spilled registers
    static constexpr int PITCH = CHUNK + 1, WEIGHTS_PITCH = STREAMED + 1;  // odd: rows lie in different banks

    struct Tile {
        Rows<T> rows;
        int start;
        u32* seen;  // words of SeenColumns; null where every row is seen
    };

    template <int ROWS> struct Owned {
        Rows<T> rows;
        int start;
        int sign = 1;
        DEVICE explicit Owned(Arena&) {}

        DEVICE void load(const Rows<T>& of, int first) {
            rows = of;
            start = first;
        }
        DEVICE void multiply_by(int by) { sign = by; }
    };

    struct Stream {
        Tile now;
        DEVICE explicit Stream(Arena&) {}

        DEVICE void fetch(int /*step*/, const Rows<T>& rows, int start) { now = {rows, start, nullptr}; }
        DEVICE Tile tile(int /*step*/) const { return now; }
    };

    Acc *owned, *streamed;  // [OWNED, CHUNK] and [STREAMED, CHUNK]
    Acc* weights;           // [WARPS, 16, STREAMED]

    DEVICE explicit Plain(Arena& arena)
        : owned(arena.take<Acc>(OWNED * PITCH)),
          streamed(arena.take<Acc>(STREAMED * PITCH)),
          weights(arena.take<Acc>(WARPS * 16 * WEIGHTS_PITCH)) {}

    template <class Fetch> static DEVICE void advance(int step, const Fetch& fetch) { fetch(step); }
    static DEVICE void settle() {}

    template <int TILES, int ROWS>
    DEVICE void dot(Acc (&s)[TILES][4], const Owned<ROWS>& a, int a_row, const Tile& b, int b_row) const {
        const int g = lane_index() / 4, t = lane_index() % 4;
        for (int column = 0; column < a.rows.columns; column += CHUNK) {
            barrier();
            copy<ROWS>(owned, a.rows, a.start, column, a.sign);
            copy_tile(b, column);
            barrier();
            const Acc* of_a = owned + (a_row + g) * PITCH;
            Acc part[TILES][4] = {};
#pragma unroll AT_ONCE
            for (int c = 0; c < CHUNK; ++c) {
                const Acc x[2] = {of_a[c], of_a[8 * PITCH + c]};
#pragma unroll
                for (int j = 0; j < TILES; ++j) {
                    const Acc* of_b = streamed + (b_row + 8 * j + 2 * t) * PITCH + c;
#pragma unroll
                    for (int e = 0; e < 4; ++e) part[j][e] += x[e / 2] * of_b[e % 2 * PITCH];
                }
            }
            for_each(s, [&](Acc& sum, int j, int e) INLINE { sum += part[j][e]; });
        }
    }

    // In the order of `dot`, for the reason that tensor.cuh gives.
    template <int ROWS>
    DEVICE void row_dots(Acc (&sums)[2], const Owned<ROWS>& a, const Owned<ROWS>& b, int row) const {
        for (int r = 0; r < 2; ++r) {
            const int i = a.start + row + lane_index() / 4 + 8 * r;
            sums[r] = 0;
            if (i >= a.rows.last) continue;
            const T *x = a.rows.row(i), *y = b.rows.row(i);
            for (int column = 0; column < a.rows.columns; column += CHUNK) {
                Acc part = 0;
                for (int c = column; c < min(column + CHUNK, a.rows.columns); ++c) part += widen(x[c]) * widen(y[c]);
                sums[r] += part;
            }
        }
    }

    // The columns from `first_column` on.
    template <int TILES, int OUT_TILES>
    DEVICE void weigh(Acc (&out)[OUT_TILES][4], const Acc (&w)[TILES][4], const Tile& b, int b_row,
                      int first_column) const {
        const int g = lane_index() / 4, t = lane_index() % 4;
        Acc* own = weights + warp_index() * 16 * WEIGHTS_PITCH;
#pragma unroll
        for (int i = 0; i < OUT_TILES; i += CHUNK / 8) {
            barrier();
            if (i == 0) {
                for_each(w, [&](Acc x, int j, int e) INLINE {
                    own[(g + e / 2 * 8) * WEIGHTS_PITCH + 8 * j + 2 * t + e % 2] = x;
                });
            }
            copy_tile(b, first_column + 8 * i);
            barrier();
            Acc part[CHUNK / 8][4] = {};
            for (int row = 0; row < 8 * TILES; ++row) {
                const Acc x[2] = {own[g * WEIGHTS_PITCH + row], own[(g + 8) * WEIGHTS_PITCH + row]};
                const Acc* of_b = streamed + (b_row + row) * PITCH + 2 * t;
#pragma unroll
                for (int j = 0; j < CHUNK / 8; ++j) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) part[j][e] += x[e / 2] * of_b[8 * j + e % 2];
                }
            }
            for_each(part, [&](Acc x, int j, int e) INLINE { out[i + j][e] += x; });
        }
    }

    static DEVICE void drop_unseen(Tile& tile, const SeenColumns& seen) { tile.seen = seen.words; }

   private:
    template <int ROWS> static DEVICE void copy(Acc* to, const Rows<T>& rows, int start, int first_column, int sign) {
#pragma unroll 4
        for (int x = thread_index(); x < ROWS * CHUNK; x += THREADS) {
            const int row = x / CHUNK, column = first_column + x % CHUNK;
            const bool has = rows.has(start + row, column);
            to[row * PITCH + x % CHUNK] = has ? widen(rows.row(start + row)[column]) * sign : Acc(0);
        }
    }
    DEVICE void copy_tile(const Tile& tile, int first_column) const {
#pragma unroll 4
        for (int x = thread_index(); x < STREAMED * CHUNK; x += THREADS) {
            const int row = x / CHUNK, column = first_column + x % CHUNK;
            const bool has = tile.rows.has(tile.start + row, column) && (!tile.seen || SeenColumns{tile.seen}[row]);
            streamed[row * PITCH + x % CHUNK] = has ? widen(tile.rows.row(tile.start + row)[column]) : Acc(0);
        }
    }
};
