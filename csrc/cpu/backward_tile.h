// The backward's building block: the probabilities and score gradients of one tile, recomputed from their statistics.
#pragma once

#include <optional>

#include "additive.h"
#include "dropout.h"
#include "parallel.h"
#include "relative.h"
#include "score.h"

namespace pyattn {
namespace PYATTN_ISA {

// A row's key with more than kHeavy of its weight, and the slope from the gradient of their logit to that of q.k.
template <class A>
struct HeavyPair {
    int64_t lane, key;
    A weight, slope;
};
// Results of 16 bits have rounding that shows next to several such keys, those of 32 next to a single one.
template <class T>
constexpr Accumulator<T> kHeavy = sizeof(T) == 2 ? 0.125 : 0.5;
template <class T>
constexpr int kMostHeavy = static_cast<int>(1 / kHeavy<T>) - 1;  // of one row

// Tiles of P and dS are [key][query]; gradients of k and v are [key][padded column]; that of q is [column][query].
// Source: Dao, "FlashAttention-2", arXiv:2307.08691, Algorithm 2.
template <class T>
class BackwardTile {
  public:
    using A = Accumulator<T>;
    using E = Operand<T>;
    static constexpr int W = kWidth<A>;

    BackwardTile(const AttentionArgs& args, Scratch& scratch)
        : args_(args),
          q_t_(scratch.take<E>(round_up(operands<E>(args.d), W) * kQueries)),
          d_out_t_(scratch.take<E>(round_up(operands<E>(args.dv), W) * kQueries)),
          q_rows_(scratch.take<E>(kQueries * padded<A>(args.d))),
          d_out_rows_(scratch.take<E>(kQueries * padded<A>(args.dv))),
          k_rows_(scratch.take<E>(kKeys * padded<A>(args.d))),
          v_rows_(scratch.take<E>(kKeys * padded<A>(args.dv))),
          k_across_rows_(scratch.take<E>(kStep<E> == 1 ? 0 : kKeys * padded<A>(args.d))),
          ds_across_(scratch.take<E>(kStep<E> == 1 ? 0 : kKeys * kQueries)),
          few_rows_(scratch.take<A>(W * kKeys)),
          p_(scratch.take<A>(kKeys * kQueries)),
          ds_(scratch.take<A>(kKeys * kQueries)),
          visible_(scratch.take<A>(kKeys * kQueries)),
          cap_slope_(scratch.take<A>(args.softcap != 0 ? kKeys * kQueries : 0)),
          extra_rows_(scratch.take<A>(args.bias || args.mask ? kKeys * kQueries : 0)),
          extra_tile_(scratch.take<A>(args.bias || args.mask ? kKeys * kQueries : 0)),
          keep_(scratch.take<A>(args.dropout ? kKeys * kQueries : 0)),
          row_max_(scratch.take<A>(kQueries)),
          top_weight_(scratch.take<A>(kQueries)),
          delta_(scratch.take<A>(kQueries)),
          d_lse_(scratch.take<A>(kQueries)),
          ds_sum_(scratch.take<A>(kQueries)),
          taken_sum_(scratch.take<A>(kQueries)),
          heavy_sum_(scratch.take<A>(kQueries)),
          score_excess_(scratch.take<A>(kQueries)),
          excess_(scratch.take<A>(kQueries)),
          heavy_(scratch.take<HeavyPair<A>>(kMostHeavy<T> * kQueries)),
          additive_(args, scratch),
          relative_(args, scratch),
          relative_gradient_(args, relative_, scratch) {}

