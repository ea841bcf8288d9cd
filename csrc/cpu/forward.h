// Forward: one task per tile of queries and chunk of keys, online softmax over tiles of keys.
// Source: Dao, "FlashAttention-2", arXiv:2307.08691, Algorithm 1; the chunks as in Flash-Decoding (Dao et al. 2023).
#pragma once

#include "additive.h"
#include "dropout.h"
#include "parallel.h"
#include "relative.h"
#include "score.h"

namespace pyattn {
namespace PYATTN_ISA {

template <class T>
class Forward {
    using A = Accumulator<T>;
    using E = Operand<T>;
    static constexpr int W = kWidth<A>;
    static constexpr int kAtOnce = 16;  // weights that are summed before their sum is

  public:
    static void run(const AttentionArgs& args) {
        const Pieces pieces(args, Pieces::rows);
        const Chunks chunks = chunks_of(args, pieces.count());
        const int threads = threads_worth(args);
        Scratch count(nullptr);
        const Forward measure(args, count);
        const int64_t parts = chunks.count > 1 ? pieces.count() * chunks.count : 0;
        const Block block(parts * partial_size(args) * static_cast<int64_t>(sizeof(A)));
        const Call call{args, pieces, chunks, parts > 0 ? static_cast<A*>(block.get()) : nullptr};
        parallel_for(pieces.count() * chunks.count, threads, count.used(), chunk_task, &call);
        if (parts > 0) parallel_for(pieces.count(), threads, count.used(), merge_task, &call);
    }

  private:
    struct Call {
        const AttentionArgs& args;
        const Pieces& pieces;
        Chunks chunks;
        A* partials;  // what every chunk of every piece leaves behind, where there are chunks
    };

    // out, maximum and sum of a tile.
    static int64_t partial_size(const AttentionArgs& args) { return (padded<A>(args.dv) + 2) * kQueries; }

    static void chunk_task(const void* context, int64_t number, void* block) {
        [[maybe_unused]] const MatrixUnit unit;
        const Call& call = *static_cast<const Call*>(context);
        Scratch scratch(block);
        Forward forward(call.args, scratch);
        const int64_t chunk = number % call.chunks.count;
        const Rows rows = rows_of(call, number / call.chunks.count);
        forward.attend(rows, {chunk * call.chunks.keys, (chunk + 1) * call.chunks.keys});
        if (call.partials) {
            forward.leave(call.partials + number * partial_size(call.args));
        } else {
            forward.finish(rows);
        }
    }

    static void merge_task(const void* context, int64_t number, void* block) {
        const Call& call = *static_cast<const Call*>(context);
        Scratch scratch(block);
        Forward forward(call.args, scratch);
        const Rows rows = rows_of(call, number);
        forward.lay_out(rows);
        const int64_t size = partial_size(call.args);
        const A* first = call.partials + number * call.chunks.count * size;
        forward.pick_up(first);
        for (int64_t chunk = 1; chunk < call.chunks.count; ++chunk) forward.merge(first + chunk * size);
        forward.finish(rows);
    }

    static Rows rows_of(const Call& call, int64_t number) {
        const Piece piece = call.pieces.piece(number);
        const Sequence sequence = sequence_of(call.args, piece.sequence);
        if (grouped(call.args, sequence)) return Rows::of_group(call.args, sequence, piece.head);
        // The last tile first: under a causal mask it is the longest.
        return Rows::of_head(call.args, sequence, piece.head, (piece.tiles - 1 - piece.tile) * kQueries);
    }

    Forward(const AttentionArgs& args, Scratch& scratch)
        : args_(args),
          factor_(Score<A>::factor(args)),
          q_rows_(scratch.take<E>(kQueries * round_up(operands<E>(args.d), W))),
          turned_(scratch.take<E>(kQueries * round_up(operands<E>(args.d), W))),  // Q across, [d][kQueries]
          k_rows_(scratch.take<E>(kKeys * round_up(operands<E>(args.d), W))),
          v_rows_(scratch.take<E>(kKeys * padded<A>(args.dv))),
          paged_rows_(scratch.take<T>(args.block_table ? kKeys * larger(args.d, args.dv) : 0)),
          scores_(scratch.take<A>(kKeys * kQueries)),
          // [dv][kQueries], or where few_ [query][padded dv]; then the maximum and the sum of each lane.
          out_(scratch.take<A>(partial_size(args))),
          row_max_(out_ + partial_size(args) - 2 * kQueries),
          row_sum_(row_max_ + kQueries),
          rescale_(scratch.take<A>(kQueries)),
          out_rows_(scratch.take<A>(kQueries * padded<A>(args.dv))),
          visible_(scratch.take<A>(kKeys * kQueries)),
          extra_rows_(scratch.take<A>(args.bias || args.mask ? kKeys * kQueries : 0)),
          extra_tile_(scratch.take<A>(args.bias || args.mask ? kKeys * kQueries : 0)),
          keep_(scratch.take<A>(args.dropout ? kKeys * kQueries : 0)),
          few_scores_(scratch.take<A>(W * kKeys)),
          few_keep_(scratch.take<A>(args.dropout ? W * kKeys : 0)),
          additive_(args, scratch),
          relative_(args, scratch) {}

