// The relative term of scores, relative_q_i . r with r the row of relative_k for the distance from key j to query i.
//
// A tile of queries and keys has kQueries + kKeys - 1 distances, whose rows are taken from the largest one downwards:
// the products [query][distance] then hold every query's scores as one run of neighbours, for each further query one
// place earlier. Read with rows that are one shorter than they are, the runs stand below one another.
// Source: Dai et al. 2019, arXiv:1901.02860, appendix B, whose shift of a whole matrix this is within a tile.
#pragma once

#include "mask.h"

namespace pyattn {
namespace PYATTN_ISA {

template <class T>
class Relative {
    using A = Accumulator<T>;
    using E = Operand<T>;
    static constexpr int W = kWidth<A>;
    static constexpr int kSpan = kQueries + kKeys;
    static constexpr int kFirst = kQueries - 1;  // where the first query's run begins

  public:
    Relative(const AttentionArgs& args, Scratch& scratch)
        : args_(args),
          q_rows_(scratch.take<E>(here() * kQueries * round_up(operands<E>(args.e), W))),
          k_rows_(scratch.take<E>(here() * kSpan * round_up(operands<E>(args.e), W))),
          k_turned_(scratch.take<E>(here() * kSpan * round_up(operands<E>(args.e), W))),
          products_(scratch.take<A>(here() * kQueries * kSpan)),
          tile_(scratch.take<A>(here() * kKeys * kQueries)) {}

    static int64_t columns(const AttentionArgs& args) { return padded<A>(args.e); }

    void load_queries(const Rows& rows) {
        if (!args_.relative_k) return;
        rows_ = &rows;
        q_ = rows.template load<E, T>(args_.relative_q, args_.e, q_rows_);
    }

    // Adds the term to the products q.k of keys [j, j + keys), a tile [key][kQueries].
    void add(int64_t j, int64_t keys, int64_t lanes, A* scores) {
        multiply(j);
        transpose<A>({products_ + kFirst, kSpan - 1}, rows_->count, keys, {tile_, kQueries}, lanes);
        for (int64_t key = 0; key < keys; ++key) {
            for (int64_t at = key * kQueries; at < key * kQueries + lanes; at += W) {
                store(scores + at, load(scores + at) + load(tile_ + at));
            }
        }
    }
    // The same to rows [query][kKeys].
    void add_few(int64_t j, int64_t keys, A* scores) {
        multiply(j);
        for (int64_t query = 0; query < rows_->count; ++query) {
            const A* const run = products_ + query * (kSpan - 1) + kFirst;
            for (int64_t key = 0; key < keys; ++key) scores[query * kKeys + key] += run[key];
        }
    }

  private:
    int64_t here() const { return args_.relative_k ? 1 : 0; }

    // The row of relative_k for the largest distance of the tile whose keys begin with j; may be none of its.
    int64_t largest(int64_t j) const {
        return rows_->query[0] + rows_->sequence.offset + kFirst - j - args_.first;
    }

    // Places among the tile's distances, counted from the largest one, that pairs of its queries and keys [j, j + keys)
    // have inside the band.
    Range places(int64_t j, int64_t keys) const {
        const int64_t distance = largest(j) + args_.first;
        return {larger(kQueries - rows_->count, distance - args_.left),
                smaller(kFirst + keys, distance + args_.right + 1)};
    }

    void multiply(int64_t j) {
        const int64_t top = largest(j), stride = args_.relative_k.stride[2];
        uint8_t wanted[kSpan];
        for (int64_t c = 0; c < kSpan; ++c) wanted[c] = 0 <= top - c && top - c < args_.distances;
        const Lanes<const E> k = load_rows(row(top), -stride, kSpan, args_.e, k_rows_, wanted, true);
        transpose<E>(k, kSpan, operands<E>(args_.e), {k_turned_, kSpan}, kSpan);
        gemm<E>(kSpan, rows_->count, operands<E>(args_.e), {k_turned_, kSpan}, {q_.ptr, q_.ld, 1}, {products_, kSpan},
                {false, nullptr});
    }

    const T* row(int64_t number) const {
        const TensorArg& k = args_.relative_k;
        return static_cast<const T*>(k.ptr) + rows_->sequence.entry * k.stride[0] + rows_->head[0] * k.stride[1] +
               number * k.stride[2];
    }

    const AttentionArgs& args_;
    const Rows* rows_ = nullptr;
    E *q_rows_, *k_rows_, *k_turned_;
    A *products_, *tile_;
    Lanes<const E> q_{};

    template <class>
    friend class RelativeGradient;
};

// The gradients of the term, without the factor `scale`.
template <class T>
class RelativeGradient {
    using A = Accumulator<T>;
    using E = Operand<T>;
    static constexpr int W = kWidth<A>;
    static constexpr int kSpan = Relative<T>::kSpan, kFirst = Relative<T>::kFirst;

