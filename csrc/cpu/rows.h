// The queries in the lanes of a tile, and where rows of a sequence lie in the tensors.
#pragma once

#include "plan.h"
#include "tile.h"

namespace pyattn {
namespace PYATTN_ISA {

template <class T>
static inline T* query_row(const TensorArg& tensor, const Sequence& sequence, int64_t head, int64_t i) {
    return static_cast<T*>(tensor.ptr) + sequence.entry * tensor.stride[0] + head * tensor.stride[1] +
           (sequence.q_begin + i) * tensor.stride[2];
}
template <class T>
static inline T* key_row(const AttentionArgs& args, const TensorArg& tensor, const Sequence& sequence, int64_t kv_head,
                         int64_t j) {
    int64_t entry = sequence.entry, row = sequence.k_begin + j;
    if (args.block_table) {
        entry = args.block_table[entry * (args.n / args.page) + row / args.page];
        row %= args.page;
    }
    return static_cast<T*>(tensor.ptr) + entry * tensor.stride[0] + kv_head * tensor.stride[1] + row * tensor.stride[2];
}

// Keys or values [j, j + count), one stride apart: where they lie or, where that is in several pages, a copy.
template <class T>
struct KeyRows {
    const T* ptr;
    int64_t stride;

    KeyRows(const AttentionArgs& args, const TensorArg& tensor, const Sequence& sequence, int64_t kv_head, int64_t j,
            int64_t count, int64_t columns, T* scratch)
        : ptr(key_row<const T>(args, tensor, sequence, kv_head, j)), stride(tensor.stride[2]) {
        if (!args.block_table || j / args.page == (j + count - 1) / args.page) return;
        for (int64_t r = 0; r < count; ++r) {
            const T* const row = key_row<const T>(args, tensor, sequence, kv_head, j + r);
            std::memcpy(scratch + r * columns, row, static_cast<size_t>(columns) * sizeof(T));
        }
        ptr = scratch;
        stride = columns;
    }
};
// Where a query stands in lse and delta.
static inline int64_t statistic(const AttentionArgs& args, const Sequence& sequence, int64_t head, int64_t i) {
    return (sequence.entry * args.h + head) * args.m + sequence.q_begin + i;
}

// Neighbours in one head, or all the queries of a group, head after head.
struct Rows {
    Sequence sequence;
    int64_t kv_head, count;
    int64_t head[kQueries], query[kQueries];

    static Rows of_head(const AttentionArgs& args, const Sequence& sequence, int64_t head, int64_t i) {
        Rows rows;
        rows.sequence = sequence, rows.kv_head = head / (args.h / args.hk);
        rows.count = smaller(kQueries, sequence.m - i);
        for (int64_t lane = 0; lane < kQueries; ++lane) rows.head[lane] = head, rows.query[lane] = i + lane;
        return rows;
    }
    static Rows of_group(const AttentionArgs& args, const Sequence& sequence, int64_t kv_head) {
        const int64_t group = args.h / args.hk;
        Rows rows{sequence, kv_head, sequence.m * group, {}, {}};
        for (int64_t lane = 0; lane < rows.count; ++lane) {
            rows.head[lane] = kv_head * group + lane / sequence.m;
            rows.query[lane] = lane % sequence.m;
        }
        return rows;
    }

    // The rows of q, d_out or out, operands along the row, in whole vectors.
    template <class E, class T>
    Lanes<const E> load(const TensorArg& tensor, int64_t columns, E* scratch) const {
        if (head[0] == head[count - 1]) {
            return load_rows(query_row<const T>(tensor, sequence, head[0], query[0]), tensor.stride[2], count, columns,
                             scratch, nullptr, true);
        }
        const int64_t width = round_up(operands<E>(columns), kWidth<E>);
        for (int64_t lane = 0; lane < count; ++lane) {
            copy_row(query_row<T>(tensor, sequence, head[lane], query[lane]), columns, scratch + lane * width, width);
        }
        return {scratch, width};
    }
};

// Queries that the forward takes together with these: what depends on it, both directions then decide alike.
static inline int64_t together(const AttentionArgs& args, const Rows& rows) {
    const Sequence& sequence = rows.sequence;
    return grouped(args, sequence) ? sequence.m * (args.h / args.hk) : rows.count;
}

// Queries for at most half a vector: lanes are then keys, and columns.
template <class A>
static inline bool are_few(const AttentionArgs& args, const Rows& rows) {
    return 2 * together(args, rows) <= kWidth<A>;
}

}  // namespace PYATTN_ISA
}  // namespace pyattn