    void lay_out(const Rows& rows) {
        lanes_ = padded<A>(rows.count);
        few_ = are_few<A>(args_, rows);
        columns_ = few_ ? rows.count : args_.dv;
        width_ = few_ ? padded<A>(args_.dv) : kQueries;
    }

    void attend(const Rows& rows, Range chunk) {
        lay_out(rows);
        start(rows);
        const Mask<A> mask(args_, rows, extra_rows_, extra_tile_);
        const Score<A> score(args_, rows, extra_rows_, extra_tile_);
        const Range keys{larger(mask.keys().begin, chunk.begin), smaller(mask.keys().end, chunk.end)};
        for (int64_t j = keys.begin / kKeys * kKeys; j < keys.end; j += kKeys) {
            const int64_t count = smaller(kKeys, keys.end - j);
            const View view = mask.look(j, count, visible_, seen_);
            if (view.sight != View::none) add_tile(rows, mask, score, j, count, view);
        }
    }

    void start(const Rows& rows) {
        if (args_.weight) {
            additive_.load_queries(rows, nullptr);
        } else {
            q_ = rows.template load<E, T>(args_.q, args_.d, q_rows_);
        }
        relative_.load_queries(rows);
        if (!few_ && !args_.weight) transpose<E>(q_, rows.count, operands<E>(args_.d), {turned_, kQueries}, lanes_);
        std::memset(out_, 0, static_cast<size_t>(columns_ * width_) * sizeof(A));
        for (int64_t lane = 0; lane < lanes_; ++lane) {
            row_max_[lane] = -static_cast<A>(INFINITY);
            row_sum_[lane] = 0;
        }
    }

    void add_tile(const Rows& rows, const Mask<A>& mask, const Score<A>& score, int64_t j, int64_t count, View view) {
        const Sequence& sequence = rows.sequence;
        const bool all = view.sight == View::all;
        const KeyRows<T> from(args_, args_.k, sequence, rows.kv_head, j, count, args_.d, paged_rows_);
        Lanes<const E> k{};
        if (args_.weight) {
            additive_.load_keys(rows, j, from.ptr, from.stride, count, view.wanted, false);
        } else {
            k = load_rows(from.ptr, from.stride, count, args_.d, k_rows_, view.wanted, few_);
        }
        if (few_) return add_few(rows, score, j, count, k, view);
        // Strips of lanes leave out the keys that none of their queries sees.
        const int64_t strip = all ? lanes_ : 2 * W;
        const auto keys_of = [&](int64_t lane) { return all ? Range{0, count} : mask.keys_of(lane, strip, j, count); };
        for (int64_t lane = 0; lane < lanes_; lane += strip) {
            const Range keys = keys_of(lane);
            if (keys.end <= keys.begin) continue;
            const Range strip_lanes{lane, smaller(lane + strip, lanes_)};
            if (args_.weight) {
                additive_.scores(rows, strip_lanes, keys, scores_, kQueries, 1);
            } else {
                score_strip(lane, strip_lanes.end - lane, k, keys);
            }
        }
        if (args_.relative_k) relative_.add(j, count, lanes_, scores_);
        score.apply(scores_, j, count, lanes_, all ? nullptr : visible_, nullptr);
        if (args_.dropout) draw_keep<A>(args_, rows, j, count, lanes_, keep_);
        const Lanes<const E> v = load_values(rows, j, count, view);
        for (int64_t lane = 0; lane < lanes_; lane += strip) {
            const Range keys = keys_of(lane);
            if (keys.end <= keys.begin) continue;
            const int64_t lanes = smaller(strip, lanes_ - lane);
            if (args_.dropout) {
                softmax<true>(lane, lanes, keys);
            } else {
                softmax<false>(lane, lanes, keys);
            }
            add_values(lane, lanes, keys, v);
        }
    }

