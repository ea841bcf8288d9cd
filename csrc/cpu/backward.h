// Backward: delta first, then the gradients of q, k, v (jointly or in two passes), of the bias, and of the sinks.
// Every task owns what it writes and sums in a fixed order: the same bits on any number of threads.
#pragma once

#include "backward_tile.h"

namespace pyattn {
namespace PYATTN_ISA {

template <class T>
class Backward {
    using A = Accumulator<T>;

  public:
    static void run(const AttentionArgs& args) {
        parallel_for(args.b * args.h * query_tiles(args), args.threads, delta_scratch(args), delta_task, &args);
        if (joint(args)) {
            over(args, args.b * args.hk, joint_task, joint_scratch(args));
        } else {
            over(args, args.b * args.hk * key_tiles(args), keys_task, keys_scratch(args));
            over(args, args.b * args.h * query_tiles(args), queries_task, queries_scratch(args));
        }
        if (args.d_bias) bias_pass(args);
        if (args.d_sinks) sink_gradient(args);
    }

  private:
    static int64_t query_tiles(const AttentionArgs& args) { return (args.m + kQueries - 1) / kQueries; }
    static int64_t key_tiles(const AttentionArgs& args) { return (args.n + kKeys - 1) / kKeys; }

    // One pass per key/value head takes 5 matrix products and only b * hk tasks; two passes take 7 and keep every
    // thread busy. Both add in the same order, so the choice does not show in the result.
    static bool joint(const AttentionArgs& args) {
        const int64_t tasks = args.b * args.hk, rounds = (tasks + args.threads - 1) / args.threads;
        return 5 * rounds * args.threads <= 7 * tasks;
    }

    static int64_t tile_scratch(const AttentionArgs& args) {
        Scratch count(nullptr);
        BackwardTile<T> measure(args, count);
        return count.used();
    }
    static int64_t delta_scratch(const AttentionArgs& args) {
        return (3 * padded<A>(args.dv) + 1) * kQueries * static_cast<int64_t>(sizeof(A));
    }
    static int64_t queries_scratch(const AttentionArgs& args) {
        return padded<A>(args.d) * (kQueries + kQueries) * static_cast<int64_t>(sizeof(A));
    }
    static int64_t keys_scratch(const AttentionArgs& args) {
        return kKeys * (padded<A>(args.d) + padded<A>(args.dv)) * static_cast<int64_t>(sizeof(A));
    }
    static int64_t joint_scratch(const AttentionArgs& args) {
        const int64_t columns = padded<A>(args.d) + padded<A>(args.dv);
        return queries_scratch(args) + args.n * columns * static_cast<int64_t>(sizeof(A)) + 64;
    }

    static void over(const AttentionArgs& args, int64_t tasks, TaskBody body, int64_t extra_scratch) {
        parallel_for(tasks, args.threads, tile_scratch(args) + extra_scratch, body, &args);
    }

    // delta = sum over columns of d_out * out, per row. Summed in the order in which the product of d_out and v is, so
    // that dP - delta is exactly 0 for a query with one key.
    static void delta_task(const void* context, int64_t task, void* block) {
        const AttentionArgs& args = *static_cast<const AttentionArgs*>(context);
        const int64_t tiles = query_tiles(args), i = task % tiles * kQueries;
        const int64_t head = task / tiles % args.h, batch = task / tiles / args.h;
        const int64_t queries = smaller(kQueries, args.m - i), width = padded<A>(args.dv);
        Scratch scratch(block);
        A* rows = scratch.take<A>(kQueries * width);
        A* d_out_t = scratch.take<A>(kQueries * width);
        A* out_t = scratch.take<A>(kQueries * width);
        A* sum = scratch.take<A>(kQueries);
        columns_first(args.d_out, batch, head, i, queries, args.dv, rows, d_out_t);
        columns_first(args.out, batch, head, i, queries, args.dv, rows, out_t);
        for (int64_t lane = 0; lane < kQueries; lane += kWidth<A>) {
            Vec<A> total = {};
            for (int64_t at = lane; at < args.dv * kQueries; at += kQueries) {
                total += load(d_out_t + at) * load(out_t + at);
            }
            store(sum + lane, total);
        }
        A* delta = static_cast<A*>(args.delta) + (batch * args.h + head) * args.m + i;
        for (int64_t query = 0; query < queries; ++query) delta[query] = sum[query];
    }

