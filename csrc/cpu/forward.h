// Forward: one task per (batch, head, tile of queries), online softmax over tiles of keys.
// Source: Dao, "FlashAttention-2", arXiv:2307.08691, Algorithm 1.
#pragma once

#include "parallel.h"
#include "score.h"

namespace pyattn {
namespace PYATTN_ISA {

template <class T>
class Forward {
    using A = Accumulator<T>;
    static constexpr int W = kWidth<A>;

  public:
    static void run(const AttentionArgs& args) {
        const int64_t tiles = (args.m + kQueries - 1) / kQueries;
        Scratch count(nullptr);
        const Forward measure(args, count);
        parallel_for(args.b * args.h * tiles, args.threads, count.used(), task, &args);
    }

  private:
    static void task(const void* context, int64_t number, void* block) {
        const AttentionArgs& args = *static_cast<const AttentionArgs*>(context);
        const int64_t tiles = (args.m + kQueries - 1) / kQueries;
        Scratch scratch(block);
        Forward forward(args, scratch);
        // The last tile first: under a causal mask it is the longest.
        const int64_t tile = tiles - 1 - number % tiles, head = number / tiles % args.h;
        forward.attend(number / tiles / args.h, head, tile * kQueries);
    }

    Forward(const AttentionArgs& args, Scratch& scratch)
        : args_(args),
          q_t_(scratch.take<A>(padded<A>(args.d) * kQueries)),
          out_t_(scratch.take<A>(padded<A>(args.dv) * kQueries)),
          rows_(scratch.take<A>(kQueries * padded<A>(larger(args.d, args.dv)))),
          scores_(scratch.take<A>(kKeys * kQueries)),
          k_rows_(scratch.take<A>(kKeys * padded<A>(args.d))),
          v_rows_(scratch.take<A>(kKeys * padded<A>(args.dv))),
          visible_(scratch.take<A>(kKeys * kQueries)),
          bias_tile_(scratch.take<A>(args.bias ? kKeys * kQueries : 0)),
          bias_rows_(scratch.take<A>(args.bias ? kKeys * kQueries : 0)),
          keep_(scratch.take<A>(args.dropout ? kKeys * kQueries : 0)),
          row_max_(scratch.take<A>(kQueries)),
          row_sum_(scratch.take<A>(kQueries)),
          rescale_(scratch.take<A>(kQueries)) {}

    void attend(int64_t batch, int64_t head, int64_t i) {
        const int64_t queries = smaller(kQueries, args_.m - i), lanes = padded<A>(queries);
        const Mask<A> mask(args_, batch, head);
        const Score<A> score(args_, batch, head, bias_tile_, bias_rows_);
        const int64_t kv_head = head / (args_.h / args_.hk);
        start(batch, head, i, queries, lanes);
        const Range keys = mask.keys(i, queries);
        bool any = false;
        for (int64_t j = keys.begin / kKeys * kKeys; j < keys.end; j += kKeys) {
            const int64_t count = smaller(kKeys, keys.end - j);
            const Sight sight = mask.look(i, queries, j, count, visible_, seen_);
            if (sight == Sight::none) continue;
            const bool all = sight == Sight::all;
            const Lanes<const A> k = load_rows<T>(row_pointer<T>(args_.k, batch, kv_head, j), args_.k.stride[2],
                                                  count, args_.d, k_rows_, all ? nullptr : seen_, false);
            gemm<A>(lanes, count, args_.d, {q_t_, kQueries}, {k.ptr, k.ld, 1}, {scores_, kQueries}, {false, nullptr});
            const A factor = score.apply(scores_, i, queries, j, count, lanes, all ? nullptr : visible_, nullptr);
            softmax(lanes, count, factor);
            if (args_.dropout) drop(batch, head, i, j, count, lanes);
            const Lanes<const A> v = load_rows<T>(row_pointer<T>(args_.v, batch, kv_head, j), args_.v.stride[2],
                                                  count, args_.dv, v_rows_, all ? nullptr : seen_, false);
            gemm<A>(lanes, args_.dv, count, {scores_, kQueries}, {v.ptr, 1, v.ld}, {out_t_, kQueries}, {any, rescale_});
            any = true;
        }
        finish(batch, head, i, queries, lanes, any);
    }

