// Backward: delta first, then the gradients of q, k, v (jointly or in two passes), of the bias, and of the sinks.
// Every task owns what it writes and sums in a fixed order: the same bits on any number of threads.
#pragma once

#include "backward_tile.h"

namespace pyattn {
namespace PYATTN_ISA {

template <class T>
class Backward {
    using A = Accumulator<T>;
    using E = Operand<T>;

  public:
    static void run(const AttentionArgs& args) {
        const int64_t rows = args.b * args.h * args.m;
        const bool in_one = joint(args), later_bias = args.d_bias && !owned_bias(args), sinks = args.d_sinks;
        std::optional<Block> settled, excess, d_weights, d_relative_k;
        if (later_bias || sinks) settled.emplace(rows * static_cast<int64_t>(sizeof(A)));
        if (!in_one) excess.emplace(rows * static_cast<int64_t>(sizeof(A)));
        const int64_t parts = args.weight ? args.b * args.h * parts_of_weight(args) * args.d : 0;
        d_weights.emplace(parts * static_cast<int64_t>(sizeof(A)));
        if (parts > 0) zeroed(static_cast<A*>(d_weights->get()), parts);
        // Rows that all batch elements share are there without one, too.
        const int64_t entries = larger(args.b, args.d_relative_k ? args.d_relative_k.size[0] : 0);
        const int64_t distances = entries * args.h * args.distances * Relative<T>::columns(args);
        d_relative_k.emplace(distances * static_cast<int64_t>(sizeof(A)));
        if (distances > 0) zeroed(static_cast<A*>(d_relative_k->get()), distances);
        Call call{args,
                  longest_keys(args),
                  settled ? static_cast<A*>(settled->get()) : nullptr,
                  excess ? static_cast<A*>(excess->get()) : nullptr,
                  static_cast<A*>(d_weights->get()),
                  static_cast<A*>(d_relative_k->get())};
        over(call, Pieces::query_tiles, delta_scratch(args), delta_task);
        const int64_t tile = tile_scratch(args);
        if (in_one) {
            over(call, Pieces::kv_heads, joint_scratch(call), joint_task);
        } else {
            over(call, Pieces::query_tiles, tile + queries_scratch(args), queries_task);
            over(call, Pieces::key_tiles, tile + keys_scratch(args), keys_task);
        }
        AttentionArgs after = args;
        after.delta = call.settled;
        if (later_bias) bias_pass(after);
        if (sinks) sink_gradient(after);
        if (args.weight) weight_gradient(call);
        if (args.relative_k) distance_gradient(call);
    }

  private:
    static constexpr int kTogether = 4;  // tiles of queries

    // What d_k of a tile's key has too much of a query.
    struct Excess {
        int64_t query, key;
        A amount;
    };

    struct Call {
        const AttentionArgs& args;
        int64_t longest;
        // Of every row, by `statistic`; null where nothing reads them later.
        A* settled;  // delta as it should have been
        A* excess;  // of what products took
        A* d_weights;  // of every tile of queries
        A* d_relative_k;  // of every batch element, [b, h, distances, padded e]
        const Pieces* pieces = nullptr;
    };

    static void over(Call& call, Pieces::Kind kind, int64_t scratch, TaskBody body) {
        const Pieces pieces(call.args, kind);
        call.pieces = &pieces;
        parallel_for(pieces.count(), threads_worth(call.args), scratch, body, &call);
    }