    // Brings queries [i, i + kQueries) of one head into the tile.
    void load_queries(const Sequence& sequence, int64_t head, int64_t i) {
        rows_ = Rows::of_head(args_, sequence, head, i);
        mask_.emplace(args_, rows_, extra_rows_, extra_tile_);
        lanes_ = padded<A>(rows_.count);
        few_ = are_few<A>(args_, rows_);
        const int64_t row = statistic(args_, sequence, head, i);
        const A* row_max = static_cast<const A*>(args_.row_max) + row;
        const A* row_sum = static_cast<const A*>(args_.row_sum) + row;
        const A* delta = static_cast<const A*>(args_.delta) + row;
        const A* d_lse = args_.d_lse ? static_cast<const A*>(args_.d_lse) + row : nullptr;
        bool every = true;
        for (int64_t lane = 0; lane < lanes_; ++lane) {
            // A row that sees nothing, and padding: weights of exp(s - inf) = 0. Its q and d_out are kept out as well.
            const bool sees = lane < rows_.count && row_sum[lane] != 0;
            sees_[lane] = sees;
            every &= sees || lane >= rows_.count;
            row_max_[lane] = sees ? row_max[lane] : static_cast<A>(INFINITY);
            top_weight_[lane] = sees ? A(1) / row_sum[lane] : A(0);
            delta_[lane] = sees ? delta[lane] : A(0);
            d_lse_[lane] = sees && d_lse ? d_lse[lane] : A(0);
        }
        start_corrections();
        const uint8_t* wanted = every ? nullptr : sees_;
        if (args_.weight) {
            additive_.load_queries(rows_, wanted);
        } else {
            load_sides(query_row<T>(args_.q, sequence, head, i), args_.q.stride[2], args_.d, wanted, q_rows_, q_t_,
                       q_along_, q_);
        }
        relative_.load_queries(rows_);
        relative_gradient_.load_queries(rows_, wanted);
        load_sides(query_row<T>(args_.d_out, sequence, head, i), args_.d_out.stride[2], args_.dv, wanted, d_out_rows_,
                   d_out_t_, d_out_along_, d_out_);
    }

    Range keys() const { return mask_->keys(); }

    // Computes P (with dropout) and dS for keys [j, j + count). False: nobody sees anybody, and nothing is computed.
    bool compute(int64_t j, int64_t count) {
        const View view = mask_->look(j, count, visible_, seen_);
        if (view.sight == View::none) return false;
        const bool all = view.sight == View::all;
        const T* const k = key_row<T>(args_, args_.k, rows_.sequence, rows_.kv_head, j);
        const T* const v = key_row<T>(args_, args_.v, rows_.sequence, rows_.kv_head, j);
        Lanes<const E> k_along{};
        if (args_.weight) {
            additive_.load_keys(rows_, j, k, args_.k.stride[2], count, view.wanted, true);
        } else {
            k_along = load_rows(k, args_.k.stride[2], count, args_.d, k_rows_, view.wanted, few_);
        }
        const Lanes<const E> v_along = load_rows(v, args_.v.stride[2], count, args_.dv, v_rows_, view.wanted, few_);
        k_ = k_along;
        if (kStep<E> > 1 && !args_.weight) {
            k_ = load_rows_across(k, args_.k.stride[2], count, args_.d, k_across_rows_, view.wanted, few_);
        }
        j_ = j, keys_ = count, strip_ = all ? lanes_ : 2 * W;
        for (int64_t lane = 0; lane < lanes_; lane += strip_) {
            const Range seen = keys_of(lane);
            if (seen.end <= seen.begin) continue;
            if (args_.weight) {
                additive_.scores(rows_, {lane, lane + strip_}, seen, p_, kQueries, 1);
            } else {
                product(lane, seen, args_.d, q_t_, q_along_, k_along, p_);
            }
            product(lane, seen, args_.dv, d_out_t_, d_out_along_, v_along, ds_);
        }
        if (args_.relative_k) relative_.add(j, count, lanes_, p_);
        const Score<A> score(args_, rows_, extra_rows_, extra_tile_);
        score.apply(p_, j, count, lanes_, all ? nullptr : visible_, cap_slope_);
        if (args_.dropout) {
            draw_keep<A>(args_, rows_, j, count, lanes_, keep_);
            differentiate<true>();
        } else {
            differentiate<false>();
        }
        return true;
    }

    // From the gradient of the logits to that of scale * q.k.
    void pass_softcap() {
        if (args_.softcap == 0) return;
        for (int64_t key = 0; key < keys_; ++key) {
            for (int64_t lane = 0; lane < lanes_; lane += W) {
                const int64_t at = key * kQueries + lane;
                const Vec<A> ds = load(ds_ + at);
                // The slope of a pair that is not seen was never computed.
                store(ds_ + at, ds == A(0) ? ds : ds * load(cap_slope_ + at));
            }
        }
    }

