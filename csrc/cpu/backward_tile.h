// The backward's building block: the probabilities and score gradients of one tile, recomputed from lse.
#pragma once

#include "parallel.h"
#include "score.h"

namespace pyattn {
namespace PYATTN_ISA {

// Tiles of P and dS are [key][query]; gradients of k and v are [key][padded column]; that of q is [column][query].
// Source: Dao, "FlashAttention-2", arXiv:2307.08691, Algorithm 2.
template <class T>
class BackwardTile {
  public:
    using A = Accumulator<T>;
    static constexpr int W = kWidth<A>;

    BackwardTile(const AttentionArgs& args, Scratch& scratch)
        : args_(args),
          q_t_(scratch.take<A>(padded<A>(args.d) * kQueries)),
          d_out_t_(scratch.take<A>(padded<A>(args.dv) * kQueries)),
          q_rows_(scratch.take<A>(kQueries * padded<A>(args.d))),
          d_out_rows_(scratch.take<A>(kQueries * padded<A>(args.dv))),
          k_rows_(scratch.take<A>(kKeys * padded<A>(args.d))),
          v_rows_(scratch.take<A>(kKeys * padded<A>(args.dv))),
          p_(scratch.take<A>(kKeys * kQueries)),
          ds_(scratch.take<A>(kKeys * kQueries)),
          visible_(scratch.take<A>(kKeys * kQueries)),
          cap_slope_(scratch.take<A>(args.softcap != 0 ? kKeys * kQueries : 0)),
          bias_tile_(scratch.take<A>(args.bias ? kKeys * kQueries : 0)),
          bias_rows_(scratch.take<A>(args.bias ? kKeys * kQueries : 0)),
          keep_(scratch.take<A>(args.dropout ? kKeys * kQueries : 0)),
          lse_(scratch.take<A>(kQueries)),
          delta_(scratch.take<A>(kQueries)),
          d_lse_(scratch.take<A>(kQueries)) {}

    // Brings queries [i, i + kQueries) of one head into the tile.
    void load_queries(int64_t batch, int64_t head, int64_t i) {
        batch_ = batch, head_ = head, i_ = i;
        queries_ = smaller(kQueries, args_.m - i);
        lanes_ = padded<A>(queries_);
        const int64_t row = (batch * args_.h + head) * args_.m + i;
        const A* lse = static_cast<const A*>(args_.lse) + row;
        const A* delta = static_cast<const A*>(args_.delta) + row;
        const A* d_lse = args_.d_lse ? static_cast<const A*>(args_.d_lse) + row : nullptr;
        bool every = true;
        for (int64_t lane = 0; lane < kQueries; ++lane) {
            // A row that sees nothing, and padding: weights of exp(s - inf) = 0. Its q and d_out are kept out as well.
            const bool sees = lane < queries_ && lse[lane] != -static_cast<A>(INFINITY);
            sees_[lane] = sees;
            every &= sees || lane >= queries_;
            lse_[lane] = sees ? lse[lane] : static_cast<A>(INFINITY);
            delta_[lane] = sees ? delta[lane] : A(0);
            d_lse_[lane] = sees && d_lse ? d_lse[lane] : A(0);
        }
        const uint8_t* wanted = every ? nullptr : sees_;
        q_ = load_rows<T>(row_pointer<T>(args_.q, batch, head, i), args_.q.stride[2], queries_, args_.d, q_rows_,
                          wanted, true);
        d_out_ = load_rows<T>(row_pointer<T>(args_.d_out, batch, head, i), args_.d_out.stride[2], queries_, args_.dv,
                              d_out_rows_, wanted, true);
        transpose<A>(q_, queries_, args_.d, {q_t_, kQueries}, lanes_);
        transpose<A>(d_out_, queries_, args_.dv, {d_out_t_, kQueries}, lanes_);
    }

    Range keys() const { return Mask<A>(args_, batch_, head_).keys(i_, queries_); }

