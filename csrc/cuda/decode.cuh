// Attention of few queries over many keys, and over caches of keys, paged ones too.
// The query heads of a group share tiles of 16 rows, query after query, so that their keys and values are read once.
// Keys are split: between the warps of a block, and into chunks for several blocks, so that a batch of one fills the
// GPU. A second kernel joins the chunks of a row.
// Sources: Flash-Decoding (Dao, Haziza, Massa, Sizov 2023); pages, Kwon et al. 2023, arXiv:2309.06180.
#pragma once

#include "plain.cuh"
#include "score.cuh"
#include "softmax.cuh"
#include "tensor.cuh"

template <class F, int FLAGS> struct decode {
    using T = typename F::T;
    using Acc = typename F::Acc;
    using Queries = typename F::template Owned<16>;
    using Keys = typename F::Stream;
    static constexpr int THREADS = F::THREADS, OUT_TILES = F::SLICE / 8;
    static constexpr int KEYS_OF_WARP = F::STREAMED / F::WARPS, TILES = KEYS_OF_WARP / 8;
    static constexpr bool RICH = FLAGS & Flags::RICH;
    static constexpr int JOINED_PITCH = F::SLICE + 8;  // 8 more, so that rows begin in other banks

    struct Chunk {
        int number, slice, kv_head, batch;
        int group, first_row;  // of the group's heads times queries
        Limits limits;
        Range keys;
    };

    static DEVICE void run(const Args& a) {
        const Chunk c = find(a);
        Arena arena;
        const F products(arena);
        Queries q(arena);
        Keys k(arena), v(arena);
        const SeenColumns seen = {arena.take<u32>(4)};
        Acc *tops = arena.take<Acc>(16 * F::WARPS), *sums = arena.take<Acc>(16 * F::WARPS);
        Acc* joined = arena.take<Acc>(16 * JOINED_PITCH);

        const int start = start_of<F::STREAMED>(c.keys), steps = steps_of<F::STREAMED>(c.keys);
        const Rows<T> k_rows = cache_rows_of<T>(a, a.k, c.batch, c.kv_head, c.keys, a.d);
        const Rows<T> v_rows = cache_rows_of<T>(a, a.v, c.batch, c.kv_head, c.keys, a.dv);
        const auto fetch = [&](int step) INLINE {
            if (step < steps) {
                k.fetch(step, k_rows, start + step * F::STREAMED);
                v.fetch(step, v_rows, start + step * F::STREAMED);
            }
            copies_end();
        };
        q.load(group_rows_of<T>(a, a.q, c.batch, c.kv_head * c.group, c.group, a.d), c.first_row);
        if (a.sign != 1) q.multiply_by(a.sign);
        for (int step = 0; step < F::AHEAD; ++step) fetch(step);

        const int own = KEYS_OF_WARP * warp_index();
        Patch<false> patch = patch_of_group(a, c, start + own);
        const ScoreRule<T, RICH> score(a, c.limits, c.batch, c.batch, patch.head);
        const Acc unit = a.unit;
        OnlineSoftmax<Acc> softmax;
        Acc out[OUT_TILES][4] = {};
        for (int step = 0; step < steps; ++step, patch.column += F::STREAMED) {
            F::advance(step, fetch);
            auto v_tile = v.tile(step);
            Acc s[TILES][4] = {};
            products.dot(s, q, 0, k.tile(step), own);
            for_each(s, [&](Acc& x, int j, int e) INLINE { x = score(x, patch, j, e).value; });
            u32 see = visible<TILES, RICH>(a, c.limits, c.batch, patch);
            for_each(s, [&](Acc& x, int j, int e) INLINE {
                const bool in_chunk = patch.key(j, e) >= c.keys.first && patch.key(j, e) < c.keys.last;
                x = in_chunk && has_bit(see, j, e) ? x : -infinity<Acc>();
            });
            if (hides<RICH>(a)) {
                seen.template collect<TILES>(see, own / 8);
                F::drop_unseen(v_tile, seen);
            }
            Acc rescale[2];
            softmax.step(s, unit, rescale);
            for_each(out, [&](Acc& x, int, int e) INLINE { x *= rescale[e / 2]; });
            products.weigh(out, s, v_tile, own, c.slice * F::SLICE);
        }
        join_warps(softmax, out, unit, tops, sums, joined);
        store(a, c, tops, sums, joined);
    }

   private:
    static DEVICE Chunk find(const Args& a) {
        Chunk c;
        const int slices = blocks_of(a.dv, F::SLICE);
        c.group = a.h / a.hk;
        const int tiles = blocks_of(c.group * a.m, 16);
        int rest = block_index();
        c.slice = take(rest, slices);
        c.number = take(rest, a.chunks);
        c.first_row = take(rest, tiles) * 16;
        c.kv_head = take(rest, a.hk);
        c.batch = rest;
        c.limits = {a.m, a.n, a.offset, a.left, a.right};
        if (a.key_lengths) c.limits.keys = min(max(a.key_lengths[c.batch], 0), a.n);
        if (a.cached) c.limits.offset = c.limits.keys - a.m;
        const int last_row = min(c.first_row + 16, c.group * a.m);
        c.keys = keys_seen(c.limits, c.first_row / c.group, blocks_of(last_row, c.group));
        const int start = start_of<F::STREAMED>(c.keys);
        const int share = blocks_of(steps_of<F::STREAMED>(c.keys), a.chunks) * F::STREAMED;
        c.keys = {max(c.keys.first, start + c.number * share), min(c.keys.last, start + (c.number + 1) * share)};
        return c;
    }

    // Rows past the group's stand at query m, which sees nothing.
    static DEVICE Patch<false> patch_of_group(const Args& a, const Chunk& c, int column) {
        Patch<false> patch = patch_at<false>(c.first_row, column, 0);
        for (int r = 0; r < 2; ++r) {
            const bool used = patch.row[r] < c.group * a.m;
            patch.head[r] = c.kv_head * c.group + (used ? patch.row[r] % c.group : 0);
            patch.row[r] = used ? patch.row[r] / c.group : a.m;
        }
        return patch;
    }

    // Adds up what the warps have accumulated of the same rows, one after the other. Leaves each row's largest score
    // and sum in the first 16 of `tops` and `sums`, and the rows themselves in `joined` [16, SLICE].
    static DEVICE void join_warps(const OnlineSoftmax<Acc>& softmax, Acc (&out)[OUT_TILES][4], Acc unit, Acc* tops,
                                  Acc* sums, Acc* joined) {
        const int g = lane_index() / 4, t = lane_index() % 4;
        Acc rescale[2], top[2], sum[2];
        for (int r = 0; r < 2; ++r) {
            sum[r] = row_sum(softmax.sum[r]);
            if (t == 0) tops[16 * warp_index() + g + 8 * r] = softmax.largest[r];
        }
        barrier();
        for (int r = 0; r < 2; ++r) {
            top[r] = tops[g + 8 * r];
            for (int w = 1; w < F::WARPS; ++w) top[r] = larger(top[r], tops[16 * w + g + 8 * r]);
            rescale[r] = exp_score(softmax.largest[r], subtracted(top[r]), unit);
            if (t == 0) sums[16 * warp_index() + g + 8 * r] = sum[r] * rescale[r];
        }
        for_each(out, [&](Acc& x, int, int e) INLINE { x *= rescale[e / 2]; });
        for (int w = 0; w < F::WARPS; ++w) {
            barrier();
            if (w != warp_index()) continue;
            for_each(out, [&](Acc& x, int j, int e) INLINE {
                Acc& total = joined[(g + e / 2 * 8) * JOINED_PITCH + 8 * j + 2 * t + e % 2];
                total = w == 0 ? x : total + x;
            });
        }
        barrier();
        if (warp_index() == 0 && t == 0) {
            for (int r = 0; r < 2; ++r) {
                Acc total = 0;
                for (int w = 0; w < F::WARPS; ++w) total += sums[16 * w + g + 8 * r];
                tops[g + 8 * r] = top[r];
                sums[g + 8 * r] = total;
            }
        }
        barrier();
    }

    static DEVICE void store(const Args& a, const Chunk& c, const Acc* tops, const Acc* sums, const Acc* joined) {
        const int rows = min(16, c.group * a.m - c.first_row), first_column = c.slice * F::SLICE;
        const auto at = [&](int row) INLINE {
            const int head = c.kv_head * c.group + (c.first_row + row) % c.group;
            return ((static_cast<i64>(c.number) * a.b + c.batch) * a.h + head) * a.m + (c.first_row + row) / c.group;
        };
        const int columns = min(F::SLICE, a.dv - first_column);
        for (int x = thread_index(); x < rows * columns; x += THREADS) {
            const int row = x / columns, column = x % columns;
            static_cast<Acc*>(a.part)[at(row) * a.dv + first_column + column] = joined[row * JOINED_PITCH + column];
        }
        if (c.slice == 0 && thread_index() < rows) {
            static_cast<Acc*>(a.part_max)[at(thread_index())] = tops[thread_index()];
            static_cast<Acc*>(a.part_sum)[at(thread_index())] = sums[thread_index()];
        }
    }
};