    // One pass per key/value head takes 5 matrix products, two passes over tiles take 7 and keep any number of threads
    // busy. A thread that takes the longest head last is at worst that much behind (Graham 1966). Both ways add in the
    // same order, so the choice does not show in the result.
    static bool joint(const AttentionArgs& args) {
        if (args.relative_k) return true;  // a distance has pairs in every tile
        double all = 0, longest = 0;
        for (int64_t number = 0; number < args.sequences; ++number) {
            const Sequence sequence = sequence_of(args, number);
            const double pairs = static_cast<double>(sequence.m) * static_cast<double>(sequence.n);
            all += pairs * static_cast<double>(args.hk);
            if (pairs > longest) longest = pairs;
        }
        return 5 * (all + (threads_worth(args) - 1) * longest) <= 7 * all;
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
        const int64_t bias = owned_bias(args) ? 2 * kKeys * kQueries : 0;
        return (padded<A>(args.d) * (kQueries + kQueries) + bias) * static_cast<int64_t>(sizeof(A));
    }
    static int64_t keys_scratch(const AttentionArgs& args) {
        return kKeys * (padded<A>(args.d) + padded<A>(args.dv)) * static_cast<int64_t>(sizeof(A)) +
               kTogether * kMostHeavy<T> * kQueries * static_cast<int64_t>(sizeof(Excess));
    }
    static int64_t joint_scratch(const Call& call) {
        const int64_t columns = padded<A>(call.args.d) + padded<A>(call.args.dv);
        return kTogether * (tile_scratch(call.args) + queries_scratch(call.args)) +
               call.longest * columns * static_cast<int64_t>(sizeof(A)) + 64;
    }

    // delta = sum over columns of d_out * out, per row. Summed as gemm sums the product of d_out and v, of no more than
    // kDeepest operands: dP - delta is then exactly 0 for a query with one key.
    static void delta_task(const void* context, int64_t task, void* block) {
        const Call& call = *static_cast<const Call*>(context);
        const AttentionArgs& args = call.args;
        const Piece piece = call.pieces->piece(task);
        const Rows rows = Rows::of_head(args, sequence_of(args, piece.sequence), piece.head, piece.tile * kQueries);
        Scratch scratch(block);
        const int64_t depth = operands<E>(args.dv), width = round_up(depth, kWidth<E>);
        E* in_rows = scratch.take<E>(kQueries * width);
        E* d_out_t = scratch.take<E>(kQueries * width);
        E* out_t = scratch.take<E>(kQueries * width);
        A* sum = scratch.take<A>(kQueries);
        const int64_t lanes = padded<A>(rows.count);
        transpose<E>(rows.template load<E, T>(args.d_out, args.dv, in_rows), rows.count, depth, {d_out_t, kQueries},
                     lanes);
        transpose<E>(rows.template load<E, T>(args.out, args.dv, in_rows), rows.count, depth, {out_t, kQueries}, lanes);
        for (int64_t lane = 0; lane < lanes; lane += kWidth<A>) {
            Vec<A> total = {};
            for (int64_t at = lane; at < depth * kQueries; at += kQueries) {
                total = Product<E>::add(total, load(d_out_t + at), load(out_t + at));
            }
            store(sum + lane, total);
        }
        A* delta = static_cast<A*>(args.delta) + statistic(args, rows.sequence, piece.head, rows.query[0]);
        for (int64_t query = 0; query < rows.count; ++query) delta[query] = sum[query];
    }

