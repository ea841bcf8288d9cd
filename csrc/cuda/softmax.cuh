// Online softmax by the base-2 exponential (arXiv:2307.08691, algorithm 1), and its gradient.
// Scores come in a unit of their own, in which a row's largest is kept. It is subtracted before anything is multiplied,
// so that the largest score leaves exactly 0.
#pragma once

#include "patch.cuh"

template <class Acc> struct Number;
template <> struct Number<float> {
    static constexpr float LARGEST = 3.4e38f;
};
template <> struct Number<double> {
    static constexpr double LARGEST = 1.7e308;
};
constexpr double LOG2_E = 1.4426950408889634;

// exp(logit of score - logit of top) / 2^log_sum.
template <class Acc> DEVICE Acc exp_score(Acc score, Acc top, Acc unit, Acc log_sum = 0) {
    return exp_2((score - top) * unit - log_sum);
}

// While a row has seen nothing its largest score is -inf, and -inf - -inf is NaN: 0 is subtracted instead.
template <class Acc> DEVICE Acc subtracted(Acc largest) { return largest == -infinity<Acc>() ? Acc(0) : largest; }

// Of a lane's two rows. Sums are of the lane's own columns until they are added up at the end.
template <class Acc> struct OnlineSoftmax {
    Acc largest[2] = {-infinity<Acc>(), -infinity<Acc>()}, sum[2] = {0, 0};

    // Turns scores into weights, relative to the largest so far. `rescale` is what all that has been accumulated with
    // earlier weights must be multiplied by.
    template <int TILES> DEVICE void step(Acc (&s)[TILES][4], Acc unit, Acc (&rescale)[2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            Acc top = largest[r];
#pragma unroll
            for (int j = 0; j < TILES; ++j) top = larger(top, larger(s[j][2 * r], s[j][2 * r + 1]));
            top = row_max(top);
            rescale[r] = exp_score(largest[r], subtracted(top), unit);
            sum[r] *= rescale[r];
#pragma unroll
            for (int j = 0; j < TILES; ++j) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    Acc& x = s[j][2 * r + c];
                    x = exp_score(x, subtracted(top), unit);
                    sum[r] += x;
                }
            }
            largest[r] = top;
        }
    }
};

// What a row comes to once it has seen every key.
template <class Acc> struct FinishedRow {
    Acc rescale;  // from what is accumulated to the output
    Acc lse;      // -inf where the row saw nothing
    // What the backward knows weights by, for exp_score; log_sum is +inf where the row saw nothing.
    Acc top, log_sum;
};

// With the sink's logit in the denominator, where there is one.
template <class Acc> DEVICE FinishedRow<Acc> finish_row(Acc largest, Acc sum, const Acc* sink_at, Acc factor) {
    const Acc log2_e = LOG2_E;
    const bool saw_nothing = sum == 0;
    const Acc top = saw_nothing ? Acc(0) : largest;
    Acc largest_logit = top * factor, shrink = saw_nothing ? 0 : 1, total = sum;
    Acc ahead = 0;  // of the sink over the largest logit
    if (sink_at) {
        const Acc sink = smaller(*sink_at, Number<Acc>::LARGEST);  // inf - inf would be NaN
        const Acc lead = sink - largest_logit;
        ahead = saw_nothing ? lead : larger(lead, Acc(0));  // the sum is taken relative to the larger of the two
        shrink = saw_nothing ? Acc(0) : exp_2(-ahead * log2_e);
        total = sum * shrink + (sink == -infinity<Acc>() ? Acc(0) : exp_2((lead - ahead) * log2_e));
        if (ahead == lead) largest_logit = sink;
    }
    if (total == 0) return {shrink, -infinity<Acc>(), top, infinity<Acc>()};
    // Finite, however far the sink is ahead: the row sees something.
    const Acc log_sum = smaller(ahead, Number<Acc>::LARGEST / 2) * log2_e + log_2(total);
    return {shrink / total, largest_logit + log_e(total), top, log_sum};
}

// What a forward has left of a row, and delta.
template <class Acc> struct RowStatistics {
    Acc top = 0, log_sum = infinity<Acc>(), delta = 0, d_lse = 0;
};

// Of row `at` of [b, h, m], without delta; of a row that is not `inside`, what makes all its weights 0.
template <class Acc> DEVICE RowStatistics<Acc> statistics_of(const Args& a, i64 at, bool inside) {
    RowStatistics<Acc> row;
    if (inside) {
        row.top = static_cast<const Acc*>(a.row_max)[at];
        row.log_sum = static_cast<const Acc*>(a.log_sum)[at];
        if (a.d_lse) row.d_lse = static_cast<const Acc*>(a.d_lse)[at];
    }
    return row;
}

// p (dp - delta + d_lse), the gradient of a logit. d_lse joins last: where a row has all its weight on one key
// dp - delta is exactly 0; dp - (delta - d_lse) is not.
template <class Acc> DEVICE Acc score_gradient(Acc p, Acc dp, const RowStatistics<Acc>& row) {
    return p * (dp - row.delta + row.d_lse);
}
