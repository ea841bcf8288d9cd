// Additive scores, weight . tanh(q_i + k_j), and their gradients. Lanes are columns.
//
// tanh of a sum without an exponential for each pair: with u = e^2q and v = e^2k,
//
//     tanh(q + k) = (u v - 1) / (u v + 1).
//
// Rows are raised to exponentials once; a pair then takes two multiply-adds, and several pairs share one division. Where q
// and k are small, u v - 1 is (u - 1) v + (v - 1), whose differences exponentials give without loss.
// Score: Bahdanau, Cho and Bengio 2015, arXiv:1409.0473, A.1.2.
#pragma once

#include "dots.h"
#include "score.h"

namespace pyattn {
namespace PYATTN_ISA {

// What may be computed how. Up to `little` the differences keep their digits. As long as q + k stays below `sum`, the
// product of four denominators is finite; above, they stop at `most`. Beyond `each` a row's exponential is no number.
// From `flat` on tanh is 1. Up to `lone` a query has the right sum with any e^2k, 0 and infinity included.
template <class A>
struct AdditiveRange;
template <>
struct AdditiveRange<float> {
    static constexpr float lone = 30, little = 0.5f, each = 40, sum = 10, most = 0x1p29f, flat = 9.5f;
};
template <>
struct AdditiveRange<double> {
    static constexpr double lone = 300, little = 0.5, each = 340, sum = 80, most = 0x1p231, flat = 20;
};

// Rows of q or k of a tile, `ld` apart: x as it is, e^2x - 1, and e^2x.
template <class A>
struct AdditiveRows {
    A *plain, *less_one, *power;
    A *largest, *magnitude;  // of each row, the largest number and the largest magnitude

    AdditiveRows(Scratch& scratch, int64_t rows, int64_t ld)
        : plain(scratch.take<A>(rows * ld)),
          less_one(scratch.take<A>(rows * ld)),
          power(scratch.take<A>(rows * ld)),
          largest(scratch.take<A>(rows)),
          magnitude(scratch.take<A>(rows)) {}

    void raise(int64_t row, int64_t width, int64_t ld) {
        Vec<A> high = fill<A>(-static_cast<A>(INFINITY)), low = -high;
        for (int64_t at = row * ld; at < row * ld + width; at += kWidth<A>) {
            const Vec<A> x = load(plain + at);
            Vec<A> difference;
            store(power + at, exp<A>(x * A(2), difference));
            store(less_one + at, difference);
            high = running_max<A>(high, x);
            low = x < low ? x : low;
        }
        A top = high[0], bottom = low[0];
        for (int lane = 1; lane < kWidth<A>; ++lane) {
            top = high[lane] > top ? high[lane] : top;
            bottom = low[lane] < bottom ? low[lane] : bottom;
        }
        largest[row] = top;
        magnitude[row] = top > -bottom ? top : -bottom;
    }
};

template <class T>
class Additive {
    using A = Accumulator<T>;
    using Limit = AdditiveRange<A>;
    static constexpr int W = kWidth<A>;
    static constexpr int kTogether = 4;  // queries that share what is loaded of a key
    static constexpr int kFew = 2;       // queries that do not pay for exponentials of the keys
    static constexpr int kGiven = 16;    // queries for which exponentials of the keys that are given save time
    enum Way : uint8_t { small, moderate, clamped, given, direct };

  public:
    Additive(const AttentionArgs& args, Scratch& scratch)
        : args_(args),
          width_(args.weight ? padded<A>(args.d) : 0),
          ld_(width_ / W % 2 ? width_ : width_ + W),
          q_(scratch, args.weight ? kQueries : 0, ld_),
          k_(scratch, args.weight ? kKeys : 0, ld_),
          k_weighted_(scratch.take<A>(args.weight ? kKeys * ld_ : 0)),
          d_q_(scratch.take<A>(args.weight ? kQueries * ld_ : 0)),
          weight_(scratch.take<A>(width_)),
          d_weight_(scratch.take<A>(width_)) {}

    // Rows of q, of one head or of all of a group. How a pair's score is computed depends on its own two rows and on what
    // both directions have in common: weights exp(score - largest) would differ by the rounding of large scores.
    void load_queries(const Rows& rows, const uint8_t* wanted) {
        few_ = together(args_, rows) <= kFew;
        given_ = together(args_, rows) <= kGiven && args_.exp_keys;
        only_given_ = true;
        for (int64_t lane = 0; lane < rows.count; ++lane) {
            const T* from = query_row<const T>(args_.q, rows.sequence, rows.head[lane], rows.query[lane]);
            copy_row(from, !wanted || wanted[lane] ? args_.d : 0, q_.plain + lane * ld_, width_);
            if (!few_ || given_) q_.raise(lane, width_, ld_);
            only_given_ &= takes_given(lane);
        }
        std::memset(d_weight_, 0, static_cast<size_t>(width_) * sizeof(A));
    }