    static void columns_first(const TensorArg& tensor, int64_t batch, int64_t head, int64_t i, int64_t queries,
                              int64_t columns, A* rows, A* to) {
        const Lanes<const A> from = load_rows<T>(row_pointer<T>(tensor, batch, head, i), tensor.stride[2], queries,
                                                 columns, rows, nullptr, true);
        transpose<A>(from, queries, columns, {to, kQueries}, kQueries);
    }

    // All of one key/value head: d_k and d_v gather in scratch, d_q leaves tile by tile.
    static void joint_task(const void* context, int64_t task, void* block) {
        const AttentionArgs& args = *static_cast<const AttentionArgs*>(context);
        const int64_t batch = task / args.hk, kv_head = task % args.hk, group = args.h / args.hk;
        const int64_t width = padded<A>(args.d), width_v = padded<A>(args.dv);
        Scratch scratch(block);
        BackwardTile<T> tile(args, scratch);
        A* d_q_t = scratch.take<A>(width * kQueries);
        A* d_q_rows = scratch.take<A>(width * kQueries);
        A* d_k = zeroed(scratch.take<A>(args.n * width), args.n * width);
        A* d_v = zeroed(scratch.take<A>(args.n * width_v), args.n * width_v);
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
            for (int64_t i = 0; i < args.m; i += kQueries) {
                tile.load_queries(batch, head, i);
                zeroed(d_q_t, width * kQueries);
                const Range keys = tile.keys();
                for (int64_t j = keys.begin / kKeys * kKeys; j < keys.end; j += kKeys) {
                    if (!tile.compute(j, smaller(kKeys, keys.end - j), true)) continue;
                    tile.add_key_gradients(d_k + j * width, d_v + j * width_v);
                    tile.add_query_gradient(d_q_t);
                }
                store_query_gradient(args, batch, head, i, tile.queries(), d_q_t, d_q_rows);
            }
        }
        store_key_gradients(args, batch, kv_head, 0, args.n, d_k, d_v);
    }

    // d_k and d_v of one tile of keys.
    static void keys_task(const void* context, int64_t task, void* block) {
        const AttentionArgs& args = *static_cast<const AttentionArgs*>(context);
        const int64_t tiles = key_tiles(args), j = task % tiles * kKeys, kv_head = task / tiles % args.hk;
        const int64_t batch = task / tiles / args.hk, group = args.h / args.hk;
        const int64_t width = padded<A>(args.d), width_v = padded<A>(args.dv);
        const int64_t count = smaller(kKeys, args.n - j);
        Scratch scratch(block);
        BackwardTile<T> tile(args, scratch);
        A* d_k = zeroed(scratch.take<A>(kKeys * width), kKeys * width);
        A* d_v = zeroed(scratch.take<A>(kKeys * width_v), kKeys * width_v);
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
            const Range queries = Mask<A>(args, batch, head).queries(j, count);
            for (int64_t i = queries.begin / kQueries * kQueries; i < queries.end; i += kQueries) {
                tile.load_queries(batch, head, i);
                // The same keys as the other pass takes, so that the sums over them agree.
                if (tile.compute(j, smaller(count, tile.keys().end - j), true)) tile.add_key_gradients(d_k, d_v);
            }
        }
        store_key_gradients(args, batch, kv_head, j, count, d_k, d_v);
    }