    // Computes P (with dropout) and dS for keys [j, j + count). False: nobody sees anybody, and nothing is computed.
    // dS is the gradient of the logits; through_cap takes it on to that of scale * q.k.
    bool compute(int64_t j, int64_t count, bool through_cap) {
        const Sight sight = Mask<A>(args_, batch_, head_).look(i_, queries_, j, count, visible_, seen_);
        if (sight == Sight::none) return false;
        const bool all = sight == Sight::all;
        const int64_t kv_head = head_ / (args_.h / args_.hk);
        const uint8_t* wanted = all ? nullptr : seen_;
        keys_ = count;
        k_ = load_rows<T>(row_pointer<T>(args_.k, batch_, kv_head, j), args_.k.stride[2], count, args_.d, k_rows_,
                          wanted, false);
        const Lanes<const A> v = load_rows<T>(row_pointer<T>(args_.v, batch_, kv_head, j), args_.v.stride[2], count,
                                              args_.dv, v_rows_, wanted, false);
        gemm<A>(lanes_, count, args_.d, {q_t_, kQueries}, {k_.ptr, k_.ld, 1}, {p_, kQueries}, {false, nullptr});
        const Score<A> score(args_, batch_, head_, bias_tile_, bias_rows_);
        const A factor = score.apply(p_, i_, queries_, j, count, lanes_, all ? nullptr : visible_, cap_slope_);
        gemm<A>(lanes_, count, args_.dv, {d_out_t_, kQueries}, {v.ptr, v.ld, 1}, {ds_, kQueries}, {false, nullptr});
        if (args_.dropout) {
            draw_keep<A>(args_, batch_, head_, i_, j, count, keep_);
            differentiate<true>(factor);
        } else {
            differentiate<false>(factor);
        }
        if (through_cap && args_.softcap != 0) multiply(ds_, cap_slope_);
        return true;
    }

    // d_k_rows, d_v_rows: the rows of the tile's keys. d_k lacks the factor `scale`.
    void add_key_gradients(A* d_k_rows, A* d_v_rows) const {
        const int64_t width = padded<A>(args_.d), width_v = padded<A>(args_.dv);
        gemm<A>(width_v, keys_, queries_, d_out_, {p_, kQueries, 1}, {d_v_rows, width_v}, {true, nullptr});
        gemm<A>(width, keys_, queries_, q_, {ds_, kQueries, 1}, {d_k_rows, width}, {true, nullptr});
    }

    // d_q_t: [d][kQueries], without the factor `scale`.
    void add_query_gradient(A* d_q_t) const {
        gemm<A>(lanes_, args_.d, keys_, {ds_, kQueries}, {k_.ptr, 1, k_.ld}, {d_q_t, kQueries}, {true, nullptr});
    }

    // sum[key][query] += dS
    void add_score_gradient(A* sum) const {
        for (int64_t key = 0; key < keys_; ++key) {
            for (int64_t lane = 0; lane < lanes_; lane += W) {
                A* at = sum + key * kQueries + lane;
                store(at, load(at) + load(ds_ + key * kQueries + lane));
            }
        }
    }

    int64_t queries() const { return queries_; }

  private:
    // factor * logits and dP -> P with dropout and dS = P (dP - delta + d_lse).
    template <bool Dropout>
    void differentiate(A factor) {
        for (int64_t lane = 0; lane < lanes_; lane += W) {
            const Vec<A> lse = load(lse_ + lane), delta = load(delta_ + lane), d_lse = load(d_lse_ + lane);
            for (int64_t at = lane; at < keys_ * kQueries; at += kQueries) {
                const Vec<A> p = exp<A>(load(p_ + at) * factor - lse);
                Vec<A> dp = load(ds_ + at), dropped = p;
                if constexpr (Dropout) {
                    const Vec<A> keep = load(keep_ + at);
                    dp *= keep;
                    dropped *= keep;
                }
                store(p_ + at, dropped);
                // An unseen pair has P = 0; its dP may hold a NaN that others see.
                store(ds_ + at, p == A(0) ? Vec<A>{} : p * ((dp - delta) + d_lse));
            }
        }
    }

    void multiply(A* tile, const A* by) const {
        for (int64_t key = 0; key < keys_; ++key) {
            for (int64_t lane = 0; lane < lanes_; lane += W) {
                const int64_t at = key * kQueries + lane;
                store(tile + at, load(tile + at) * load(by + at));
            }
        }
    }

    const AttentionArgs& args_;
    A *q_t_, *d_out_t_, *q_rows_, *d_out_rows_, *k_rows_, *v_rows_, *p_, *ds_;
    A *visible_, *cap_slope_, *bias_tile_, *bias_rows_, *keep_, *lse_, *delta_, *d_lse_;
    uint8_t seen_[kKeys], sees_[kQueries];
    Lanes<const A> q_, d_out_, k_;
    int64_t batch_, head_, i_, queries_, lanes_, keys_;
};

}  // namespace PYATTN_ISA
}  // namespace pyattn