    // Where few_, in whole vectors.
    Lanes<const E> load_values(const Rows& rows, int64_t j, int64_t count, View view) {
        const KeyRows<T> from(args_, args_.v, rows.sequence, rows.kv_head, j, count, args_.dv, paged_rows_);
        return load_rows_across(from.ptr, from.stride, count, args_.dv, v_rows_, view.wanted, few_);
    }

    void score_strip(int64_t lane, int64_t lanes, Lanes<const E> k, Range keys) {
        gemm<E>(lanes, keys.end - keys.begin, operands<E>(args_.d), {turned_ + lane, kQueries},
                {k.ptr + keys.begin * k.ld, k.ld, 1}, {scores_ + keys.begin * kQueries + lane, kQueries},
                {false, nullptr});
    }

    // scores -> operands of weights, with dropout, and the factor by which the earlier part of the row shrinks. The
    // first key is even.
    template <bool Dropout>
    void softmax(int64_t first_lane, int64_t lanes, Range keys) {
        constexpr int S = kStep<E>;
        E* const weights = reinterpret_cast<E*>(scores_);
        for (int64_t lane = first_lane; lane < first_lane + lanes; lane += W) {
            const Vec<A> old_max = load(row_max_ + lane);
            Vec<A> tile_max = load(scores_ + keys.begin * kQueries + lane);
            for (int64_t key = keys.begin + 1; key < keys.end; ++key) {
                tile_max = running_max<A>(tile_max, load(scores_ + key * kQueries + lane));
            }
            const Vec<A> top = running_max<A>(old_max, tile_max), shift = subtractable<A>(top);
            const Vec<A> shrink = weight<A>(old_max, shift, factor_);
            Vec<A> sum = {}, part = {};  // a sum of sums rounds less than one long sum
            for (int64_t key = keys.begin; key < keys.end; key += S) {
                Vec<A> p[S] = {};
#pragma GCC unroll 2
                for (int s = 0; s < S; ++s) {
                    if (s > 0 && key + s >= keys.end) break;
                    p[s] = weight<A>(load(scores_ + (key + s) * kQueries + lane), shift, factor_);
                    part += p[s];
                    if constexpr (Dropout) p[s] *= load(keep_ + (key + s) * kQueries + lane);
                }
                store_operand(weights + key / S * kQueries + lane, p);
                if (key % kAtOnce == kAtOnce - S) {
                    sum += part;
                    part = Vec<A>{};
                }
            }
            sum += part;
            store(row_max_ + lane, top);
            store(row_sum_ + lane, load(row_sum_ + lane) * shrink + sum);
            store(rescale_ + lane, shrink);
        }
    }

    static void store_operand(E* to, const Vec<A>* p) {
        if constexpr (kStep<E> == 1) {
            store(to, p[0]);
        } else {
            store(to, Product<E>::across(p[0], p[1]));
        }
    }

    void add_values(int64_t lane, int64_t lanes, Range keys, Lanes<const E> v) {
        const int64_t first = keys.begin / kStep<E>, depth = operands<E>(keys.end - keys.begin);
        const E* const weights = reinterpret_cast<const E*>(scores_) + first * kQueries + lane;
        gemm<E>(lanes, args_.dv, depth, {weights, kQueries}, {v.ptr + first * v.ld, 1, v.ld}, {out_ + lane, width_},
                {true, rescale_ + lane});
    }

    // The same tile for few queries: lanes are keys, and columns of values.
    void add_few(const Rows& rows, const Score<A>& score, int64_t j, int64_t count, Lanes<const E> k, View view) {
        const A* const visible = view.sight == View::all ? nullptr : visible_;
        if (args_.weight) {
            additive_.scores(rows, {0, rows.count}, {0, count}, few_scores_, 1, kKeys);
        } else {
            score_few(rows, count, k, later(args_.v, rows, j, args_.dv));
            if (args_.relative_k) relative_.add_few(j, count, few_scores_);
        }
        if (score.applies(visible)) {
            transpose<A>({few_scores_, kKeys}, rows.count, count, {scores_, kQueries}, lanes_);
            score.apply(scores_, j, count, lanes_, visible, nullptr);
            transpose<A>({scores_, kQueries}, count, lanes_, {few_scores_, kKeys}, round_up(count, W));
        }
        if (args_.dropout) {
            draw_keep<A>(args_, rows, j, count, lanes_, keep_);
            transpose<A>({keep_, kQueries}, count, lanes_, {few_keep_, kKeys}, round_up(count, W));
            softmax_few<true>(rows.count, count);
        } else {
            softmax_few<false>(rows.count, count);
        }
        const Lanes<const E> v = load_values(rows, j, count, view);
        scale_rows(rescale_);
        gemm_few<E>(width_, rows.count, operands<E>(count), v, {reinterpret_cast<const E*>(few_scores_), kKeys, 1},
                    {out_, width_}, {true, nullptr}, later(args_.k, rows, j + kKeys, args_.d));
    }