    // Additive scores: the gradients of q and k, [row][padded column] and without the factor `scale`; either may be null.
    // Before add_key_gradients.
    void add_additive_gradients(A* d_q_rows, A* d_k_rows) {
        for (int64_t lane = 0; lane < rows_.count; lane += strip_) {
            const Range queries{lane, smaller(lane + strip_, rows_.count)};
            additive_.add_gradients(rows_.head[0], queries, keys_of(lane), ds_, d_q_rows, d_k_rows);
        }
    }
    Additive<T>& additive() { return additive_; }

    // A relative term's gradients, d_k the head's rows of relative_k. Before add_query_gradient.
    void add_relative_gradients(A* d_k) { relative_gradient_.add(j_, keys_, lanes_, ds_, d_k); }
    RelativeGradient<T>& relative() { return relative_gradient_; }

    // d_q: [d][kQueries] or, where queries are few, [query][padded d]; without the factor `scale`. Before
    // add_key_gradients, which uses the tiles up.
    void add_query_gradient(A* d_q) {
        const E* const ds = across_keys<E>(ds_, keys_, lanes_, ds_across_);
        if (few_) {
            const int64_t width = padded<A>(args_.d);
            gemm_few<E>(width, rows_.count, operands<E>(keys_), k_, {ds, 1, kQueries}, {d_q, width}, {true, nullptr});
            return;
        }
        for (int64_t lane = 0; lane < lanes_; lane += strip_) {
            const Range seen = keys_of(lane);
            if (seen.end <= seen.begin) continue;
            const int64_t first = seen.begin / kStep<E>;
            gemm<E>(smaller(strip_, lanes_ - lane), args_.d, operands<E>(seen.end - seen.begin),
                    {ds + first * kQueries + lane, kQueries}, {k_.ptr + first * k_.ld, 1, k_.ld},
                    {d_q + lane, kQueries}, {true, nullptr});
        }
    }

    // d_k_rows, d_v_rows: the rows of the tile's keys. d_k lacks the factor `scale`, and is not of additive scores.
    void add_key_gradients(A* d_k_rows, A* d_v_rows) {
        const int64_t width = padded<A>(args_.d), width_v = padded<A>(args_.dv), depth = operands<E>(rows_.count);
        const E* const p = along_lanes<E>(p_, keys_, lanes_);
        add_outer(width_v, depth, d_out_, p, d_v_rows);
        if (!args_.weight) add_outer(width, depth, q_, along_lanes<E>(ds_, keys_, lanes_), d_k_rows);
    }

    // Once the tile has met all its keys: by how much delta is too small. To `settled` goes the delta of all rows as it
    // should have been, to `excess` what their products have too much; either may be null.
    //
    // delta is d_out . out, so that it carries the rounding of out, and products take a dS that is rounded as well. But
    // a row's dS sums to the d_lse of its keys: the sum over what the products took tells what delta lacks. Each key has
    // felt that by its weight. It shows where few keys have all the weight: there dP - delta may be smaller than the
    // rounding of delta, and where those keys are nearly parallel, d_q is what is left of dS that cancel. The gradients of
    // bias and sinks take dS as it is: of them the sum without that rounding tells.
    void settle(A* settled, A* excess) {
        const int64_t row = statistic(args_, rows_.sequence, rows_.head[0], rows_.query[0]);
        const size_t bytes = static_cast<size_t>(rows_.count) * sizeof(A);
        if (settled) std::memcpy(settled + row, delta_, bytes);
        for (int64_t lane = 0; any_peaked_ && lane < rows_.count; ++lane) {
            if (heavy_sum_[lane] == 0) continue;
            const A delta = delta_[lane];
            A of_sink = 0;
            if (args_.sinks) {
                const A lse = static_cast<const A*>(args_.lse)[row + lane];
                of_sink = std::exp(static_cast<const A*>(args_.sinks)[rows_.head[0]] - lse);
            }
            // As exactly as delta can say it.
            const auto better = [&](A sum) { return delta + (sum - of_sink * delta - (1 - of_sink) * d_lse_[lane]); };
            score_excess_[lane] = better(ds_sum_[lane]) - delta;
            excess_[lane] = better(taken_sum_[lane]) - delta;
            if (settled) settled[row + lane] = better(ds_sum_[lane]);
        }
        if (excess) std::memcpy(excess + row, excess_, bytes);
    }
    // What the row's dS have too much between them, as they are and as products took them.
    A score_excess(int64_t lane) const { return score_excess_[lane]; }
    A excess(int64_t lane) const { return excess_[lane]; }