    // All of one key/value head: d_k and d_v gather in scratch, d_q leaves tile by tile. Tiles of keys meet several tiles
    // of queries in turn, because what gathers is larger than a cache: d 128 and 4096 keys take 4 MB.
    static void joint_task(const void* context, int64_t task, void* block) {
        [[maybe_unused]] const MatrixUnit unit;
        const Call& call = *static_cast<const Call*>(context);
        const AttentionArgs& args = call.args;
        const Piece piece = call.pieces->piece(task);
        const Sequence sequence = sequence_of(args, piece.sequence);
        const int64_t group = args.h / args.hk, width = padded<A>(args.d), width_v = padded<A>(args.dv);
        Scratch scratch(block);
        std::optional<BackwardTile<T>> tiles[kTogether];
        A* d_q_t[kTogether];
        for (int t = 0; t < kTogether; ++t) {
            tiles[t].emplace(args, scratch);
            d_q_t[t] = scratch.take<A>(width * kQueries);
        }
        A* d_q_rows = scratch.take<A>(width * kQueries);
        A* bias_sums = scratch.take<A>(owned_bias(args) ? 2 * kKeys * kQueries : 0);
        A* d_k = zeroed(scratch.take<A>(sequence.n * width), sequence.n * width);
        A* d_v = zeroed(scratch.take<A>(sequence.n * width_v), sequence.n * width_v);
        for (int64_t head = piece.head * group; head < (piece.head + 1) * group; ++head) {
            for (int64_t i = 0; i < sequence.m; i += kTogether * kQueries) {
                const int64_t count = smaller(kTogether, (sequence.m - i + kQueries - 1) / kQueries);
                Range keys = owned_bias(args) ? Range{0, sequence.n} : Range{sequence.n, 0};
                for (int64_t t = 0; t < count; ++t) {
                    tiles[t]->load_queries(sequence, head, i + t * kQueries);
                    start_query_gradient(*tiles[t], d_q_t[t]);
                    keys = {smaller(keys.begin, tiles[t]->keys().begin), larger(keys.end, tiles[t]->keys().end)};
                }
                for (int64_t j = keys.begin / kKeys * kKeys; j < keys.end; j += kKeys) {
                    for (int64_t t = 0; t < count; ++t) {
                        const Range own = tiles[t]->keys();
                        const bool seen = own.begin < j + kKeys && j < own.end &&
                                          tiles[t]->compute(j, smaller(kKeys, own.end - j));
                        if (owned_bias(args)) {
                            store_owned_bias(*tiles[t], seen, sequence, head, i + t * kQueries, j, bias_sums);
                        }
                        if (!seen) continue;
                        tiles[t]->pass_softcap();
                        if (args.relative_k) tiles[t]->add_relative_gradients(of_distances(call, *tiles[t]));
                        if (args.weight) {
                            tiles[t]->add_additive_gradients(d_q_t[t], d_k + j * width);
                        } else {
                            tiles[t]->add_query_gradient(d_q_t[t]);
                        }
                        tiles[t]->add_key_gradients(d_k + j * width, d_v + j * width_v);
                    }
                }
                for (int64_t t = 0; t < count; ++t) {
                    finish_queries(*tiles[t], call, d_q_t[t], d_q_rows);
                    tiles[t]->each_heavy([&](const HeavyPair<A>& pair) {
                        const A excess = tiles[t]->excess(pair.lane) * pair.weight * pair.slope;
                        correct_key(*tiles[t], i + t * kQueries + pair.lane, pair.key, excess, d_k + pair.key * width);
                        if (args.relative_k) {
                            A* const d_relative_k = of_distances(call, *tiles[t]);
                            tiles[t]->relative().correct_key(pair.lane, pair.key, excess, d_relative_k);
                        }
                    });
                }
            }
        }
        store_key_gradients(args, sequence, piece.head, 0, sequence.n, d_k, d_v);
    }

