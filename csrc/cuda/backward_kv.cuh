// Backward, the gradients of k and v: dk = scale ds^T q and dv = p^T d_out, in the words of backward_q.cuh.
// A block owns keys of one key/value head, 16 for each warp, and walks over the queries of the head's group that see
// them. Scores are transposed, so that p^T and ds^T are what a product's first operand must be.
#pragma once

#include "dropout.cuh"
#include "plain.cuh"
#include "score.cuh"
#include "softmax.cuh"
#include "tensor.cuh"

// Which of the two gradients a launch computes: both, where their sums fit registers.
enum Parts { PART_K = 1, PART_V = 2 };

template <class F, int FLAGS, int PARTS> struct backward_kv {
    using T = typename F::T;
    using Acc = typename F::Acc;
    using Keys = typename F::template Owned<F::OWNED>;
    using Queries = typename F::Stream;
    static constexpr int THREADS = F::THREADS, TILES = F::STREAMED / 8, OUT_TILES = F::SLICE / 8;
    static constexpr bool RICH = FLAGS & Flags::RICH, OF_K = PARTS & PART_K, OF_V = PARTS & PART_V;

    static DEVICE void run(const Args& a) {
        Place p;
        if (!locate<KEYS, F::OWNED>(a, blocks_of(max(a.d, a.dv), F::SLICE), p)) return;
        Arena arena;
        const F products(arena);
        Keys k(arena), v(arena);
        Queries q(arena), d_out(arena);
        const SeenColumns seen = {arena.take<u32>(4)};

        const int last = min(p.first + F::OWNED, p.limits.keys), group = a.h / a.hk;
        const Range own = {p.first, last}, range = queries_seeing(p.limits, p.first, last);
        const int start = start_of<F::STREAMED>(range), of_head = steps_of<F::STREAMED>(range), steps = of_head * group;
        k.load(rows_of<T>(a, a.k, p.batch, p.head, p.k_start, own, a.d), p.first);
        if (OF_K) v.load(rows_of<T>(a, a.v, p.batch, p.head, p.k_start, own, a.dv), p.first);
        if (a.sign != 1) k.multiply_by(a.sign);
        // The query heads of the group follow one another in one loop.
        const auto fetch = [&](int step) INLINE {
            if (step < steps) {
                const int head = p.head * group + step / of_head, first = start + step % of_head * F::STREAMED;
                q.fetch(step, rows_of<T>(a, a.q, p.batch, head, p.q_start, range, a.d), first);
                d_out.fetch(step, rows_of<T>(a, a.d_out, p.batch, head, p.q_start, range, a.dv), first);
            }
            copies_end();
        };
        for (int step = 0; step < F::AHEAD; ++step) fetch(step);

        const Acc unit = a.unit, keep_scale = a.keep_scale;
        const Dropout dropout = dropout_of<FLAGS>(a, p.sequence);
        Acc d_k[OUT_TILES][4] = {}, d_v[OUT_TILES][4] = {};
        for (int step = 0; step < steps; ++step) {
            F::advance(step, fetch);
            const int head = p.head * group + step / of_head, first = start + step % of_head * F::STREAMED;
            auto q_tile = q.tile(step), d_out_tile = d_out.tile(step);
            const Patch<true> patch = patch_at<true>(p.first + 16 * warp_index(), first, head);
            const ScoreRule<T, RICH> score(a, p.limits, p.batch, p.sequence, patch.head);
            Acc s[TILES][4] = {}, dp[TILES][4] = {};
            products.dot(s, k, 16 * warp_index(), q_tile, 0);
            if (OF_K) products.dot(dp, v, 16 * warp_index(), d_out_tile, 0);
            u32 see = ~0u, kept = ~0u;
            if (hides<RICH>(a) || !all_see_all(p.limits, first, first + F::STREAMED, p.first, p.first + F::OWNED)) {
                see = visible<TILES, RICH>(a, p.limits, p.batch, patch);
                if (hides<RICH>(a)) {
                    seen.template collect<TILES>(see, 0);
                    F::drop_unseen(q_tile, seen);
                    F::drop_unseen(d_out_tile, seen);
                }
            }
            if constexpr (FLAGS & DROPOUT) kept = dropout.template kept<TILES>(patch);
            RowStatistics<Acc> query[TILES][2];
            read_statistics(a, p, head, patch, query);
            for_each(s, [&](Acc& x, int j, int e) INLINE {
                const Score<Acc> of_pair = score(x, patch, j, e);
                const RowStatistics<Acc>& row = query[j][e % 2];
                const Acc p_ij = has_bit(see, j, e) ? exp_score(of_pair.value, row.top, unit, row.log_sum) : Acc(0);
                const Acc keep = !(FLAGS & DROPOUT) ? Acc(1) : has_bit(kept, j, e) ? keep_scale : Acc(0);
                x = (FLAGS & DROPOUT) && keep == 0 ? Acc(0) : p_ij * keep;
                if (!OF_K) return;
                const Acc dp_ij = (FLAGS & DROPOUT) && keep == 0 ? Acc(0) : dp[j][e] * keep;
                const Acc ds = has_bit(see, j, e) ? score_gradient(p_ij, dp_ij, row) : Acc(0);
                dp[j][e] = ds == 0 ? Acc(0) : ds * of_pair.slope;  // where a pair is not seen, the slope may be NaN
            });
            if (OF_V) products.weigh(d_v, s, d_out_tile, 0, p.slice * F::SLICE);
            if (OF_K) products.weigh(d_k, dp, q_tile, 0, p.slice * F::SLICE);
        }
        finish(a, p, d_k, d_v);
    }

   private:
    static DEVICE void read_statistics(const Args& a, const Place& p, int head, const Patch<true>& patch,
                                       RowStatistics<Acc> (&query)[TILES][2]) {
        const i64 at = (static_cast<i64>(p.batch) * a.h + head) * a.m + p.q_start;
#pragma unroll
        for (int j = 0; j < TILES; ++j) {
            for (int c = 0; c < 2; ++c) {
                const int i = patch.query(j, c);
                query[j][c] = statistics_of<Acc>(a, at + i, i < p.limits.queries);
                if (OF_K && i < p.limits.queries) query[j][c].delta = static_cast<const Acc*>(a.delta)[at + i];
            }
        }
    }

    // Keys behind key_lengths have gradients, too: their sums are 0.
    static DEVICE void finish(const Args& a, const Place& p, const Acc (&d_k)[OUT_TILES][4],
                              const Acc (&d_v)[OUT_TILES][4]) {
        const Patch<true> patch = patch_at<true>(p.first + 16 * warp_index(), 0, 0);
        const bool wanted[2] = {patch.row[0] < p.rows, patch.row[1] < p.rows};
        const Acc scale = a.scale, scales[2] = {scale, scale}, ones[2] = {1, 1};
        const int column = p.slice * F::SLICE;
        if (OF_K) store_rows<T>(a.d_k, p.batch, p.head, p.k_start, patch.row, wanted, d_k, scales, column, a.d);
        if (OF_V) store_rows<T>(a.d_v, p.batch, p.head, p.k_start, patch.row, wanted, d_v, ones, column, a.dv);
    }
};