    // d_q of one tile of queries.
    static void queries_task(const void* context, int64_t task, void* block) {
        const AttentionArgs& args = *static_cast<const AttentionArgs*>(context);
        const int64_t tiles = query_tiles(args), i = (tiles - 1 - task % tiles) * kQueries;
        const int64_t head = task / tiles % args.h, batch = task / tiles / args.h, width = padded<A>(args.d);
        Scratch scratch(block);
        BackwardTile<T> tile(args, scratch);
        A* d_q_t = zeroed(scratch.take<A>(width * kQueries), width * kQueries);
        A* d_q_rows = scratch.take<A>(width * kQueries);
        tile.load_queries(batch, head, i);
        const Range keys = tile.keys();
        for (int64_t j = keys.begin / kKeys * kKeys; j < keys.end; j += kKeys) {
            if (tile.compute(j, smaller(kKeys, keys.end - j), true)) tile.add_query_gradient(d_q_t);
        }
        store_query_gradient(args, batch, head, i, tile.queries(), d_q_t, d_q_rows);
    }

    // One task per tile of the bias's own shape; it visits all that broadcasting spreads that tile over.
    static void bias_pass(const AttentionArgs& args) {
        const int64_t tiles_i = args.d_bias.size[2] == 1 ? 1 : query_tiles(args);
        const int64_t tiles_j = args.d_bias.size[3] == 1 ? 1 : key_tiles(args);
        const int64_t tasks = args.d_bias.size[0] * args.d_bias.size[1] * tiles_i * tiles_j;
        over(args, tasks, bias_task, kKeys * kQueries * static_cast<int64_t>(sizeof(A)));
    }

    static void bias_task(const void* context, int64_t task, void* block) {
        const AttentionArgs& args = *static_cast<const AttentionArgs*>(context);
        const int64_t* size = args.d_bias.size;
        const bool one_i = size[2] == 1, one_j = size[3] == 1;
        const int64_t tiles_i = one_i ? 1 : query_tiles(args), tiles_j = one_j ? 1 : key_tiles(args);
        const int64_t tile_j = task % tiles_j, tile_i = task / tiles_j % tiles_i;
        const int64_t head = task / tiles_j / tiles_i % size[1], batch = task / tiles_j / tiles_i / size[1];
        const Range heads = one_or_all(size[1], head, args.h), batches = one_or_all(size[0], batch, args.b);
        const Range is = one_i ? Range{0, args.m} : Range{tile_i * kQueries, smaller(args.m, (tile_i + 1) * kQueries)};
        const Range js = one_j ? Range{0, args.n} : Range{tile_j * kKeys, smaller(args.n, (tile_j + 1) * kKeys)};
        Scratch scratch(block);
        BackwardTile<T> tile(args, scratch);
        A* sum = zeroed(scratch.take<A>(kKeys * kQueries), kKeys * kQueries);
        for (int64_t bb = batches.begin; bb < batches.end; ++bb) {
            for (int64_t hh = heads.begin; hh < heads.end; ++hh) {
                for (int64_t i = is.begin; i < is.end; i += kQueries) add_bias_row(tile, bb, hh, i, js, sum);
            }
        }
        store_bias_gradient(args, batch, head, is.begin, js.begin, sum);
    }

    static Range one_or_all(int64_t size, int64_t index, int64_t all) {
        return size == 1 ? Range{0, all} : Range{index, index + 1};
    }

    static void add_bias_row(BackwardTile<T>& tile, int64_t batch, int64_t head, int64_t i, Range js, A* sum) {
        tile.load_queries(batch, head, i);
        const Range keys = tile.keys();
        const int64_t end = smaller(js.end, keys.end);
        for (int64_t j = larger(js.begin, keys.begin / kKeys * kKeys); j < end; j += kKeys) {
            if (tile.compute(j, smaller(kKeys, end - j), false)) tile.add_score_gradient(sum);
        }
    }