    // Calls f(pair) for the heavy pairs among the keys met.
    template <class F>
    void each_heavy(const F& f) const {
        for (const HeavyPair<A>* pair = heavy_; pair < heavy_ + heavy_count_; ++pair) f(*pair);
    }
    // The part of the row's heavy weight that this pair has.
    A share(const HeavyPair<A>& pair) const { return pair.weight / heavy_sum_[pair.lane]; }

    // sum[key][query] += dS
    void add_score_gradient(A* sum) const {
        for (int64_t key = 0; key < keys_; ++key) {
            for (int64_t lane = 0; lane < lanes_; lane += W) {
                A* at = sum + key * kQueries + lane;
                store(at, load(at) + load(ds_ + key * kQueries + lane));
            }
        }
    }

    const Rows& rows() const { return rows_; }
    const AttentionArgs& args() const { return args_; }

    bool few() const { return few_; }

  private:
    // to[key] += the rows x, weighted by y[key].
    void add_outer(int64_t width, int64_t depth, Lanes<const E> x, const E* y, A* to) const {
        const Broadcast<E> weights{y, kQueries, 1};
        if (few_) {
            gemm_vectors<E, 8, 1>(width, keys_, depth, x, weights, {to, width}, {true, nullptr});
        } else {
            gemm<E>(width, keys_, depth, x, weights, {to, width}, {true, nullptr});
        }
    }

    // Rows of q or d_out: depth across rows, and along the row transposed or, where they are few, as they lie.
    void load_sides(const T* from, int64_t ld, int64_t columns, const uint8_t* wanted, E* rows, E* transposed,
                    Lanes<const E>& along, Lanes<const E>& across) {
        along = load_rows(from, ld, rows_.count, columns, few_ ? transposed : rows, wanted, true);
        if (!few_) transpose<E>(along, rows_.count, operands<E>(columns), {transposed, kQueries}, lanes_);
        across = kStep<E> == 1 ? along : load_rows_across(from, ld, rows_.count, columns, rows, wanted, true);
    }

    // Keys of the tile that some of the lanes [lane, lane + strip_) see.
    Range keys_of(int64_t lane) const {
        return strip_ == lanes_ ? Range{0, keys_} : mask_->keys_of(lane, strip_, j_, keys_);
    }

    // x_t and x: the same rows, transposed and as they lie. Few rows take the products of the forward, which sum in
    // another order than gemm: the weights of the two passes would differ by the rounding of large scores.
    void product(int64_t lane, Range keys, int64_t columns, const E* x_t, Lanes<const E> x, Lanes<const E> y,
                 A* tile) const {
        if (few_) {
            dots<E>(x, rows_.count, y, keys_, operands<E>(columns), {few_rows_, kKeys});
            transpose<A>({few_rows_, kKeys}, rows_.count, padded<A>(keys_), {tile, kQueries}, lanes_);
            return;
        }
        gemm<E>(smaller(strip_, lanes_ - lane), keys.end - keys.begin, operands<E>(columns), {x_t + lane, kQueries},
                {y.ptr + keys.begin * y.ld, y.ld, 1}, {tile + keys.begin * kQueries + lane, kQueries},
                {false, nullptr});
    }

    static constexpr int64_t kBits = 8 * sizeof(A);  // of an element, each for one key

    // Scores and dP -> P with dropout and dS = P (dP - delta + d_lse). Of rows that are peaked, sums and heavy pairs as
    // well; with dropout what is kept gives its place to P.
    template <bool Dropout>
    void differentiate() {
        for (int64_t lane = 0; lane < lanes_; lane += W) {
            for (int64_t key = 0; key < keys_; key += kBits) {
                const Range keys{key, smaller(key + kBits, keys_)};
                if (any_peaked_) {
                    differentiate_lanes<Dropout, true>(lane, keys);
                } else {
                    differentiate_lanes<Dropout, false>(lane, keys);
                }
            }
        }
    }