    // Memory is the limit here, so what is read next is asked for all along: the tile's values while its keys are
    // multiplied, the next tile's keys while the values are added.
    void score_few(const Rows& rows, int64_t count, Lanes<const E> k, const Later& values) {
        dots<E>(q_, rows.count, k, count, operands<E>(args_.d), {few_scores_, kKeys}, values);
    }

    Later later(const TensorArg& tensor, const Rows& rows, int64_t j, int64_t columns) const {
        constexpr int64_t size = sizeof(T);
        int64_t count = smaller(kKeys, rows.sequence.n - j);
        if (args_.block_table) count = smaller(count, args_.page - j % args_.page);
        if (count <= 0) return {};
        const T* const row = key_row<T>(args_, tensor, rows.sequence, rows.kv_head, j);
        return {reinterpret_cast<const char*>(row), count, tensor.stride[2] * size, columns * size};
    }

    // Weights [query][key] where the scores were. Keys that are not there have a score of -inf.
    template <bool Dropout>
    void softmax_few(int64_t rows, int64_t count) {
        constexpr int S = kStep<E>;
        E* const weights = reinterpret_cast<E*>(few_scores_);
        const auto scores = [&](int64_t row, int64_t key) {
            const Vec<A> found = load(few_scores_ + row * kKeys + key);
            return first_lanes<A>(count - key) ? found : fill<A>(-static_cast<A>(INFINITY));
        };
        Vec<A> square[W];
        for (int row = 0; row < W; ++row) {
            square[row] = fill<A>(-static_cast<A>(INFINITY));
            for (int64_t key = 0; row < rows && key < count; key += W) {
                square[row] = running_max<A>(square[row], scores(row, key));
            }
        }
        transpose_square<A>(square);
        const Vec<A> old_max = load(row_max_);
        Vec<A> top = old_max;
        for (int row = 0; row < W; ++row) top = running_max<A>(top, square[row]);
        const A factor = factor_;
        const Vec<A> shift = subtractable<A>(top), shrink = weight<A>(old_max, shift, factor);
        for (int row = 0; row < W; ++row) {
            square[row] = Vec<A>{};
            const Vec<A> of_row = fill<A>(shift[row]);
            for (int64_t key = 0; row < rows && key < count; key += S * W) {
                Vec<A> p[S] = {};
#pragma GCC unroll 2
                for (int s = 0; s < S; ++s) {
                    const int64_t at = key + s * W;
                    if (at >= count) break;
                    p[s] = weight<A>(scores(row, at), of_row, factor);
                    square[row] += p[s];
                    if constexpr (Dropout) p[s] *= load(few_keep_ + row * kKeys + at);
                }
                if constexpr (S == 1) {
                    store(weights + row * kKeys + key, p[0]);
                } else {
                    store(weights + row * kKeys + key / S, Product<E>::along(p[0], p[1]));
                }
            }
        }
        transpose_square<A>(square);
        Vec<A> sum = load(row_sum_) * shrink;
        for (int row = 0; row < W; ++row) sum += square[row];
        store(row_max_, top);
        store(row_sum_, sum);
        store(rescale_, shrink);
    }

    // out *= factor, one factor per query; a factor of 0 also clears a NaN.
    void scale_rows(const A* factor) {
        for (int64_t column = 0; column < columns_; ++column) {
            for (int64_t lane = 0; lane < (few_ ? width_ : lanes_); lane += W) {
                A* at = out_ + column * width_ + lane;
                const Vec<A> by = few_ ? fill<A>(factor[column]) : load(factor + lane);
                store(at, by == A(0) ? Vec<A>{} : load(at) * by);
            }
        }
    }

    void leave(A* partial) const { copy_part(out_, partial); }
    void pick_up(const A* partial) { copy_part(partial, out_); }
    void copy_part(const A* from, A* to) const {
        const int64_t statistics = partial_size(args_) - 2 * kQueries;
        std::memcpy(to, from, static_cast<size_t>(columns_ * width_) * sizeof(A));
        std::memcpy(to + statistics, from + statistics, 2 * kQueries * sizeof(A));
    }