    // j: where the rows begin in the sequence, whose keys they are.
    void load_keys(const Rows& rows, int64_t j, const T* from, int64_t ld, int64_t count, const uint8_t* wanted,
                   bool for_gradients) {
        const bool plain = !only_given_ || for_gradients, raised = plain && !few_;
        // Those given take the place of our own, which are not the same bits and have no keys beyond `each`.
        const bool copied = given_ && (raised || wanted || width_ != args_.d);
        exp_keys_ = given_ ? key_row<const A>(args_, args_.exp_keys, rows.sequence, rows.kv_head, j) : nullptr;
        exp_ld_ = args_.exp_keys.stride[2];
        for (int64_t key = 0; key < count; ++key) {
            const int64_t columns = !wanted || wanted[key] ? args_.d : 0;
            if (plain) copy_row(from + key * ld, columns, k_.plain + key * ld_, width_);
            if (raised) k_.raise(key, width_, ld_);
            if (copied) copy_row(exp_keys_ + key * exp_ld_, columns, k_.power + key * ld_, width_);
        }
        if (copied) exp_keys_ = k_.power, exp_ld_ = ld_;
    }

    // sums[key * key_stride + query * query_stride] = weight . tanh(q + k); 0 for queries behind the last one.
    void scores(const Rows& rows, Range queries, Range keys, A* sums, int64_t key_stride, int64_t query_stride) {
        for (int64_t query = larger(queries.begin, rows.count); query < queries.end; ++query) {
            for (int64_t key = keys.begin; key < keys.end; ++key) sums[key * key_stride + query * query_stride] = 0;
        }
        queries.end = smaller(queries.end, rows.count);
        for (int64_t query = queries.begin; query < queries.end;) {
            int64_t end = query + 1;
            while (end < queries.end && rows.head[end] == rows.head[query]) ++end;
            scores_of_head(rows.head[query], {query, end}, keys, sums, key_stride, query_stride);
            query = end;
        }
    }

    // ds: [key][query]. d_q_rows and d_k_rows are [row][padded column]; either may be null. With d_q the gradient of the
    // weight gathers as well.
    void add_gradients(int64_t head, Range queries, Range keys, const A* ds, A* d_q_rows, A* d_k_rows) {
        load_weight(head);
        Way way[kKeys];
        for (int64_t key = keys.begin; key < keys.end; ++key) way[key] = few_ ? direct : way_by_size(queries, key);
        for (int64_t c = 0; c < width_; c += 2 * W) {
            if (c + W < width_) {
                gradients_of_columns<2>(c, way, queries, keys, ds, d_q_rows, d_k_rows);
            } else {
                gradients_of_columns<1>(c, way, queries, keys, ds, d_q_rows, d_k_rows);
            }
        }
    }

    // Takes `ds` of a pair out of the gradient of q or k again, and with that of q out of the weight's, whose head is the
    // last that add_gradients was called for. Rows that were loaded are no longer there.
    void take_out(const T* q, const T* k, A ds, A* row, bool of_query) {
        copy_row(q, args_.d, q_.plain, width_);
        copy_row(k, args_.d, k_.plain, width_);
        for (int64_t c = 0; c < width_; c += W) {
            Vec<A> t;
            tanh_of<direct, 1>(0, 0, c, &t);
            add_to(row, c, (t * t - A(1)) * ds);
            if (of_query) store(d_weight_ + c, load(d_weight_ + c) - t * ds);
        }
    }

    const A* d_weight() const { return d_weight_; }

  private:
    struct Fraction {
        Vec<A> top, bottom;
    };

    // The weight over a power of 2 that leaves nothing larger than 2: four denominators have room for little more.
    void load_weight(int64_t head) {
        const A* const weight = static_cast<const A*>(args_.weight) + head * args_.d;
        A most = 0;
        for (int64_t c = 0; c < args_.d; ++c) most = larger_of(std::fabs(weight[c]), most);
        int exponent = 0;
        if (std::isfinite(most)) std::frexp(most, &exponent);
        unit_ = std::ldexp(A(1), exponent - 1);
        copy_row(weight, args_.d, weight_, width_);
        for (int64_t c = 0; c < width_; c += W) store(weight_ + c, load(weight_ + c) / unit_);
    }

