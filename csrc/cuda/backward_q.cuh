// Backward, the gradient of q, and of a bias as large as the scores; the weights are computed again.
//
//     ds = p (dp - delta + d_lse)    dp = d_out v^T    delta_i = out_i . d_out_i    dq = scale ds k    d_bias = ds
//
// and with a softcap, ds times its slope in dq. Source: arXiv:2307.08691, algorithm 2, split so that every sum has one
// order and no atomics. Blocks are the forward's. Writes delta, too, for the other gradients.
#pragma once

#include "dropout.cuh"
#include "plain.cuh"
#include "score.cuh"
#include "softmax.cuh"
#include "tensor.cuh"

template <class F, int FLAGS> struct backward_q {
    using T = typename F::T;
    using Acc = typename F::Acc;
    using Queries = typename F::template Owned<F::OWNED>;
    using Keys = typename F::Stream;
    static constexpr int THREADS = F::THREADS, TILES = F::STREAMED / 8, OUT_TILES = F::SLICE / 8;
    static constexpr bool RICH = FLAGS & Flags::RICH;

    static DEVICE void run(const Args& a) {
        Place p;
        if (!locate<QUERIES, F::OWNED>(a, blocks_of(a.d, F::SLICE), p)) return;
        Arena arena;
        const F products(arena);
        Queries q(arena), d_out(arena);
        Keys k(arena), v(arena);
        const SeenColumns seen = {arena.take<u32>(4)};

        const int last = min(p.first + F::OWNED, p.limits.queries), kv_head = p.head / (a.h / a.hk);
        const Range own = {p.first, last}, range = keys_seen(p.limits, p.first, last);
        const int start = start_of<F::STREAMED>(range), steps = steps_of<F::STREAMED>(range);
        Patch<false> patch = patch_at<false>(p.first + 16 * warp_index(), start, p.head);
        RowStatistics<Acc> row[2];
        // The tile of q holds out until delta is known.
        d_out.load(rows_of<T>(a, a.d_out, p.batch, p.head, p.q_start, own, a.dv), p.first);
        q.load(rows_of<T>(a, a.out, p.batch, p.head, p.q_start, own, a.dv), p.first);
        F::settle();
        read_statistics(a, p, patch.row, products, d_out, q, row);
        barrier();
        q.load(rows_of<T>(a, a.q, p.batch, p.head, p.q_start, own, a.d), p.first);
        if (a.sign != 1) q.multiply_by(a.sign);

        const Rows<T> k_rows = rows_of<T>(a, a.k, p.batch, kv_head, p.k_start, range, a.d);
        const Rows<T> v_rows = rows_of<T>(a, a.v, p.batch, kv_head, p.k_start, range, a.dv);
        const auto fetch = [&](int step) INLINE {
            if (step < steps) {
                k.fetch(step, k_rows, start + step * F::STREAMED);
                v.fetch(step, v_rows, start + step * F::STREAMED);
            }
            copies_end();
        };
        for (int step = 0; step < F::AHEAD; ++step) fetch(step);

        const ScoreRule<T, RICH> score(a, p.limits, p.batch, p.sequence, patch.head);
        const Acc unit = a.unit, keep_scale = a.keep_scale;
        const Dropout dropout = dropout_of<FLAGS>(a, p.sequence);
        Acc d_q[OUT_TILES][4] = {};
        for (int step = 0; step < steps; ++step, patch.column += F::STREAMED) {
            F::advance(step, fetch);
            const int first_key = start + step * F::STREAMED;
            auto k_tile = k.tile(step);
            Acc s[TILES][4] = {}, dp[TILES][4] = {};
            products.dot(s, q, 16 * warp_index(), k_tile, 0);
            products.dot(dp, d_out, 16 * warp_index(), v.tile(step), 0);
            u32 see = ~0u;
            if (hides<RICH>(a) || !all_see_all(p.limits, p.first, last, first_key, first_key + F::STREAMED)) {
                see = visible<TILES, RICH>(a, p.limits, p.batch, patch);
                if (hides<RICH>(a)) {
                    seen.template collect<TILES>(see, 0);
                    F::drop_unseen(k_tile, seen);
                }
            }
            if constexpr (FLAGS & DROPOUT) {
                const u32 kept = dropout.template kept<TILES>(patch);
                for_each(dp, [&](Acc& x, int j, int e) INLINE { x = has_bit(kept, j, e) ? x * keep_scale : Acc(0); });
            }
            for_each(s, [&](Acc& x, int j, int e) INLINE {
                const Score<Acc> of_pair = score(x, patch, j, e);
                const Acc p_ij = exp_score(of_pair.value, row[e / 2].top, unit, row[e / 2].log_sum);
                const Acc ds = has_bit(see, j, e) ? score_gradient(p_ij, dp[j][e], row[e / 2]) : Acc(0);
                if (RICH && a.d_bias.at && p.slice == 0) store_bias(a, p, patch, j, e, ds);
                x = ds == 0 ? Acc(0) : ds * of_pair.slope;  // where a pair is not seen, the slope may be NaN
            });
            products.weigh(d_q, s, k_tile, 0, p.slice * F::SLICE);
        }
        const bool wanted[2] = {patch.row[0] < last, patch.row[1] < last};
        const Acc factor[2] = {static_cast<Acc>(a.scale), static_cast<Acc>(a.scale)};
        store_rows<T>(a.d_q, p.batch, p.head, p.q_start, patch.row, wanted, d_q, factor, p.slice * F::SLICE, a.d);
    }

   private:
    static DEVICE void read_statistics(const Args& a, const Place& p, const int (&own)[2], const F& products,
                                       const Queries& d_out, const Queries& out, RowStatistics<Acc> (&row)[2]) {
        const i64 at = (static_cast<i64>(p.batch) * a.h + p.head) * a.m + p.q_start;
        Acc delta[2];
        products.row_dots(delta, d_out, out, 16 * warp_index());
        for (int r = 0; r < 2; ++r) {
            const bool inside = own[r] < p.limits.queries;
            row[r] = statistics_of<Acc>(a, at + own[r], inside);
            row[r].delta = row[r].log_sum == infinity<Acc>() ? Acc(0) : delta[r];
            if (inside && p.slice == 0 && lane_index() % 4 == 0) static_cast<Acc*>(a.delta)[at + own[r]] = row[r].delta;
        }
    }

    // Pairs that are not seen keep the zeros that the caller laid there, or get one.
    static DEVICE void store_bias(const Args& a, const Place& p, const Patch<false>& patch, int j, int e, Acc ds) {
        const int i = patch.query(j, e), key = patch.key(j, e);
        if (i >= p.limits.queries || key >= p.limits.keys) return;
        const ScoreTensor& x = a.d_bias;
        const i64 at = p.batch * x.batch + p.head * x.head + i * x.query + key * x.key;
        if (a.bias_is_float) round_to(static_cast<float*>(x.at)[at], ds);
        else round_to(static_cast<T*>(x.at)[at], ds);
    }
};