    // Joins another chunk's part of the same rows to this one.
    void merge(const A* partial) {
        const A* max = partial + partial_size(args_) - 2 * kQueries;
        const A* sum = max + kQueries;
        A other[kQueries] = {};
        for (int64_t lane = 0; lane < lanes_; lane += W) {
            const Vec<A> mine = load(row_max_ + lane), theirs = load(max + lane), top = running_max<A>(mine, theirs);
            const Vec<A> keep = weight<A>(mine, subtractable<A>(top), factor_);
            const Vec<A> add = weight<A>(theirs, subtractable<A>(top), factor_);
            store(row_sum_ + lane, load(row_sum_ + lane) * keep + load(sum + lane) * add);
            store(row_max_ + lane, top);
            store(rescale_ + lane, keep);
            store(other + lane, add);
        }
        scale_rows(rescale_);
        for (int64_t column = 0; column < columns_; ++column) {
            for (int64_t lane = 0; lane < (few_ ? width_ : lanes_); lane += W) {
                const int64_t at = column * width_ + lane;
                const Vec<A> factor = few_ ? fill<A>(other[column]) : load(other + lane);
                store(out_ + at, load(out_ + at) + load(partial + at) * factor);
            }
        }
    }

    // Writes out and the statistics of the rows. `close` leaves what makes out of what is accumulated.
    void finish(const Rows& rows) {
        close(rows);
        const int64_t width = padded<A>(args_.dv);
        if (!few_) transpose<A>({out_, kQueries}, args_.dv, lanes_, {out_rows_, width}, width);
        for (int64_t lane = 0; lane < rows.count; ++lane) {
            T* to = query_row<T>(args_.out, rows.sequence, rows.head[lane], rows.query[lane]);
            if (rescale_[lane] == 0) {
                std::memset(to, 0, static_cast<size_t>(args_.dv) * sizeof(T));  // 0 times a NaN would be one
            } else {
                store_row((few_ ? out_ : out_rows_) + lane * width, args_.dv, rescale_[lane], to);
            }
        }
    }

    // Writes the statistics of the rows, and leaves the inverse of their denominators, 0 for a row that sees no key.
    void close(const Rows& rows) {
        A lse[kQueries];
        for (int64_t lane = 0; lane < rows.count; ++lane) lse[lane] = row_max_[lane] * factor_ + std::log(row_sum_[lane]);
        if (args_.sinks) add_sinks(rows, lse);
        for (int64_t lane = 0; lane < lanes_; lane += W) {
            const Vec<A> sum = load(row_sum_ + lane);
            store(rescale_ + lane, sum == A(0) ? sum : A(1) / sum);
        }
        for (int64_t lane = 0; lane < rows.count; ++lane) {
            const int64_t row = statistic(args_, rows.sequence, rows.head[lane], rows.query[lane]);
            static_cast<A*>(args_.lse)[row] = lse[lane];
            static_cast<A*>(args_.row_max)[row] = row_max_[lane];
            static_cast<A*>(args_.row_sum)[row] = row_sum_[lane];
        }
    }

    // A sink has its part of the denominator, and of lse, which is taken relative to the larger of the two.
    void add_sinks(const Rows& rows, A* lse) {
        for (int64_t lane = 0; lane < rows.count; ++lane) {
            const A sink = static_cast<const A*>(args_.sinks)[rows.head[lane]];
            const A lead = std::fma(-row_max_[lane], factor_, sink);
            if (row_sum_[lane] == 0) {
                lse[lane] = sink;
            } else if (lead > 0) {
                lse[lane] = sink + std::log1p(row_sum_[lane] * std::exp(-lead));
                row_sum_[lane] += std::exp(lead);
            } else {
                row_sum_[lane] += std::exp(lead);
                lse[lane] = row_max_[lane] * factor_ + std::log(row_sum_[lane]);
            }
        }
    }

    const AttentionArgs& args_;
    const A factor_;  // from scores to logits
    E *q_rows_, *turned_, *k_rows_, *v_rows_;
    T* paged_rows_;
    A *scores_, *out_, *row_max_, *row_sum_, *rescale_, *out_rows_, *visible_, *extra_rows_, *extra_tile_, *keep_;
    A *few_scores_, *few_keep_;  // where few_, [query][kKeys]
    Additive<T> additive_;
    Relative<T> relative_;
    Lanes<const E> q_{};
    int64_t lanes_ = 0, columns_ = 0, width_ = 0;
    bool few_ = false;  // queries for at most half a vector: lanes are keys, then columns of values
    uint8_t seen_[kKeys];
};

}  // namespace PYATTN_ISA
}  // namespace pyattn