  public:
    RelativeGradient(const AttentionArgs& args, const Relative<T>& forward, Scratch& scratch)
        : args_(args),
          forward_(forward),
          width_(Relative<T>::columns(args)),
          runs_(scratch.take<A>(forward.here() * kQueries * kSpan)),
          pairs_(scratch.take<E>(kStep<E> == 1 ? 0 : forward.here() * kQueries / 2 * kSpan)),
          q_across_(scratch.take<E>(forward.here() * kQueries * width_)),
          k_across_(scratch.take<E>(forward.here() * kSpan * width_)),
          d_q_(scratch.take<A>(forward.here() * kQueries * width_)) {}

    // wanted: which queries see anything; null where all do.
    void load_queries(const Rows& rows, const uint8_t* wanted) {
        if (!args_.relative_k) return;
        const T* const q = query_row<const T>(args_.relative_q, rows.sequence, rows.head[0], rows.query[0]);
        q_ = load_rows_across(q, args_.relative_q.stride[2], rows.count, args_.e, q_across_, wanted, true);
        std::memset(d_q_, 0, static_cast<size_t>(kQueries * width_) * sizeof(A));
    }

    // ds: [key][kQueries] of keys [j, j + keys). d_k: the head's rows of relative_k, [distance][padded e].
    void add(int64_t j, int64_t keys, int64_t lanes, const A* ds, A* d_k) {
        const int64_t count = forward_.rows_->count, top = forward_.largest(j);
        std::memset(runs_, 0, static_cast<size_t>(kQueries * kSpan) * sizeof(A));
        transpose<A>({ds, kQueries}, keys, lanes, {runs_ + kFirst, kSpan - 1}, round_up(keys, W));
        const Range places = forward_.places(j, keys);
        gemm<E>(width_, places.end - places.begin, operands<E>(count), q_, {across() + places.begin, 1, kSpan},
                {d_k + (top - places.begin) * width_, -width_}, {true, nullptr});
        // All other rows have gradients of 0 here, of which a product with a NaN would make one.
        uint8_t wanted[kSpan];
        for (int64_t c = 0; c < kSpan; ++c) wanted[c] = places.begin <= c && c < places.end;
        const Lanes<const E> k = load_rows_across(forward_.row(top), -args_.relative_k.stride[2], kSpan, args_.e,
                                                  k_across_, wanted, true);
        const E* const along = along_lanes<E>(runs_, 2 * count, kQueries);  // every run in two halves
        for (int64_t half = 0; half < 2; ++half) {
            const int64_t depth = operands<E>(kQueries);
            gemm<E>(width_, count, depth, {k.ptr + half * depth * k.ld, k.ld}, {along + half * kQueries, kSpan, 1},
                    {d_q_, width_}, {true, nullptr});
        }
    }

    // What a pair has too much of dS out of both gradients.
    void correct_query(int64_t lane, int64_t key, A amount) {
        const T* const k = forward_.row(distance(lane, key));
        A* const to = d_q_ + lane * width_;
        for (int64_t c = 0; c < args_.e; ++c) to[c] -= amount * static_cast<A>(widen(k[c]));
    }
    void correct_key(int64_t lane, int64_t key, A amount, A* d_k) const {
        const Rows& rows = *forward_.rows_;
        const T* const q = query_row<const T>(args_.relative_q, rows.sequence, rows.head[lane], rows.query[lane]);
        A* const to = d_k + distance(lane, key) * width_;
        for (int64_t c = 0; c < args_.e; ++c) to[c] -= amount * static_cast<A>(widen(q[c]));
    }

    void store_queries() const {
        const Rows& rows = *forward_.rows_;
        for (int64_t lane = 0; lane < rows.count; ++lane) {
            store_row(d_q_ + lane * width_, args_.e, static_cast<A>(args_.scale),
                      query_row<T>(args_.d_relative_q, rows.sequence, rows.head[lane], rows.query[lane]));
        }
    }

  private:
    int64_t distance(int64_t lane, int64_t key) const { return forward_.largest(key) - kFirst + lane; }

    // The runs with the depth across queries.
    const E* across() {
        if constexpr (kStep<E> == 1) {
            return runs_;
        } else {
            for (int64_t query = 0; query < kQueries; query += 2) {
                const A* const low = runs_ + query * kSpan;
                for (int64_t c = 0; c < kSpan; c += W) {
                    store(pairs_ + query / 2 * kSpan + c, Product<E>::across(load(low + c), load(low + kSpan + c)));
                }
            }
            return pairs_;
        }
    }

    const AttentionArgs& args_;
    const Relative<T>& forward_;
    const int64_t width_;
    A* runs_;  // [query][distance]: dS where the query's keys are, and zeros
    E *pairs_, *q_across_, *k_across_;
    A* d_q_;
    Lanes<const E> q_{};
};

}  // namespace PYATTN_ISA
}  // namespace pyattn