    // d_k and d_v of one tile of keys.
    static void keys_task(const void* context, int64_t task, void* block) {
        [[maybe_unused]] const MatrixUnit unit;
        const Call& call = *static_cast<const Call*>(context);
        const AttentionArgs& args = call.args;
        const Piece piece = call.pieces->piece(task);
        const Sequence sequence = sequence_of(args, piece.sequence);
        const int64_t group = args.h / args.hk, width = padded<A>(args.d), width_v = padded<A>(args.dv);
        const int64_t j = piece.tile * kKeys, count = smaller(kKeys, sequence.n - j);
        Scratch scratch(block);
        BackwardTile<T> tile(args, scratch);
        A* d_k = zeroed(scratch.take<A>(kKeys * width), kKeys * width);
        A* d_v = zeroed(scratch.take<A>(kKeys * width_v), kKeys * width_v);
        Excess* const excesses = scratch.take<Excess>(kTogether * kMostHeavy<T> * kQueries);
        const Range queries = Mask<A>::queries_of(args, sequence, j, count);
        for (int64_t head = piece.head * group; head < (piece.head + 1) * group; ++head) {
            // Corrections come in where the joint pass has them, so that the sums over queries agree.
            constexpr int64_t together = kTogether * kQueries;
            for (int64_t i = queries.begin / together * together; i < queries.end; i += together) {
                const int64_t end = smaller(i + together, queries.end);
                Excess* last = excesses;
                for (int64_t t = larger(i, queries.begin / kQueries * kQueries); t < end; t += kQueries) {
                    tile.load_queries(sequence, head, t);
                    // The same keys as the other pass takes, so that the sums over them agree.
                    const Range own = tile.keys();
                    const bool seen = own.begin < j + count && j < own.end;
                    if (!seen || !tile.compute(j, smaller(count, own.end - j))) continue;
                    tile.pass_softcap();
                    if (args.weight) tile.add_additive_gradients(nullptr, d_k);
                    tile.add_key_gradients(d_k, d_v);
                    const int64_t row = statistic(args, sequence, head, t);
                    tile.each_heavy([&](const HeavyPair<A>& pair) {
                        const A amount = call.excess[row + pair.lane] * pair.weight * pair.slope;
                        *last++ = {t + pair.lane, pair.key - j, amount};
                    });
                }
                for (const Excess* at = excesses; at < last; ++at) {
                    correct_key(tile, at->query, j + at->key, at->amount, d_k + at->key * width);
                }
            }
        }
        store_key_gradients(args, sequence, piece.head, j, count, d_k, d_v);
    }

    // d_q of one tile of queries.
    static void queries_task(const void* context, int64_t task, void* block) {
        [[maybe_unused]] const MatrixUnit unit;
        const Call& call = *static_cast<const Call*>(context);
        const AttentionArgs& args = call.args;
        const Piece piece = call.pieces->piece(task);
        const Sequence sequence = sequence_of(args, piece.sequence);
        const int64_t i = (piece.tiles - 1 - piece.tile) * kQueries, width = padded<A>(args.d);
        Scratch scratch(block);
        BackwardTile<T> tile(args, scratch);
        A* d_q_t = scratch.take<A>(width * kQueries);
        A* d_q_rows = scratch.take<A>(width * kQueries);
        A* bias_sums = scratch.take<A>(owned_bias(args) ? 2 * kKeys * kQueries : 0);
        tile.load_queries(sequence, piece.head, i);
        start_query_gradient(tile, d_q_t);
        const Range own = tile.keys(), keys = owned_bias(args) ? Range{0, sequence.n} : own;
        for (int64_t j = keys.begin / kKeys * kKeys; j < keys.end; j += kKeys) {
            const bool seen =
                own.begin < j + kKeys && j < own.end && tile.compute(j, smaller(kKeys, own.end - j));
            if (owned_bias(args)) store_owned_bias(tile, seen, sequence, piece.head, i, j, bias_sums);
            if (!seen) continue;
            tile.pass_softcap();
            if (args.weight) {
                tile.add_additive_gradients(d_q_t, nullptr);
            } else {
                tile.add_query_gradient(d_q_t);
            }
        }
        finish_queries(tile, call, d_q_t, d_q_rows);
    }

    // Every element of the bias belongs to one pair of query and key, so that its gradient is a by-product.
    static bool owned_bias(const AttentionArgs& args) {
        const int64_t* size = args.d_bias.size;
        return args.d_bias && size[0] == args.b && size[1] == args.h && size[2] == args.m && size[3] == args.n;
    }
    static void store_owned_bias(const BackwardTile<T>& tile, bool seen, const Sequence& sequence, int64_t head,
                                 int64_t i, int64_t j, A* sums) {
        zeroed(sums, kKeys * kQueries);
        if (seen) tile.add_score_gradient(sums);
        store_bias_gradient(tile.args(), sequence.entry, head, i, j, sums, sums + kKeys * kQueries);
    }