    Way way_by_size(Range queries, int64_t key) const {
        Way way = small;
        for (int64_t query = queries.begin; query < queries.end; ++query) {
            const A magnitude = larger_of(q_.magnitude[query], k_.magnitude[key]);
            if (!(magnitude <= Limit::each)) return direct;
            if (q_.largest[query] + k_.largest[key] > Limit::sum) way = clamped;
            if (magnitude > Limit::little && way == small) way = moderate;
        }
        return way;
    }
    // Whether the query has the right sums with any exponentials, and loses no digits by them.
    bool takes_given(int64_t query) const {
        return given_ && q_.magnitude[query] > Limit::little && q_.magnitude[query] <= Limit::lone;
    }
    static A larger_of(A x, A y) { return x > y ? x : y; }

    void scores_of_head(int64_t head, Range queries, Range keys, A* sums, int64_t key_stride, int64_t query_stride) {
        load_weight(head);
        for (int64_t key = keys.begin; !few_ && !only_given_ && key < keys.end; ++key) {
            for (int64_t c = 0; c < width_; c += W) {
                store(k_weighted_ + key * ld_ + c, load(weight_ + c) * load(k_.power + key * ld_ + c));
            }
        }
        Vec<A> found[W];
        A* to[W];
        int count = 0;
        for (int64_t query = queries.begin; query < queries.end; query += kTogether) {
            const int64_t some = smaller(kTogether, queries.end - query);
            for (int64_t key = keys.begin; key < keys.end; ++key) {
                Vec<A> sum[kTogether];
                score_some(query, some, key, sum);
                for (int64_t r = 0; r < some; ++r) {
                    to[count] = sums + key * key_stride + (query + r) * query_stride;
                    found[count++] = sum[r];
                    if (count == W) add_lanes(found, to, count);
                }
            }
        }
        add_lanes(found, to, count);
    }

    // *to[r] = the sum of the lanes of x[r], by the weight as it was.
    void add_lanes(Vec<A>* x, A* const* to, int& count) const {
        for (int r = count; r < W; ++r) x[r] = Vec<A>{};
        const Vec<A> sums = sums_of_lanes<A>(x) * unit_;
        for (int r = 0; r < count; ++r) *to[r] = sums[r];
        count = 0;
    }

    void score_some(int64_t query, int64_t some, int64_t key, Vec<A>* sums) const {
        Way ways[kTogether];
        bool alike = some == kTogether;
        for (int64_t r = 0; r < some; ++r) {
            ways[r] = takes_given(query + r) ? given : few_ ? direct : way_by_size({query + r, query + r + 1}, key);
            alike &= ways[r] == ways[0];
        }
        if (alike && ways[0] != direct) return score_as<kTogether>(ways[0], query, key, sums);
        for (int64_t r = 0; r < some; ++r) score_as<1>(ways[r], query + r, key, sums + r);
    }

    template <int R>
    void score_as(Way way, int64_t query, int64_t key, Vec<A>* sums) const {
        switch (way) {
            case small: return score_by<small, R>(query, key, sums);
            case moderate: return score_by<moderate, R>(query, key, sums);
            case clamped: return score_by<clamped, R>(query, key, sums);
            case given: return score_by<given, R>(query, key, sums);
            case direct: return score_by<direct, R>(query, key, sums);
        }
    }

