// From q.k to the scores of a tile (softcap, bias, ALiBi, visibility), which are logits but for a factor. Tiles are
// [key][query].
#pragma once

#include "mask.h"

namespace pyattn {
namespace PYATTN_ISA {

// e^(logit - the largest one's). The difference is taken first: it is exact near the largest, however large that is, where
// a multiply-add of the logit would leave half a unit in the last place of a huge number.
template <class A>
PYATTN_INLINE Vec<A> weight(Vec<A> score, Vec<A> largest, A factor) {
    return exp<A>((score - largest) * factor);
}

// A row that has seen nothing yet has a maximum of -inf; subtracting 0 instead gives weights of 0, not NaN.
template <class A>
PYATTN_INLINE Vec<A> subtractable(Vec<A> largest) {
    return largest == -static_cast<A>(INFINITY) ? Vec<A>{} : largest;
}

template <class A>
class Score {
  public:
    // rows_scratch and tile_scratch: kKeys * kQueries each, used only where there is a bias.
    Score(const AttentionArgs& args, const Rows& rows, A* rows_scratch, A* tile_scratch)
        : args_(args),
          rows_(rows),
          scale_(static_cast<A>(args.scale)),
          softcap_(static_cast<A>(args.softcap)),
          bias_rows_(rows_scratch),
          bias_tile_(tile_scratch) {
        for (int64_t lane = 0; args.alibi_slopes && lane < kQueries; ++lane) {
            const bool used = lane < rows.count;
            const int64_t slopes = rows.sequence.number * args.h;
            slope_[lane] = used ? static_cast<A>(args.alibi_slopes[slopes + rows.head[lane]]) : A(0);
            position_[lane] = used ? rows.query[lane] + rows.sequence.offset : 0;
        }
    }

    // What scores are multiplied by to be logits. Where the scale is all that products q.k lack, it is left to the
    // exponential. It is positive, so that a maximum stays one and -inf stays hidden.
    static A factor(const AttentionArgs& args) { return plain(args) ? static_cast<A>(args.scale) : A(1); }

    // Whether `apply` does anything to a tile.
    bool applies(const A* visible) const { return visible || !plain(args_); }

    // Turns products q.k into scores in place; `visible` is null where all of the tile is. With a softcap and a
    // non-null cap_slope, that receives the softcap's derivative.
    void apply(A* tile, int64_t j, int64_t keys, int64_t lanes, const A* visible, A* cap_slope) const {
        if (!plain(args_)) {
            if (softcap_ != 0) {
                apply_softcap(tile, keys, lanes, cap_slope);
            } else {
                apply_scale(tile, keys, lanes);
            }
            if (args_.bias) add_bias(tile, j, keys, lanes);
            if (args_.alibi_slopes) add_alibi(tile, j, keys, lanes);
        }
        if (visible) hide(tile, keys, lanes, visible);
    }

  private:
    // Whether scores are the products themselves.
    static bool plain(const AttentionArgs& args) {
        return args.softcap == 0 && !args.bias && !args.alibi_slopes && static_cast<A>(args.scale) > 0;
    }

    void apply_scale(A* tile, int64_t keys, int64_t lanes) const {
        for (int64_t key = 0; key < keys; ++key) {
            for (int64_t lane = 0; lane < lanes; lane += kWidth<A>) {
                A* at = tile + key * kQueries + lane;
                store(at, load(at) * scale_);
            }
        }
    }

    void apply_softcap(A* tile, int64_t keys, int64_t lanes, A* cap_slope) const {
        const A inner = static_cast<A>(args_.scale / args_.softcap);
        for (int64_t key = 0; key < keys; ++key) {
            for (int64_t lane = 0; lane < lanes; lane += kWidth<A>) {
                const int64_t at = key * kQueries + lane;
                const Vec<A> t = tanh<A>(load(tile + at) * inner);
                store(tile + at, t * softcap_);
                if (cap_slope) store(cap_slope + at, A(1) - t * t);
            }
        }
    }

    void add_bias(A* tile, int64_t j, int64_t keys, int64_t lanes) const {
        with_dtype(args_.bias_dtype, [&](auto element) { add_bias_of<decltype(element)>(tile, j, keys, lanes); });
    }

    template <class B>
    void add_bias_of(A* tile, int64_t j, int64_t keys, int64_t lanes) const {
        const int64_t stride_j = args_.bias.stride[3], width = padded<A>(keys);
        for (int64_t lane = 0; lane < rows_.count; ++lane) {
            const B* from = query_row<const B>(args_.bias, rows_.sequence, rows_.head[lane], rows_.query[lane]);
            from += j * stride_j;
            A* row = bias_rows_ + lane * width;
            if (stride_j == 1) {
                // Rows lie far apart, so that no hardware foresees the next tile's part of them.
                for (int64_t c = 0; c < keys; c += 64 / static_cast<int64_t>(sizeof(B))) {
                    __builtin_prefetch(from + keys + c);
                }
                for (int64_t key = 0; key < keys; ++key) row[key] = static_cast<A>(widen(from[key]));
            } else {
                for (int64_t key = 0; key < keys; ++key) row[key] = static_cast<A>(widen(from[key * stride_j]));
            }
            for (int64_t key = keys; key < width; ++key) row[key] = 0;
        }
        transpose<A>({bias_rows_, width}, rows_.count, keys, {bias_tile_, kQueries}, lanes);
        for (int64_t key = 0; key < keys; ++key) {
            for (int64_t lane = 0; lane < lanes; lane += kWidth<A>) {
                const int64_t at = key * kQueries + lane;
                store(tile + at, load(tile + at) + load(bias_tile_ + at));
            }
        }
    }

    void add_alibi(A* tile, int64_t j, int64_t keys, int64_t lanes) const {
        for (int64_t key = 0; key < keys; ++key) {
            A* row = tile + key * kQueries;
            for (int64_t lane = 0; lane < lanes; ++lane) {
                const int64_t distance = position_[lane] - (j + key);
                row[lane] -= slope_[lane] * static_cast<A>(distance < 0 ? -distance : distance);
            }
        }
    }

    void hide(A* tile, int64_t keys, int64_t lanes, const A* visible) const {
        for (int64_t key = 0; key < keys; ++key) {
            for (int64_t lane = 0; lane < lanes; lane += kWidth<A>) {
                const int64_t at = key * kQueries + lane;
                const Vec<A> s = load(tile + at);
                store(tile + at, load(visible + at) != A(0) ? s : fill<A>(-static_cast<A>(INFINITY)));
            }
        }
    }

    const AttentionArgs& args_;
    const Rows& rows_;
    A scale_, softcap_;
    A *bias_rows_, *bias_tile_;
    A slope_[kQueries];
    int64_t position_[kQueries];
};

}  // namespace PYATTN_ISA
}  // namespace pyattn
