// From the products q.k to scores: scale, softcap, bias, ALiBi.
#pragma once

#include "patch.cuh"

template <class Acc> struct Score {
    Acc value;
    Acc slope;  // of the softcap: what a gradient is multiplied by on its way to scale * q.k
};

// A score stays q.k as long as nothing else is added to it, and its scale is left to the exponential, which takes it to
// a difference: a difference of equal scores is 0 then, however large they are.
template <class T, bool RICH> struct ScoreRule {
    using Acc = typename AccumulatorOf<T>::type;
    const Args& a;
    const Limits& limits;
    int batch;
    Acc magnitude, softcap, alibi[2];  // ALiBi's slopes, of the heads of either row

    DEVICE ScoreRule(const Args& args, const Limits& call_limits, int i_b, int sequence, const int (&head)[2])
        : a(args), limits(call_limits), batch(i_b), magnitude(args.magnitude), softcap(args.softcap) {
        for (int r = 0; r < 2; ++r) alibi[r] = a.slopes ? a.slopes[sequence * a.slope_stride + head[r]] : 0;
    }

    template <bool KEYS_ARE_ROWS>
    DEVICE Score<Acc> operator()(Acc product, const Patch<KEYS_ARE_ROWS>& patch, int j, int e) const {
        Score<Acc> s = {product, 1};
        if constexpr (RICH) {
            const int i = patch.query(j, e), key = patch.key(j, e);
            if (a.softcap > 0) {
                const Acc t = tanh_(product * magnitude);
                s = {t * softcap, 1 - t * t};
            } else if (a.bias.at || a.slopes) {
                s.value *= magnitude;
            }
            if (a.bias.at && i < limits.queries && key < limits.keys) s.value += bias_of(patch.head_of(e), i, key);
            if (a.slopes) {
                const int distance = i + limits.offset - key;
                s.value -= alibi[KEYS_ARE_ROWS ? 0 : e / 2] * static_cast<Acc>(distance < 0 ? -distance : distance);
            }
        }
        return s;
    }

   private:
    DEVICE Acc bias_of(int head, int i, int j) const {
        const i64 at = batch * a.bias.batch + head * a.bias.head + i * a.bias.query + j * a.bias.key;
        return a.bias_is_float ? static_cast<const float*>(a.bias.at)[at] : widen(static_cast<const T*>(a.bias.at)[at]);
    }
};