    // Folds the sum tile along broadcast dimensions, then rounds once.
    static void store_bias_gradient(const AttentionArgs& args, int64_t batch, int64_t head, int64_t i, int64_t j,
                                    A* sum) {
        const bool one_i = args.d_bias.size[2] == 1, one_j = args.d_bias.size[3] == 1;
        if (one_i) {
            for (int64_t key = 0; key < kKeys; ++key) {
                for (int64_t lane = 1; lane < kQueries; ++lane) sum[key * kQueries] += sum[key * kQueries + lane];
            }
        }
        if (one_j) {
            for (int64_t key = 1; key < kKeys; ++key) {
                for (int64_t lane = 0; lane < kQueries; ++lane) sum[lane] += sum[key * kQueries + lane];
            }
        }
        const int64_t queries = one_i ? 1 : smaller(kQueries, args.m - i);
        const int64_t keys = one_j ? 1 : smaller(kKeys, args.n - j);
        const int64_t* stride = args.d_bias.stride;
        const int64_t at = batch * stride[0] + head * stride[1] + i * stride[2] + j * stride[3];
        for (int64_t query = 0; query < queries; ++query) {
            for (int64_t key = 0; key < keys; ++key) {
                store_bias_element(args, at + query * stride[2] + key * stride[3], sum[key * kQueries + query]);
            }
        }
    }

    static void store_bias_element(const AttentionArgs& args, int64_t at, A value) {
        void* const to = args.d_bias.ptr;
        const float single = static_cast<float>(value);
        switch (args.bias_dtype) {
            case Dtype::float32: static_cast<float*>(to)[at] = single; return;
            case Dtype::bfloat16: static_cast<bfloat16*>(to)[at] = Narrow<bfloat16>::from(single); return;
            case Dtype::float16: static_cast<float16*>(to)[at] = Narrow<float16>::from(single); return;
            case Dtype::float64: static_cast<double*>(to)[at] = static_cast<double>(value); return;
        }
    }

    // The sink is one more column with dP = 0: its gradient is -sum over rows of exp(sink - lse) * (delta - d_lse).
    static void sink_gradient(const AttentionArgs& args) {
        for (int64_t head = 0; head < args.h; ++head) {
            const A sink = static_cast<const A*>(args.sinks)[head];
            double sum = 0;
            for (int64_t batch = 0; batch < args.b; ++batch) {
                const int64_t row = (batch * args.h + head) * args.m;
                const A* lse = static_cast<const A*>(args.lse) + row;
                const A* delta = static_cast<const A*>(args.delta) + row;
                const A* d_lse = args.d_lse ? static_cast<const A*>(args.d_lse) + row : nullptr;
                for (int64_t i = 0; i < args.m; ++i) {
                    if (lse[i] == -static_cast<A>(INFINITY)) continue;
                    const double d_row = d_lse ? static_cast<double>(delta[i]) - d_lse[i] : delta[i];
                    sum -= std::exp(static_cast<double>(sink) - lse[i]) * d_row;
                }
            }
            static_cast<A*>(args.d_sinks)[head] = static_cast<A>(sum);
        }
    }

    static void store_query_gradient(const AttentionArgs& args, int64_t batch, int64_t head, int64_t i, int64_t queries,
                                     const A* d_q_t, A* rows) {
        const int64_t width = padded<A>(args.d), lanes = padded<A>(queries);
        transpose<A>({d_q_t, kQueries}, args.d, lanes, {rows, width}, width);
        T* to = const_cast<T*>(row_pointer<T>(args.d_q, batch, head, i));
        store_rows<T>({rows, width}, queries, args.d, static_cast<A>(args.scale), to, args.d_q.stride[2]);
    }

    static void store_key_gradients(const AttentionArgs& args, int64_t batch, int64_t kv_head, int64_t j, int64_t count,
                                    const A* d_k, const A* d_v) {
        T* to_k = const_cast<T*>(row_pointer<T>(args.d_k, batch, kv_head, j));
        T* to_v = const_cast<T*>(row_pointer<T>(args.d_v, batch, kv_head, j));
        store_rows<T>({d_k, padded<A>(args.d)}, count, args.d, static_cast<A>(args.scale), to_k, args.d_k.stride[2]);
        store_rows<T>({d_v, padded<A>(args.dv)}, count, args.dv, A(1), to_v, args.d_v.stride[2]);
    }

    static A* zeroed(A* piece, int64_t count) {
        std::memset(piece, 0, static_cast<size_t>(count) * sizeof(A));
        return piece;
    }
};

}  // namespace PYATTN_ISA
}  // namespace pyattn