    // One task per tile of the bias's own shape; it visits all that broadcasting spreads that tile over.
    static void bias_pass(const AttentionArgs& args) {
        const int64_t tiles_i = args.d_bias.size[2] == 1 ? 1 : query_tiles(args);
        const int64_t tiles_j = args.d_bias.size[3] == 1 ? 1 : key_tiles(args);
        const int64_t tasks = args.d_bias.size[0] * args.d_bias.size[1] * tiles_i * tiles_j;
        const int64_t sums = 2 * kKeys * kQueries * static_cast<int64_t>(sizeof(A));
        parallel_for(tasks, threads_worth(args), tile_scratch(args) + sums, bias_task, &args);
    }
    static int64_t query_tiles(const AttentionArgs& args) { return (args.m + kQueries - 1) / kQueries; }
    static int64_t key_tiles(const AttentionArgs& args) { return (args.n + kKeys - 1) / kKeys; }

    static void bias_task(const void* context, int64_t task, void* block) {
        [[maybe_unused]] const MatrixUnit unit;
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
                for (int64_t i = is.begin; i < is.end; i += kQueries) {
                    add_bias_row(tile, sequence_of(args, bb), hh, i, js, sum);
                }
            }
        }
        store_bias_gradient(args, batch, head, is.begin, js.begin, sum, scratch.take<A>(kKeys * kQueries));
    }

    static Range one_or_all(int64_t size, int64_t index, int64_t all) {
        return size == 1 ? Range{0, all} : Range{index, index + 1};
    }

    static void add_bias_row(BackwardTile<T>& tile, const Sequence& sequence, int64_t head, int64_t i, Range js,
                             A* sum) {
        tile.load_queries(sequence, head, i);
        const Range keys = tile.keys();
        const int64_t end = smaller(js.end, keys.end);
        for (int64_t j = larger(js.begin, keys.begin / kKeys * kKeys); j < end; j += kKeys) {
            if (tile.compute(j, smaller(kKeys, end - j))) tile.add_score_gradient(sum);
        }
    }

    // Folds the sum tile along broadcast dimensions, then rounds once.
    static void store_bias_gradient(const AttentionArgs& args, int64_t batch, int64_t head, int64_t i, int64_t j,
                                    A* sum, A* rows) {
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
        transpose<A>({sum, kQueries}, kKeys, kQueries, {rows, kKeys}, kKeys);
        const int64_t queries = one_i ? 1 : smaller(kQueries, args.m - i);
        const int64_t keys = one_j ? 1 : smaller(kKeys, args.n - j);
        with_dtype(args.bias_dtype, [&](auto element) {
            store_bias_rows<decltype(element)>(args, batch, head, i, j, queries, keys, rows);
        });
    }

    template <class B>
    static void store_bias_rows(const AttentionArgs& args, int64_t batch, int64_t head, int64_t i, int64_t j,
                                int64_t queries, int64_t keys, const A* rows) {
        const int64_t* stride = args.d_bias.stride;
        B* const to = static_cast<B*>(args.d_bias.ptr) + batch * stride[0] + head * stride[1] + j * stride[3];
        for (int64_t query = 0; query < queries; ++query) {
            B narrow[kKeys];
            store_row(rows + query * kKeys, keys, A(1), narrow);
            B* const row = to + (i + query) * stride[2];
            if (stride[3] == 1) {
                std::memcpy(row, narrow, static_cast<size_t>(keys) * sizeof(B));
            } else {
                for (int64_t key = 0; key < keys; ++key) row[key * stride[3]] = narrow[key];
            }
        }
    }

