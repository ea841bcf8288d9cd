// Who sees whom: the one predicate of the contract, per tile.
#pragma once

#include <algorithm>

#include "rows.h"

namespace pyattn {
namespace PYATTN_ISA {

struct Range {
    int64_t begin, end;  // empty ranges have end <= begin
};

// What the lanes of a tile see of its keys.
struct View {
    enum { none, some, all } sight;
    const uint8_t* wanted;  // per key whether a lane sees it; null where every key is seen
};

template <class A>
class Mask {
  public:
    // rows_scratch and tile_scratch: kKeys * kQueries each, used only where there is a boolean mask.
    Mask(const AttentionArgs& args, const Rows& rows, A* rows_scratch, A* tile_scratch)
        : args_(args), rows_(rows), mask_rows_(rows_scratch), mask_tile_(tile_scratch) {
        const Sequence& sequence = rows.sequence;
        const int64_t keys = args.key_lengths ? args.key_lengths[sequence.number] : sequence.n;
        for (int64_t lane = 0; lane < kQueries; ++lane) {
            const int64_t position = rows.query[lane] + sequence.offset;
            int64_t begin = larger(0, position - args.left), end = smaller(keys, position + args.right + 1);
            if (args.row_first && lane < rows.count) {
                const int64_t row = sequence.number * args.m + rows.query[lane];
                begin = larger(begin, args.row_first[row]), end = smaller(end, args.row_stop[row]);
            }
            const bool empty = lane >= rows.count || end <= begin;
            begin_[lane] = empty ? kUnlimited : begin;
            end_[lane] = empty ? 0 : end;
        }
        all_ = keys_of(0, rows.count);
        common_ = {0, kUnlimited};
        for (int64_t lane = 0; lane < rows.count; ++lane) {
            common_ = {larger(common_.begin, begin_[lane]), smaller(common_.end, end_[lane])};
        }
    }

    // Keys that some lane may see by band, window of its own and length.
    Range keys() const { return all_; }

    // The part of keys [j, j + count), counted from j, that some of the lanes may see by band and length. It begins
    // where an operand does.
    Range keys_of(int64_t lane, int64_t lanes, int64_t j, int64_t count) const {
        const Range range = keys_of(lane, lanes);
        return {larger(0, range.begin - j) / 2 * 2, smaller(count, range.end - j)};
    }

    // Fills visible[key][query] with 1 or 0 where the answer is `some`. `seen` is the memory behind View::wanted.
    View look(int64_t j, int64_t keys, A* visible, uint8_t* seen) const {
        const bool in_band = common_.begin <= j && j + keys <= common_.end;
        if (in_band && !args_.mask && one_segment(j, keys) && all_ranked(j, keys)) return {View::all, nullptr};
        int32_t begin[kQueries], end[kQueries];
        for (int64_t lane = 0; lane < kQueries; ++lane) {
            begin[lane] = static_cast<int32_t>(smaller(kKeys, larger(0, begin_[lane] - j)));
            end[lane] = static_cast<int32_t>(smaller(kKeys, larger(0, end_[lane] - j)));
        }
        if (args_.mask) load_mask(j, keys);
        int64_t total = 0, wanted = 0;
        for (int64_t key = 0; key < keys; ++key) {
            A* row = visible + key * kQueries;
            const int32_t at = static_cast<int32_t>(key);
            for (int lane = 0; lane < kQueries; ++lane) row[lane] = begin[lane] <= at && at < end[lane] ? A(1) : A(0);
            if (args_.q_segments) look_segments(j + key, row);
            if (args_.q_ranks) look_ranks(j + key, row);
            if (args_.mask) {
                for (int lane = 0; lane < kQueries; ++lane) row[lane] *= mask_tile_[key * kQueries + lane];
            }
            int32_t count = 0;
            for (int lane = 0; lane < kQueries; ++lane) count += row[lane] != 0;
            seen[key] = count > 0;
            wanted += count > 0;
            total += count;
        }
        if (total == 0) return {View::none, seen};
        return {total == keys * rows_.count ? View::all : View::some, wanted == keys ? nullptr : seen};
    }