    template <Way way, int R>
    void score_by(int64_t query, int64_t key, Vec<A>* sums) const {
        Vec<A> sum[R] = {};
        int64_t c = 0;
        for (; c + 4 * W <= width_; c += 4 * W) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const Fraction a = term<way>(query + r, key, c), b = term<way>(query + r, key, c + W);
                const Fraction d = term<way>(query + r, key, c + 2 * W), e = term<way>(query + r, key, c + 3 * W);
                const Fraction all = add(add(a, b), add(d, e));
                sum[r] += all.top / all.bottom;
            }
        }
        for (; c < width_; c += W) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const Fraction one = term<way>(query + r, key, c);
                sum[r] += one.top / one.bottom;
            }
        }
        for (int r = 0; r < R; ++r) sums[r] = sum[r];
    }

    static Fraction add(Fraction x, Fraction y) {
        return {x.top * y.bottom + y.top * x.bottom, x.bottom * y.bottom};
    }

    // weight * tanh(q + k) of W columns.
    template <Way way>
    Fraction term(int64_t query, int64_t key, int64_t c) const {
        const Vec<A> w = load(weight_ + c);
        if constexpr (way == moderate) {
            const Vec<A> u = load(q_.power + query * ld_ + c);
            return {u * load(k_weighted_ + key * ld_ + c) - w, u * load(k_.power + key * ld_ + c) + A(1)};
        }
        const Fraction t = fraction<way>(query, key, c);
        return {t.top * w, t.bottom};
    }

    // tanh(q + k) of W columns.
    template <Way way>
    Fraction fraction(int64_t query, int64_t key, int64_t c) const {
        const int64_t q = query * ld_ + c, k = key * ld_ + c;
        if constexpr (way == direct) {
            Vec<A> x = load(q_.plain + q) + load(k_.plain + k), top;
            x = x > Limit::flat ? fill<A>(Limit::flat) : x;  // a NaN stays one, here and below
            exp<A>((x < -Limit::flat ? fill<A>(-Limit::flat) : x) * A(2), top);
            return {top, top + A(2)};
        }
        const A* const powers = way == given ? exp_keys_ + key * exp_ld_ + c : k_.power + k;
        const Vec<A> u = load(q_.power + q), v = load(powers), bottom = u * v + A(1);
        if constexpr (way == small) return {load(q_.less_one + q) * v + load(k_.less_one + k), bottom};
        if constexpr (way == moderate) return {u * v - A(1), bottom};
        const Vec<A> most = fill<A>(Limit::most), kept = most < bottom ? most : bottom;
        return {kept - A(2), kept};
    }

    // Columns [c, c + C W), tile by tile: sums of tiles are added up, because one long sum would round more.
    template <int C>
    void gradients_of_columns(int64_t c, const Way* way, Range queries, Range keys, const A* ds, A* d_q_rows,
                              A* d_k_rows) {
        Vec<A> d_weight[C] = {};
        for (int64_t query = queries.begin; query < queries.end; ++query) {
            for (int s = 0; s < C; ++s) store(d_q_ + query * ld_ + c + s * W, Vec<A>{});
        }
        for (int64_t key = keys.begin; key < keys.end; ++key) {
            Vec<A> d_k[C] = {};
            const A* const own = ds + key * kQueries;
            switch (way[key]) {
                case small: gradients_of_key<small, C>(c, queries, key, own, d_k, d_weight); break;
                case moderate: gradients_of_key<moderate, C>(c, queries, key, own, d_k, d_weight); break;
                case clamped: gradients_of_key<clamped, C>(c, queries, key, own, d_k, d_weight); break;
                default: gradients_of_key<direct, C>(c, queries, key, own, d_k, d_weight);
            }
            for (int s = 0; d_k_rows && s < C; ++s) add_to(d_k_rows + key * width_, c + s * W, d_k[s]);
        }
        for (int64_t query = queries.begin; d_q_rows && query < queries.end; ++query) {
            for (int s = 0; s < C; ++s) add_to(d_q_rows + query * width_, c + s * W, load(d_q_ + query * ld_ + c + s * W));
        }
        for (int s = 0; s < C; ++s) store(d_weight_ + c + s * W, load(d_weight_ + c + s * W) + d_weight[s]);
    }

    // row[c] += weight * x
    void add_to(A* row, int64_t c, Vec<A> x) const { store(row + c, load(row + c) + x * (load(weight_ + c) * unit_)); }

    template <Way way, int C>
    void gradients_of_key(int64_t c, Range queries, int64_t key, const A* ds, Vec<A>* d_k, Vec<A>* d_weight) {
        Vec<A> of_key[C] = {}, of_weight[C] = {};
        for (int64_t query = queries.begin; query < queries.end; ++query) {
            const Vec<A> own = fill<A>(ds[query]);
            Vec<A> t[C];
            tanh_of<way, C>(query, key, c, t);
#pragma GCC unroll 2
            for (int s = 0; s < C; ++s) {
                const Vec<A> slope = (A(1) - t[s] * t[s]) * own;
                A* const d_q = d_q_ + query * ld_ + c + s * W;
                of_key[s] += slope;
                store(d_q, load(d_q) + slope);
                of_weight[s] += t[s] * own;
            }
        }
        for (int s = 0; s < C; ++s) d_k[s] = of_key[s], d_weight[s] += of_weight[s];
    }

    // tanh(q + k) of C W columns, by one division.
    template <Way way, int C>
    void tanh_of(int64_t query, int64_t key, int64_t c, Vec<A>* t) const {
        const Fraction x = fraction<way>(query, key, c);
        if constexpr (C == 1) {
            t[0] = x.top / x.bottom;
        } else {
            const Fraction y = fraction<way>(query, key, c + W);
            const Vec<A> both = A(1) / (x.bottom * y.bottom);
            t[0] = x.top * (both * y.bottom);
            t[1] = y.top * (both * x.bottom);
        }
    }

    const AttentionArgs& args_;
    int64_t width_, ld_;  // columns, padded; and rows in vectors of an odd number, because others meet in few lines of cache
    AdditiveRows<A> q_, k_;
    A* k_weighted_;  // weight * e^2k
    A *d_q_, *weight_, *d_weight_;
    A unit_ = 1;  // what the weight was divided by
    bool few_ = false, given_ = false, only_given_ = false;  // only_given_: all queries take the exponentials given
    const A* exp_keys_ = nullptr;  // where given_, of the tile's first key; rows exp_ld_ apart
    int64_t exp_ld_ = 0;
};

}  // namespace PYATTN_ISA
}  // namespace pyattn
