// Products on matrix units, for half precision. Tiles lie whole in shared memory.
// A block's warps own 16 rows each of an operand that stays there. The other operand streams by, STREAMED rows at a
// time; while one step's rows are multiplied, those of the next STAGES - 1 are copied.
#pragma once

#include "mask.cuh"
#include "rows.cuh"

template <class T_, int HEAD, int WARPS_, int STREAMED_, int STAGES> struct Tensor {
    using T = T_;
    using Acc = float;
    static constexpr int WARPS = WARPS_, THREADS = 32 * WARPS, STREAMED = STREAMED_;
    static constexpr int OWNED = 16 * WARPS;  // rows, at most
    static constexpr int AHEAD = STAGES - 1;  // steps whose rows are on their way before the first
    static constexpr int SLICE = HEAD;        // columns of results that a block has, at most
    static constexpr int PITCH = HEAD + 8;    // 16 bytes more, so that eight rows of 16 bytes lie in different banks

    using Tile = T*;

    template <int ROWS> struct Owned {
        T* tile;
        DEVICE explicit Owned(Arena& arena) : tile(arena.take<T>(ROWS * PITCH)) {}

        DEVICE void load(const Rows<T>& rows, int start) { copy<ROWS>(tile, rows, start); }

        // By -1 or 0, what has been loaded. Takes its time: scales are rarely anything but positive.
        DEVICE void multiply_by(int sign) {
            settle();
            for (int x = thread_index(); x < ROWS * HEAD; x += THREADS) {
                T& element = tile[x / HEAD * PITCH + x % HEAD];
                round_to(element, widen(element) * sign);
            }
        }
    };

    struct Stream {
        T* tiles;
        DEVICE explicit Stream(Arena& arena) : tiles(arena.take<T>(STAGES * STREAMED * PITCH)) {}

        DEVICE void fetch(int step, const Rows<T>& rows, int start) { copy<STREAMED>(tile(step), rows, start); }
        DEVICE Tile tile(int step) const { return tiles + step % STAGES * STREAMED * PITCH; }
    };

    DEVICE explicit Tensor(Arena&) {}

    // Makes the rows of `step` ready, and has those that come AHEAD of it fetched.
    template <class Fetch> static DEVICE void advance(int step, const Fetch& fetch) {
        if constexpr (AHEAD == 0) {
            barrier();
            fetch(step);
            settle();
        } else {
            copies_wait<AHEAD - 1>();
            barrier();
            fetch(step + AHEAD);
        }
    }

    // Makes all ready that has been loaded.
    static DEVICE void settle() {
        copies_end();
        copies_wait<0>();
        barrier();
    }

    // s += the products of the warp's 16 rows of `a`, from a_row on, with the rows of `b`, from b_row on.
    template <int TILES, int ROWS>
    DEVICE void dot(float (&s)[TILES][4], const Owned<ROWS>& a, int a_row, Tile b, int b_row) const {
        const int lane = lane_index();
        const T* const row_of_a = a.tile + (a_row + lane % 16) * PITCH + lane / 16 * 8;
        const T* const row_of_b = b + (b_row + lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 8;
#pragma unroll
        for (int column = 0; column < HEAD; column += 16) {
            u32 of_a[4];
            load_matrices(of_a, row_of_a, column * sizeof(T));
#pragma unroll
            for (int j = 0; j < TILES; j += 2) {
                u32 of_b[4];
                load_matrices(of_b, row_of_b, (8 * j * PITCH + column) * sizeof(T));
                multiply<T>(s[j], of_a, of_b[0], of_b[1]);
                multiply<T>(s[j + 1], of_a, of_b[2], of_b[3]);
            }
        }
    }

    // The dot products of this lane's two rows of `a` and of `b`. By the matrix product, which sums in the order of
    // `dot`: where a row has nearly all its weight on one key, dp - delta is a difference of equals, and another order
    // would leave its rounding in the gradient.
    template <int ROWS>
    DEVICE void row_dots(float (&sums)[2], const Owned<ROWS>& a, const Owned<ROWS>& b, int row) const {
        float products[2][4] = {};
        dot(products, a, row, b.tile, row);
        const int g = lane_index() / 4;
        for (int r = 0; r < 2; ++r) {
            const float on_diagonal = g % 2 ? products[r][2 * r + 1] : products[r][2 * r];
            sums[r] = shuffle(on_diagonal, 4 * g + g / 2);
        }
    }

    // out += weights times the rows of `b`, from b_row on; all columns.
    template <int TILES, int OUT_TILES>
    DEVICE void weigh(float (&out)[OUT_TILES][4], const float (&w)[TILES][4], Tile b, int b_row,
                      int /*first_column*/) const {
        const int lane = lane_index();
        const T* const row = b + (b_row + lane % 16) * PITCH + lane / 16 * 8;
#pragma unroll
        for (int j = 0; j < TILES; j += 2) {
            // Two tiles of accumulators are, rounded, an operand's fragments.
            const u32 of_w[4] = {pack<T>(w[j][0], w[j][1]), pack<T>(w[j][2], w[j][3]),
                                 pack<T>(w[j + 1][0], w[j + 1][1]), pack<T>(w[j + 1][2], w[j + 1][3])};
#pragma unroll
            for (int i = 0; i < OUT_TILES; i += 2) {
                u32 of_b[4];
                load_transposed(of_b, row, 8 * (j * PITCH + i) * sizeof(T));
                multiply<T>(out[i], of_w, of_b[0], of_b[1]);
                multiply<T>(out[i + 1], of_w, of_b[2], of_b[3]);
            }
        }
    }

    // Makes rows of the tile that nobody sees 0.
    static DEVICE void drop_unseen(Tile tile, const SeenColumns& seen) {
        for (int row = warp_index(); row < STREAMED; row += WARPS) {
            if (seen[row]) continue;
            for (int column = lane_index(); column < HEAD; column += 32) tile[row * PITCH + column] = T{};
        }
        barrier();
    }

   private:
    template <int ROWS> static DEVICE void copy(T* tile, const Rows<T>& rows, int start) {
        constexpr int PIECES = HEAD / 8;  // of 16 bytes
        for (int x = thread_index(); x < ROWS * PIECES; x += THREADS) {
            const int row = x / PIECES, column = x % PIECES * 8;
            T* to = tile + row * PITCH + column;
            if (rows.aligned) {
                const bool has = rows.has(start + row, column);
                copy16(to, has ? rows.row(start + row) + column : rows.at, has);
            } else {
                for (int c = 0; c < 8; ++c) {
                    to[c] = rows.has(start + row, column + c) ? rows.row(start + row)[column + c] : T{};
                }
            }
        }
    }
};