    // Queries of a sequence that may see one of the keys [j, j + count) by band and length.
    static Range queries_of(const AttentionArgs& args, const Sequence& sequence, int64_t j, int64_t count) {
        const int64_t keys = args.key_lengths ? args.key_lengths[sequence.number] : sequence.n;
        const int64_t last = smaller(j + count, keys) - 1;
        if (last < j) return {0, 0};
        Range queries{larger(0, j - sequence.offset - args.right),
                      smaller(sequence.m, last - sequence.offset + args.left + 1)};
        if (!args.row_first) return queries;
        const int32_t* const first = args.row_first + sequence.number * args.m;
        const int32_t* const stop = args.row_stop + sequence.number * args.m;
        const auto sees = [&](int64_t i) { return first[i] <= last && j < stop[i] && first[i] < stop[i]; };
        while (queries.begin < queries.end && !sees(queries.begin)) ++queries.begin;
        while (queries.begin < queries.end && !sees(queries.end - 1)) --queries.end;
        return queries;
    }

  private:
    Range keys_of(int64_t lane, int64_t lanes) const {
        Range range{kUnlimited, 0};
        for (int64_t end = smaller(lane + lanes, rows_.count); lane < end; ++lane) {
            range = {smaller(range.begin, begin_[lane]), larger(range.end, end_[lane])};
        }
        return range;
    }

    // Of the batch element: segments or ranks of its rows.
    const int32_t* segments(const int32_t* ids, int64_t length) const {
        return ids + rows_.sequence.number * length;
    }

    bool one_segment(int64_t j, int64_t keys) const {
        if (!args_.q_segments) return true;
        const int32_t* q = segments(args_.q_segments, args_.m);
        const int32_t* k = segments(args_.k_segments, args_.n) + j;
        const int32_t id = q[rows_.query[0]];
        bool same = true;
        for (int64_t lane = 0; lane < rows_.count; ++lane) same &= q[rows_.query[lane]] == id;
        for (int64_t key = 0; key < keys; ++key) same &= k[key] == id;
        return same;
    }

    void look_segments(int64_t key, A* row) const {
        const int32_t* q = segments(args_.q_segments, args_.m);
        const int32_t id = segments(args_.k_segments, args_.n)[key];
        for (int64_t lane = 0; lane < rows_.count; ++lane) row[lane] = q[rows_.query[lane]] == id ? row[lane] : A(0);
    }

    bool all_ranked(int64_t j, int64_t keys) const {
        if (!args_.q_ranks) return true;
        const int32_t* q = segments(args_.q_ranks, args_.m);
        const int32_t* k = segments(args_.k_ranks, args_.n) + j;
        int32_t lowest = INT32_MAX, highest = INT32_MIN;
        for (int64_t lane = 0; lane < rows_.count; ++lane) lowest = std::min(lowest, q[rows_.query[lane]]);
        for (int64_t key = 0; key < keys; ++key) highest = std::max(highest, k[key]);
        return lowest > highest;
    }

    void look_ranks(int64_t key, A* row) const {
        const int32_t* q = segments(args_.q_ranks, args_.m);
        const int32_t rank = segments(args_.k_ranks, args_.n)[key];
        for (int64_t lane = 0; lane < rows_.count; ++lane) row[lane] = q[rows_.query[lane]] > rank ? row[lane] : A(0);
    }

    // The boolean mask is read row by row, as it lies, and turned in registers.
    void load_mask(int64_t j, int64_t keys) const {
        const int64_t width = padded<A>(keys), stride_j = args_.mask.stride[3];
        for (int64_t lane = 0; lane < rows_.count; ++lane) {
            const uint8_t* from = query_row<uint8_t>(args_.mask, rows_.sequence, rows_.head[lane], rows_.query[lane]);
            A* row = mask_rows_ + lane * width;
            if (stride_j == 1) {
                for (int64_t key = 0; key < keys; ++key) row[key] = static_cast<A>(from[j + key]);
            } else {
                for (int64_t key = 0; key < keys; ++key) row[key] = static_cast<A>(from[(j + key) * stride_j]);
            }
            for (int64_t key = keys; key < width; ++key) row[key] = 0;
        }
        transpose<A>({mask_rows_, width}, rows_.count, keys, {mask_tile_, kQueries}, kQueries);
    }

    const AttentionArgs& args_;
    const Rows& rows_;
    A *mask_rows_, *mask_tile_;
    int64_t begin_[kQueries], end_[kQueries];  // keys that a lane may see by band and length; none: kUnlimited, 0
    Range all_, common_;                       // some lane may see; every lane may see
};

}  // namespace PYATTN_ISA
}  // namespace pyattn