    void start(int64_t batch, int64_t head, int64_t i, int64_t queries, int64_t lanes) {
        const Lanes<const A> q = load_rows<T>(row_pointer<T>(args_.q, batch, head, i), args_.q.stride[2], queries,
                                              args_.d, rows_, nullptr, true);
        transpose<A>(q, queries, args_.d, {q_t_, kQueries}, lanes);
        const A sink = args_.sinks ? static_cast<const A*>(args_.sinks)[head] : -static_cast<A>(INFINITY);
        for (int64_t lane = 0; lane < lanes; ++lane) {
            row_max_[lane] = sink;
            row_sum_[lane] = sink == -static_cast<A>(INFINITY) ? A(0) : A(1);
        }
    }

    // scores -> exp(factor * scores - running maximum), and the factor by which the earlier part of the row shrinks.
    void softmax(int64_t lanes, int64_t keys, A factor) {
        for (int64_t lane = 0; lane < lanes; lane += W) {
            const Vec<A> old_max = load(row_max_ + lane);
            Vec<A> tile_max = load(scores_ + lane);
            for (int64_t key = 1; key < keys; ++key) {
                tile_max = running_max<A>(tile_max, load(scores_ + key * kQueries + lane));
            }
            const Vec<A> top = running_max<A>(old_max, tile_max * factor);
            // A row that has seen nothing yet has a maximum of -inf; subtracting 0 then gives weights of 0, not NaN.
            const Vec<A> shift = top == -static_cast<A>(INFINITY) ? Vec<A>{} : top;
            const Vec<A> shrink = exp<A>(old_max - shift);
            Vec<A> sum = {};
            for (int64_t key = 0; key < keys; ++key) {
                A* at = scores_ + key * kQueries + lane;
                const Vec<A> p = exp<A>(load(at) * factor - shift);
                sum += p;
                store(at, p);
            }
            store(row_max_ + lane, top);
            store(row_sum_ + lane, load(row_sum_ + lane) * shrink + sum);
            store(rescale_ + lane, shrink);
        }
    }

    void drop(int64_t batch, int64_t head, int64_t i, int64_t j, int64_t keys, int64_t lanes) {
        draw_keep<A>(args_, batch, head, i, j, keys, keep_);
        for (int64_t key = 0; key < keys; ++key) {
            for (int64_t lane = 0; lane < lanes; lane += W) {
                const int64_t at = key * kQueries + lane;
                store(scores_ + at, load(scores_ + at) * load(keep_ + at));
            }
        }
    }

    // out = accumulated / row_sum, lse = max + log(row_sum); a row that sees nothing has 0 and -inf.
    void finish(int64_t batch, int64_t head, int64_t i, int64_t queries, int64_t lanes, bool any) {
        A* lse = static_cast<A*>(args_.lse) + (batch * args_.h + head) * args_.m + i;
        for (int64_t query = 0; query < queries; ++query) lse[query] = row_max_[query] + std::log(row_sum_[query]);
        for (int64_t column = 0; column < args_.dv; ++column) {
            for (int64_t lane = 0; lane < lanes; lane += W) {
                A* at = out_t_ + column * kQueries + lane;
                const Vec<A> sum = load(row_sum_ + lane);
                store(at, !any || sum == A(0) ? Vec<A>{} : load(at) / sum);
            }
        }
        const int64_t width = padded<A>(args_.dv);
        transpose<A>({out_t_, kQueries}, args_.dv, lanes, {rows_, width}, width);
        T* out = const_cast<T*>(row_pointer<T>(args_.out, batch, head, i));
        store_rows<T>({rows_, width}, queries, args_.dv, A(1), out, args_.out.stride[2]);
    }

    const AttentionArgs& args_;
    A *q_t_, *out_t_, *rows_, *scores_, *k_rows_, *v_rows_, *visible_, *bias_tile_, *bias_rows_, *keep_;
    A *row_max_, *row_sum_, *rescale_;
    uint8_t seen_[kKeys];
};

}  // namespace PYATTN_ISA
}  // namespace pyattn