    template <bool Dropout, bool Peaked>
    void differentiate_lanes(int64_t lane, Range keys) {
        const A factor = Score<A>::factor(args_);
        const Vec<A> top = load(row_max_ + lane), top_weight = load(top_weight_ + lane);
        const Vec<A> delta = load(delta_ + lane), d_lse = load(d_lse_ + lane);
        Vec<A> sum = {}, taken_sum = {};
        Bits<A> heavy = {}, bit = Bits<A>{} + 1;
        for (int64_t at = keys.begin * kQueries + lane; at < keys.end * kQueries; at += kQueries) {
            const Vec<A> score = load(p_ + at), p = weight<A>(score, top, factor) * top_weight;
            Vec<A> dp = load(ds_ + at), dropped = p;
            if constexpr (Dropout) {
                const Vec<A> keep = load(keep_ + at);
                if constexpr (Peaked) store(keep_ + at, p);
                dp *= keep;
                dropped *= keep;
            }
            store(p_ + at, dropped);
            // An unseen pair has P = 0; its dP may hold a NaN that others see, or nothing at all.
            const Vec<A> ds = p == A(0) ? Vec<A>{} : p * ((dp - delta) + d_lse);
            store(ds_ + at, ds);
            if constexpr (Peaked) {
                sum += ds;
                taken_sum += args_.weight ? ds : as_operand<E>(ds);
                heavy |= p > kHeavy<T> ? bit : Bits<A>{};
                bit <<= 1;
            }
        }
        if constexpr (Peaked) {
            store(ds_sum_ + lane, load(ds_sum_ + lane) + sum);
            store(taken_sum_ + lane, load(taken_sum_ + lane) + taken_sum);
            for (int64_t c = 0; c < W; ++c) {
                const uint64_t bits = static_cast<uint64_t>(heavy[c]) & ~uint64_t{0} >> (64 - kBits);
                if (bits) list_heavy(lane + c, keys.begin, bits, Dropout ? keep_ : p_);
            }
        }
    }

    void list_heavy(int64_t lane, int64_t first, uint64_t bits, const A* weights) {
        for (; bits; bits &= bits - 1) {
            const int64_t heavy = first + __builtin_ctzll(bits), at = heavy * kQueries + lane;
            if (heavy_count_ == kMostHeavy<T> * kQueries) return;
            heavy_[heavy_count_++] = {lane, j_ + heavy, weights[at], args_.softcap != 0 ? cap_slope_[at] : A(1)};
            heavy_sum_[lane] += weights[at];
        }
    }

    void start_corrections() {
        any_peaked_ = heavy_count_ = 0;
        for (int64_t lane = 0; lane < lanes_; ++lane) {
            any_peaked_ |= top_weight_[lane] > kHeavy<T>;
            ds_sum_[lane] = taken_sum_[lane] = heavy_sum_[lane] = score_excess_[lane] = excess_[lane] = 0;
        }
    }

    const AttentionArgs& args_;
    E *q_t_, *d_out_t_, *q_rows_, *d_out_rows_, *k_rows_, *v_rows_, *k_across_rows_, *ds_across_;
    A *few_rows_, *p_, *ds_, *visible_, *cap_slope_, *extra_rows_, *extra_tile_, *keep_, *row_max_, *top_weight_;
    A *delta_, *d_lse_, *ds_sum_, *taken_sum_, *heavy_sum_, *score_excess_, *excess_;
    HeavyPair<A>* heavy_;
    int64_t heavy_count_ = 0;
    int any_peaked_ = 0;
    uint8_t seen_[kKeys], sees_[kQueries];
    Rows rows_;
    std::optional<Mask<A>> mask_;
    Lanes<const E> q_, d_out_, k_;  // depth across rows
    Lanes<const E> q_along_, d_out_along_;
    Additive<T> additive_;
    Relative<T> relative_;
    RelativeGradient<T> relative_gradient_;
    int64_t j_ = 0, keys_ = 0, lanes_ = 0;
    bool few_ = false;
    int64_t strip_ = 0;  // lanes that are worked on together: all of them, or few where some pairs are not visible
};

}  // namespace PYATTN_ISA
}  // namespace pyattn
