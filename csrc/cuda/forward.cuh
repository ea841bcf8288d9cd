// Forward: out = softmax(logits over the visible keys) v, and the log of its denominator.
// Source: arXiv:2307.08691 (FlashAttention-2), algorithm 1. A block has OWNED queries of one head; its warps share the
// keys and values that stream by.
#pragma once

#include "dropout.cuh"
#include "plain.cuh"
#include "score.cuh"
#include "softmax.cuh"
#include "tensor.cuh"

template <class F, int FLAGS> struct forward {
    using T = typename F::T;
    using Acc = typename F::Acc;
    using Queries = typename F::template Owned<F::OWNED>;
    using Keys = typename F::Stream;
    static constexpr int THREADS = F::THREADS, TILES = F::STREAMED / 8, OUT_TILES = F::SLICE / 8;
    static constexpr bool RICH = FLAGS & Flags::RICH;

    static DEVICE void run(const Args& a) {
        Place p;
        if (!locate<QUERIES, F::OWNED>(a, blocks_of(a.dv, F::SLICE), p)) return;
        Arena arena;
        const F products(arena);
        Queries q(arena);
        Keys k(arena), v(arena);
        const SeenColumns seen = {arena.take<u32>(4)};

        const int last = min(p.first + F::OWNED, p.limits.queries), kv_head = p.head / (a.h / a.hk);
        const Range range = keys_seen(p.limits, p.first, last);
        const int start = start_of<F::STREAMED>(range), steps = steps_of<F::STREAMED>(range);
        const Rows<T> k_rows = rows_of<T>(a, a.k, p.batch, kv_head, p.k_start, range, a.d);
        const Rows<T> v_rows = rows_of<T>(a, a.v, p.batch, kv_head, p.k_start, range, a.dv);
        const auto fetch = [&](int step) INLINE {
            if (step < steps) {
                k.fetch(step, k_rows, start + step * F::STREAMED);
                v.fetch(step, v_rows, start + step * F::STREAMED);
            }
            copies_end();
        };
        q.load(rows_of<T>(a, a.q, p.batch, p.head, p.q_start, {p.first, last}, a.d), p.first);
        if (a.sign != 1) q.multiply_by(a.sign);
        for (int step = 0; step < F::AHEAD; ++step) fetch(step);

        Patch<false> patch = patch_at<false>(p.first + 16 * warp_index(), start, p.head);
        const ScoreRule<T, RICH> score(a, p.limits, p.batch, p.sequence, patch.head);
        const Acc unit = a.unit;
        const Dropout dropout = dropout_of<FLAGS>(a, p.sequence);
        OnlineSoftmax<Acc> softmax;
        Acc out[OUT_TILES][4] = {};
        for (int step = 0; step < steps; ++step, patch.column += F::STREAMED) {
            F::advance(step, fetch);
            const int first_key = start + step * F::STREAMED;
            auto v_tile = v.tile(step);
            Acc s[TILES][4] = {};
            products.dot(s, q, 16 * warp_index(), k.tile(step), 0);
            for_each(s, [&](Acc& x, int j, int e) INLINE { x = score(x, patch, j, e).value; });
            const bool full = all_see_all(p.limits, p.first, last, first_key, first_key + F::STREAMED);
            if (!full || hides<RICH>(a)) {
                const u32 see = visible<TILES, RICH>(a, p.limits, p.batch, patch);
                for_each(s, [&](Acc& x, int j, int e) INLINE { x = has_bit(see, j, e) ? x : -infinity<Acc>(); });
                if (hides<RICH>(a)) {
                    seen.template collect<TILES>(see, 0);
                    F::drop_unseen(v_tile, seen);
                }
            }
            Acc rescale[2];
            softmax.step(s, unit, rescale);
            for_each(out, [&](Acc& x, int, int e) INLINE { x *= rescale[e / 2]; });
            if constexpr (FLAGS & DROPOUT) {
                const u32 kept = dropout.template kept<TILES>(patch);
                for_each(s, [&](Acc& x, int j, int e) INLINE { x = has_bit(kept, j, e) ? x : Acc(0); });
            }
            products.weigh(out, s, v_tile, 0, p.slice * F::SLICE);
        }
        finish(a, p, patch.row, softmax, out);
    }

   private:
    static DEVICE void finish(const Args& a, const Place& p, const int (&row)[2], const OnlineSoftmax<Acc>& softmax,
                              const Acc (&out)[OUT_TILES][4]) {
        const Acc* sink = a.sinks ? static_cast<const Acc*>(a.sinks) + p.head : nullptr;
        const i64 at = (static_cast<i64>(p.batch) * a.h + p.head) * a.m + p.q_start;
        Acc factor[2];
        bool wanted[2];
        for (int r = 0; r < 2; ++r) {
            const Acc sum = row_sum(softmax.sum[r]);
            const FinishedRow<Acc> end = finish_row<Acc>(softmax.largest[r], sum, sink, a.factor);
            factor[r] = end.rescale * static_cast<Acc>(a.keep_scale);
            wanted[r] = row[r] < p.limits.queries;
            if (wanted[r] && p.slice == 0 && lane_index() % 4 == 0) {
                static_cast<Acc*>(a.lse)[at + row[r]] = end.lse;
                static_cast<Acc*>(a.row_max)[at + row[r]] = end.top;
                static_cast<Acc*>(a.log_sum)[at + row[r]] = end.log_sum;
            }
        }
        store_rows<T>(a.out, p.batch, p.head, p.q_start, row, wanted, out, factor, p.slice * F::SLICE, a.dv);
    }
};
