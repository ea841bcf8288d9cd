// Who sees whom: the one predicate of the contract, per tile.
#pragma once

#include "tile.h"

namespace pyattn {
namespace PYATTN_ISA {

struct Range {
    int64_t begin, end;
};

enum class Sight { none, some, all };

template <class A>
class Mask {
  public:
    Mask(const AttentionArgs& args, int64_t batch, int64_t head)
        : args_(args),
          keys_(args.key_lengths ? args.key_lengths[batch] : args.n),
          q_segments_(args.q_segments ? args.q_segments + batch * args.m : nullptr),
          k_segments_(args.k_segments ? args.k_segments + batch * args.n : nullptr),
          mask_(args.mask ? row_pointer<uint8_t>(args.mask, batch, head, 0) : nullptr) {}

    // Keys that queries [i, i + count) may see by band and length; empty ranges have end <= begin.
    Range keys(int64_t i, int64_t count) const {
        const int64_t begin = larger(0, i + args_.offset - args_.left);
        return {begin, smaller(keys_, i + count - 1 + args_.offset + args_.right + 1)};
    }

    // Queries that may see one of the keys [j, j + count).
    Range queries(int64_t j, int64_t count) const {
        const int64_t last = smaller(j + count, keys_) - 1;
        if (last < j) return {0, 0};
        const int64_t begin = larger(0, j - args_.offset - args_.right);
        return {begin, smaller(args_.m, last - args_.offset + args_.left + 1)};
    }

    // Fills visible[key][query] with 1 or 0 and seen[key] where the answer is `some`; all keys are below keys().end.
    Sight look(int64_t i, int64_t queries, int64_t j, int64_t keys, A* visible, uint8_t* seen) const {
        const bool in_band = j >= i + queries - 1 + args_.offset - args_.left &&
                             j + keys - 1 <= i + args_.offset + args_.right;
        if (in_band && !mask_ && one_segment(i, queries, j, keys)) return Sight::all;
        int64_t total = 0;
        for (int64_t key = 0; key < keys; ++key) {
            A* row = visible + key * kQueries;
            look_band(i, j + key, queries, row);
            if (q_segments_) look_segments(i, j + key, queries, row);
            if (mask_) look_mask(i, j + key, queries, row);
            int64_t count = 0;
            for (int64_t lane = 0; lane < queries; ++lane) count += row[lane] != 0;
            seen[key] = count > 0;
            total += count;
        }
        if (total == 0) return Sight::none;
        return total == keys * queries ? Sight::all : Sight::some;
    }

  private:
    bool one_segment(int64_t i, int64_t queries, int64_t j, int64_t keys) const {
        if (!q_segments_) return true;
        const int32_t id = q_segments_[i];
        bool same = true;
        for (int64_t r = 0; r < queries; ++r) same &= q_segments_[i + r] == id;
        for (int64_t r = 0; r < keys; ++r) same &= k_segments_[j + r] == id;
        return same;
    }

    void look_band(int64_t i, int64_t key, int64_t queries, A* row) const {
        const int first = static_cast<int>(larger(0, smaller(kQueries, key - args_.offset - args_.right - i)));
        const int last = static_cast<int>(larger(-1, smaller(queries - 1, key - args_.offset + args_.left - i)));
        for (int lane = 0; lane < kQueries; ++lane) row[lane] = lane >= first && lane <= last ? A(1) : A(0);
    }

    void look_segments(int64_t i, int64_t key, int64_t queries, A* row) const {
        const int32_t id = k_segments_[key];
        for (int64_t lane = 0; lane < queries; ++lane) row[lane] = q_segments_[i + lane] == id ? row[lane] : A(0);
    }

    void look_mask(int64_t i, int64_t key, int64_t queries, A* row) const {
        const uint8_t* column = mask_ + i * args_.mask.stride[2] + key * args_.mask.stride[3];
        for (int64_t lane = 0; lane < queries; ++lane) {
            row[lane] = column[lane * args_.mask.stride[2]] ? row[lane] : A(0);
        }
    }

    const AttentionArgs& args_;
    int64_t keys_;
    const int32_t* q_segments_;
    const int32_t* k_segments_;
    const uint8_t* mask_;
};

}  // namespace PYATTN_ISA
}  // namespace pyattn