// Joins the chunks of a row: one block for each row of [b, h, m].
template <class T> struct decode_join {
    using Acc = typename AccumulatorOf<T>::type;
    static constexpr int THREADS = 128;

    static DEVICE void run(const Args& a) {
        const int row = block_index(), i = row % a.m, head = row / a.m % a.h, batch = row / a.m / a.h;
        const i64 rows = static_cast<i64>(a.b) * a.h * a.m;
        const Acc *part_max = static_cast<const Acc*>(a.part_max), *part_sum = static_cast<const Acc*>(a.part_sum);
        const Acc* part = static_cast<const Acc*>(a.part);
        const Acc unit = a.unit;
        Acc largest = -infinity<Acc>(), sum = 0;
        for (int c = 0; c < a.chunks; ++c) largest = larger(largest, part_max[c * rows + row]);
        const auto weight = [&](int c) INLINE {
            return exp_score(part_max[c * rows + row], subtracted(largest), unit);
        };
        for (int c = 0; c < a.chunks; ++c) sum += weight(c) * part_sum[c * rows + row];
        const Acc* sink = a.sinks ? static_cast<const Acc*>(a.sinks) + head : nullptr;
        const FinishedRow<Acc> end = finish_row<Acc>(largest, sum, sink, a.factor);
        T* out = static_cast<T*>(a.out.at) + batch * a.out.batch + head * a.out.head + i * a.out.row;
        for (int column = thread_index(); column < a.dv; column += THREADS) {
            Acc total = 0;
            for (int c = 0; c < a.chunks; ++c) total += weight(c) * part[(c * rows + row) * a.dv + column];
            round_to(out[column], total * end.rescale);
        }
        if (thread_index() == 0) {
            static_cast<Acc*>(a.lse)[row] = end.lse;
            static_cast<Acc*>(a.row_max)[row] = end.top;
            static_cast<Acc*>(a.log_sum)[row] = end.log_sum;
        }
    }
};