    // Tiles of queries that one head of a batch entry can have: packed sequences begin in the middle of one another's.
    static int64_t parts_of_weight(const AttentionArgs& args) { return args.m / kQueries + (args.cu_seqlens_q ? args.sequences : 0) + 1; }
    static A* part_of_weight(const Call& call, const Rows& rows) {
        const AttentionArgs& args = call.args;
        const int64_t before = args.cu_seqlens_q ? rows.sequence.q_begin / kQueries + rows.sequence.number : 0;
        const int64_t head = rows.sequence.entry * args.h + rows.head[0];
        return call.d_weights + (head * parts_of_weight(args) + before + rows.query[0] / kQueries) * args.d;
    }
    static void weight_gradient(const Call& call) {
        const AttentionArgs& args = call.args;
        const int64_t parts = parts_of_weight(args);
        for (int64_t head = 0; head < args.h; ++head) {
            A* const d_weight = zeroed(static_cast<A*>(args.d_weight) + head * args.d, args.d);
            for (int64_t part = 0; part < args.b * parts; ++part) {
                const A* from = call.d_weights + ((part / parts * args.h + head) * parts + part % parts) * args.d;
                for (int64_t c = 0; c < args.d; ++c) d_weight[c] += from[c];
            }
            for (int64_t c = 0; c < args.d; ++c) d_weight[c] *= static_cast<A>(args.scale);
        }
    }

