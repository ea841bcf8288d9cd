// Backward, the gradient of a bias that broadcasts: the sum of ds over all that one of its elements is added to.
// A block owns a tile of the bias's own shape and visits every tile of scores that broadcasting spreads it over, always
// in the same order. What backward_q.cuh computes of ds is computed again.
#pragma once

#include "dropout.cuh"
#include "plain.cuh"
#include "score.cuh"
#include "softmax.cuh"
#include "tensor.cuh"

enum BiasSums { SUM_BATCH = 1, SUM_HEAD = 2, SUM_QUERY = 4, SUM_KEY = 8 };

template <class F, int FLAGS> struct backward_bias {
    using T = typename F::T;
    using Acc = typename F::Acc;
    using Queries = typename F::template Owned<F::OWNED>;
    using Keys = typename F::Stream;
    static constexpr int THREADS = F::THREADS, TILES = F::STREAMED / 8;

    static DEVICE void run(const Args& a) {
        Arena arena;
        const F products(arena);
        Queries q(arena), d_out(arena);
        Keys k(arena), v(arena);
        Acc* of_warps = arena.take<Acc>(F::WARPS * F::STREAMED);

        const int blocks_m = blocks_of(a.m, F::OWNED), blocks_n = blocks_of(a.n, F::STREAMED);
        // What this block's tile is spread over, and where that begins, by axis.
        int rest = block_index();
        const Range n_blocks = share(a, SUM_KEY, blocks_n, rest), m_blocks = share(a, SUM_QUERY, blocks_m, rest);
        const Range heads = share(a, SUM_HEAD, a.h, rest), batches = share(a, SUM_BATCH, a.b, rest);
        Acc total[TILES][4] = {};
        for (int batch = batches.first; batch < batches.last; ++batch) {
            for (int head = heads.first; head < heads.last; ++head) {
                for (int block = m_blocks.first; block < m_blocks.last; ++block) {
                    barrier();  // the tiles of the last block's queries have been read
                    add_rows(a, products, q, d_out, k, v, batch, head, block * F::OWNED, n_blocks, total);
                }
            }
        }
        if (a.bias_sums & SUM_KEY) sum_keys(total);
        if (a.bias_sums & SUM_QUERY) sum_queries(total, of_warps);
        const int first_m = m_blocks.first * F::OWNED + 16 * warp_index(), first_n = n_blocks.first * F::STREAMED;
        store(a, batches.first, heads.first, patch_at<false>(first_m, first_n, 0), total);
    }

   private:
    // Takes this axis's part of a block's number: all of the axis where the bias is summed over it, else one.
    static DEVICE Range share(const Args& a, int sum, int size, int& rest) {
        if (a.bias_sums & sum) return {0, size};
        const int own = take(rest, size);
        return {own, own + 1};
    }

    // Adds the ds of a block of queries and of the blocks of keys that are given.
    static DEVICE void add_rows(const Args& a, const F& products, Queries& q, Queries& d_out, Keys& k, Keys& v,
                                int batch, int head, int first, Range blocks, Acc (&total)[TILES][4]) {
        Limits limits = {a.m, a.n, a.offset, a.left, a.right};
        if (a.key_lengths) limits.keys = min(max(a.key_lengths[batch], 0), a.n);
        const int last = min(first + F::OWNED, a.m), kv_head = head / (a.h / a.hk);
        const Range range = keys_seen(limits, first, last);
        q.load(rows_of<T>(a, a.q, batch, head, 0, {first, last}, a.d), first);
        d_out.load(rows_of<T>(a, a.d_out, batch, head, 0, {first, last}, a.dv), first);
        if (a.sign != 1) q.multiply_by(a.sign);
        const Rows<T> k_rows = rows_of<T>(a, a.k, batch, kv_head, 0, range, a.d);
        const Rows<T> v_rows = rows_of<T>(a, a.v, batch, kv_head, 0, range, a.dv);
        const auto fetch = [&](int step) INLINE {
            if (step < blocks.last - blocks.first) {
                k.fetch(step, k_rows, (blocks.first + step) * F::STREAMED);
                v.fetch(step, v_rows, (blocks.first + step) * F::STREAMED);
            }
            copies_end();
        };
        for (int step = 0; step < F::AHEAD; ++step) fetch(step);

        Patch<false> patch = patch_at<false>(first + 16 * warp_index(), blocks.first * F::STREAMED, head);
        const ScoreRule<T, true> score(a, limits, batch, batch, patch.head);
        const Acc unit = a.unit, keep_scale = a.keep_scale;
        const Dropout dropout = dropout_of<FLAGS>(a, batch);
        RowStatistics<Acc> row[2];
        read_statistics(a, limits, batch, head, patch, row);
        for (int step = 0; step < blocks.last - blocks.first; ++step, patch.column += F::STREAMED) {
            F::advance(step, fetch);
            Acc s[TILES][4] = {}, dp[TILES][4] = {};
            products.dot(s, q, 16 * warp_index(), k.tile(step), 0);
            products.dot(dp, d_out, 16 * warp_index(), v.tile(step), 0);
            const u32 see = visible<TILES, true>(a, limits, batch, patch);
            if constexpr (FLAGS & DROPOUT) {
                const u32 kept = dropout.template kept<TILES>(patch);
                for_each(dp, [&](Acc& x, int j, int e) INLINE { x = has_bit(kept, j, e) ? x * keep_scale : Acc(0); });
            }
            for_each(total, [&](Acc& sum, int j, int e) INLINE {
                if (!has_bit(see, j, e)) return;
                const Acc p_ij = exp_score(score(s[j][e], patch, j, e).value, row[e / 2].top, unit, row[e / 2].log_sum);
                sum += score_gradient(p_ij, dp[j][e], row[e / 2]);
            });
        }
    }

    static DEVICE void read_statistics(const Args& a, const Limits& limits, int batch, int head,
                                       const Patch<false>& patch, RowStatistics<Acc> (&row)[2]) {
        const i64 at = (static_cast<i64>(batch) * a.h + head) * a.m;
        for (int r = 0; r < 2; ++r) {
            const bool inside = patch.row[r] < limits.queries;
            row[r] = statistics_of<Acc>(a, at + patch.row[r], inside);
            if (inside) row[r].delta = static_cast<const Acc*>(a.delta)[at + patch.row[r]];
        }
    }

    // Leaves the sum over a row in its first column.
    static DEVICE void sum_keys(Acc (&total)[TILES][4]) {
        for (int r = 0; r < 2; ++r) {
            Acc sum = 0;
            for_each(total, [&](Acc& x, int, int e) INLINE { sum += e / 2 == r ? x : Acc(0); });
            total[0][2 * r] = row_sum(sum);
        }
    }

    // Leaves the sum over a column in the block's first row.
    static DEVICE void sum_queries(Acc (&total)[TILES][4], Acc* of_warps) {
        for_each(total, [&](Acc& x, int j, int e) INLINE {
            if (e >= 2) return;
            x += total[j][e + 2];
            for (int by = 4; by < 32; by *= 2) x += shuffle_xor(x, by);
        });
        const int first = lane_index() % 4 * 2;
        barrier();
        for_each(total, [&](Acc& x, int j, int e) INLINE {
            if (e < 2 && lane_index() < 4) of_warps[warp_index() * F::STREAMED + first + 8 * j + e] = x;
        });
        barrier();
        for_each(total, [&](Acc& x, int j, int e) INLINE {
            if (e >= 2) return;
            x = 0;
            for (int w = 0; w < F::WARPS; ++w) x += of_warps[w * F::STREAMED + first + 8 * j + e];
        });
    }

    static DEVICE void store(const Args& a, int batch, int head, const Patch<false>& patch, Acc (&total)[TILES][4]) {
        const ScoreTensor& x = a.d_bias;
        const int rows = a.bias_sums & SUM_QUERY ? 1 : a.m, columns = a.bias_sums & SUM_KEY ? 1 : a.n;
        for_each(total, [&](Acc& sum, int j, int e) INLINE {
            const int i = patch.query(j, e), key = patch.key(j, e);
            if (i >= rows || key >= columns) return;
            const i64 at = batch * x.batch + head * x.head + i * x.query + key * x.key;
            if (a.bias_is_float) round_to(static_cast<float*>(x.at)[at], sum);
            else round_to(static_cast<T*>(x.at)[at], sum);
        });
    }
};
