"""Online softmax by the base-2 exponential, the one in hardware (arXiv:2307.08691, algorithm 1), in float32.

Scores s come unscaled and `unit` > 0 is what they are multiplied by. In half precision the unit includes log2(e), so
that scaling, subtracting the maximum and the change of base are one multiply-add; the maximum is then in base-2 units.
For float32 inputs the two roundings of lse's change of base would show: there EXACT holds and units stay natural.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def score_unit(magnitude, EXACT: tl.constexpr):
    """The unit of scores whose scale has this absolute value."""
    return magnitude if EXACT else magnitude * LOG2_E


@triton.jit
def exp_scores(s, unit, subtracted, EXACT: tl.constexpr):
    """exp(scale * s - subtracted), where `subtracted` broadcasts and is in the scores' unit."""
    x = s * unit - subtracted
    if EXACT:
        x = x * LOG2_E
    return tl.exp2(x)


@triton.jit
def softmax_step(s, row_max, row_sum, unit, EXACT: tl.constexpr):
    """Folds the scores s [BLOCK_M, BLOCK_N] in. Returns p [BLOCK_M, BLOCK_N], row_max, row_sum, rescale [BLOCK_M].

    `rescale` is what everything accumulated so far must be multiplied by.
    """
    new_max = tl.maximum(row_max, tl.max(s, 1) * unit)
    # While a row has seen nothing its maximum is -inf, and -inf - -inf is NaN: subtract 0 instead.
    subtracted = tl.where(new_max == float("-inf"), 0.0, new_max)
    # [BLOCK_M, BLOCK_N]
    p = exp_scores(s, unit, subtracted[:, None], EXACT)
    rescale = exp_scores(row_max, 1.0, subtracted, EXACT)
    return p, new_max, row_sum * rescale + tl.sum(p, 1), rescale


@triton.jit
def log_sum_exp(row_max, row_sum, EXACT: tl.constexpr):
    """Natural log of the softmax's denominator [BLOCK_M]; -inf where a row saw nothing."""
    lse = row_max + tl.log(row_sum) if EXACT else (row_max + tl.log2(row_sum)) * LN_2
    return tl.where(row_sum == 0.0, float("-inf"), lse)


@triton.jit
def subtracted_lse(lse, EXACT: tl.constexpr):
    """lse [BLOCK_M] in the scores' unit, for recomputing p; +inf for -inf, so that an empty row's p is 0, not NaN."""
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    return lse if EXACT else lse * LOG2_E