    // The gradient's rows of the head of a tile.
    static A* of_distances(const Call& call, const BackwardTile<T>& tile) {
        const AttentionArgs& args = call.args;
        const int64_t head = tile.rows().sequence.entry * args.h + tile.rows().head[0];
        return call.d_relative_k + head * args.distances * Relative<T>::columns(args);
    }
    // Rows that batch elements share are summed over them, in their order.
    static void distance_gradient(const Call& call) {
        const AttentionArgs& args = call.args;
        const TensorArg& to = args.d_relative_k;
        const int64_t size = args.distances * Relative<T>::columns(args), shared = to.size[0] == args.b ? 1 : args.b;
        for (int64_t entry = 0; entry < to.size[0]; ++entry) {
            for (int64_t head = 0; head < args.h; ++head) {
                A* const sum = call.d_relative_k + (entry * args.h + head) * size;
                for (int64_t other = 1; other < shared; ++other) {
                    const A* const from = sum + other * args.h * size;
                    for (int64_t at = 0; at < size; ++at) sum[at] += from[at];
                }
                store_rows(sum, args.distances, args.e, static_cast<A>(args.scale),
                           static_cast<T*>(to.ptr) + entry * to.stride[0] + head * to.stride[1], to.stride[2]);
            }
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

    // What is left to do with a tile of queries that has met all its keys: d_q, and the corrections of heavy pairs. Those
    // of d_q take the whole excess of a row, that of its light keys as well, because d_q feels the sum more than its parts.
    static void finish_queries(BackwardTile<T>& tile, const Call& call, const A* d_q_t, A* d_q_rows) {
        const AttentionArgs& args = tile.args();
        const Rows& rows = tile.rows();
        const int64_t width = padded<A>(args.d);
        T* const d_q = query_row<T>(args.d_q, rows.sequence, rows.head[0], rows.query[0]);
        tile.settle(call.settled, call.excess);
        if (args.weight || tile.few()) {
            std::memcpy(d_q_rows, d_q_t, static_cast<size_t>(rows.count * width) * sizeof(A));
        } else {
            transpose<A>({d_q_t, kQueries}, args.d, padded<A>(rows.count), {d_q_rows, width}, width);
        }
        tile.each_heavy([&](const HeavyPair<A>& pair) {
            const A amount = tile.excess(pair.lane) * tile.share(pair) * pair.slope;
            correct_query(tile, rows.query[pair.lane], pair.key, amount, d_q_rows + pair.lane * width);
            if (args.relative_k) tile.relative().correct_query(pair.lane, pair.key, amount);
            if (owned_bias(args)) correct_bias(args, rows, pair, tile.score_excess(pair.lane) * pair.weight);
        });
        store_rows(d_q_rows, rows.count, args.d, static_cast<A>(args.scale), d_q, args.d_q.stride[2]);
        if (args.relative_k) tile.relative().store_queries();
        if (args.weight) {
            const A* const d_weight = tile.additive().d_weight();
            std::memcpy(part_of_weight(call, rows), d_weight, static_cast<size_t>(args.d) * sizeof(A));
        }
    }

    // Takes what a pair of the tile's head has too much of dS out of the gradient of its query or of its key. The slope of
    // q.k is the other row; that of an additive score is the same by both.
    static void correct_query(BackwardTile<T>& tile, int64_t query, int64_t key, A amount, A* d_q) {
        const AttentionArgs& args = tile.args();
        const Rows& rows = tile.rows();
        const T* const k = key_row<const T>(args, args.k, rows.sequence, rows.kv_head, key);
        if (!args.weight) return subtract(k, args.d, amount, d_q);
        const T* const q = query_row<const T>(args.q, rows.sequence, rows.head[0], query);
        tile.additive().take_out(q, k, amount, d_q, true);
    }
    static void correct_key(BackwardTile<T>& tile, int64_t query, int64_t key, A amount, A* d_k) {
        const AttentionArgs& args = tile.args();
        const Rows& rows = tile.rows();
        const T* const q = query_row<const T>(args.q, rows.sequence, rows.head[0], query);
        if (!args.weight) return subtract(q, args.d, amount, d_k);
        const T* const k = key_row<const T>(args, args.k, rows.sequence, rows.kv_head, key);
        tile.additive().take_out(q, k, amount, d_k, false);
    }

    // to -= factor * a row
    static void subtract(const T* row, int64_t columns, A factor, A* to) {
        for (int64_t c = 0; c < columns; ++c) to[c] -= factor * static_cast<A>(widen(row[c]));
    }

    static void correct_bias(const AttentionArgs& args, const Rows& rows, const HeavyPair<A>& pair, A excess) {
        with_dtype(args.bias_dtype, [&](auto element) {
            using B = decltype(element);
            B* const row = query_row<B>(args.d_bias, rows.sequence, rows.head[pair.lane], rows.query[pair.lane]);
            B* const at = row + pair.key * args.d_bias.stride[3];
            const A corrected = static_cast<A>(widen(*at)) - excess;
            store_row(&corrected, 1, A(1), at);
        });
    }

    static void store_key_gradients(const AttentionArgs& args, const Sequence& sequence, int64_t kv_head, int64_t j,
                                    int64_t count, const A* d_k, const A* d_v) {
        store_rows(d_k, count, args.d, static_cast<A>(args.scale), key_row<T>(args, args.d_k, sequence, kv_head, j),
                   args.d_k.stride[2]);
        store_rows(d_v, count, args.dv, A(1), key_row<T>(args, args.d_v, sequence, kv_head, j), args.d_v.stride[2]);
    }

    static void store_rows(const A* from, int64_t count, int64_t columns, A factor, T* to, int64_t ld) {
        for (int64_t r = 0; r < count; ++r) store_row(from + r * padded<A>(columns), columns, factor, to + r * ld);
    }

    // d_q of a tile: [column][query], or for additive scores and for few queries [query][column].
    static void start_query_gradient(const BackwardTile<T>& tile, A* d_q) {
        const int64_t columns = padded<A>(tile.args().d), lanes = padded<A>(tile.rows().count);
        if (tile.args().weight || tile.few()) {
            zeroed(d_q, tile.rows().count * columns);
            return;
        }
        for (A* column = d_q; column < d_q + columns * kQueries; column += kQueries) {
            for (int64_t lane = 0; lane < lanes; lane += kWidth<A>) store(column + lane, Vec<A>{});
        }
    }

    static A* zeroed(A* piece, int64_t count) {
        std::memset(piece, 0, static_cast<size_t>(count) * sizeof(A));
        return piece;
    }
};

}  // namespace PYATTN_ISA
}  // namespace pyattn
