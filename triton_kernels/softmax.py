"""Online softmax by the base-2 exponential, the one in hardware (arXiv:2307.08691, algorithm 1), in float32.

Scores s come in a unit of their own, in which the running maximum is kept: `factor` > 0 is what makes logits of them,
`unit` is that times log2(e). The maximum is subtracted before anything is multiplied. So the largest score leaves
exactly 0, however large it is, where a multiply-add of its logit would leave half a unit in the last place of it.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp_scores(s, top, unit, log_sum=0.0):
    """exp(logit of s - logit of top) / 2^log_sum, where `top` and `log_sum` broadcast."""
    return tl.exp2((s - top) * unit - log_sum)


@triton.jit
def score_gradient(p, dp, delta, d_lse):
    """p * (dp - delta + d_lse), the gradient of the logits; d_lse is None where there is none.

    It joins last: where a row has all its weight on one key dp - delta is exactly 0; dp - (delta - d_lse) is not.
    """
    ds = dp - delta
    if d_lse is not None:
        ds += d_lse
    return p * ds


@triton.jit
def softmax_step(s, row_max, row_sum, unit):
    """Folds the scores s [BLOCK_M, BLOCK_N] in. Returns p [BLOCK_M, BLOCK_N], row_max, row_sum, rescale [BLOCK_M].

    `rescale` is what everything accumulated so far must be multiplied by.
    """
    new_max = tl.maximum(row_max, tl.max(s, 1))
    # While a row has seen nothing its maximum is -inf, and -inf - -inf is NaN: subtract 0 instead.
    top = tl.where(new_max == float("-inf"), 0.0, new_max)
    # [BLOCK_M, BLOCK_N]
    p = exp_scores(s, top[:, None], unit)
    rescale = exp_scores(row_max, top, unit)
    return p, new_max, row_sum * rescale + tl.sum(p, 1), rescale


@triton.jit
def finish_rows(row_max, row_sum, sinks_ptr, i_h, factor):
    """What the rows [BLOCK_M] come to once they have seen every key, with the sink of head `i_h` in their denominator.

    Returns the factor from what is accumulated to the output; lse, -inf where a row saw nothing; and what the backward
    knows weights by, `top` and `log_sum` of `exp_scores`, the latter +inf where a row saw nothing.
    """
    top = tl.where(row_sum == 0.0, 0.0, row_max)
    largest = top * factor
    total = row_sum
    shrink = tl.where(row_sum == 0.0, 0.0, 1.0)
    ahead = 0.0  # of the sink over the largest logit
    if sinks_ptr is not None:
        sink = tl.minimum(tl.load(sinks_ptr + i_h), 3.4e38)  # inf - inf would be NaN
        lead = sink - largest
        # The sum is taken relative to the larger of the two.
        ahead = tl.where(row_sum == 0.0, lead, tl.maximum(lead, 0.0))
        shrink = tl.where(row_sum == 0.0, 0.0, tl.exp2(ahead * -LOG2_E))
        total = row_sum * shrink + tl.where(sink == float("-inf"), 0.0, tl.exp2((lead - ahead) * LOG2_E))
        largest = tl.where(ahead == lead, sink, largest)
    lse = tl.where(total == 0.0, float("-inf"), largest + tl.log(total))
    # Finite, however far the sink is ahead: the row sees something.
    log_sum = tl.where(total == 0.0, float("inf"), tl.minimum(ahead, 2e38) * LOG2_E + tl.log2(total))
    return shrink / tl.where(total == 0.0, 1.0, total), lse, top, log_sum
