"""Online softmax by the base-2 exponential, the one in hardware (arXiv:2307.08691, algorithm 1), in float32.

Scores s come unscaled and `unit` > 0 is what they are multiplied by. In half precision the unit includes log2(e), so
that scaling, subtracting the maximum and the change of base are one multiply-add; the maximum is then in base-2 units.
Where NATURAL holds, units stay natural: for float32 inputs, because the two roundings of lse's change of base would
show, and for logits with a bias, which may be near the largest number there is.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def score_unit(magnitude, PLAIN: tl.constexpr, NATURAL: tl.constexpr):
    """The unit of scores: unscaled where PLAIN, with a scale of this absolute value; logits otherwise."""
    unit = magnitude if PLAIN else 1.0
    return unit if NATURAL else unit * LOG2_E


@triton.jit
def exp_scores(s, unit, subtracted, NATURAL: tl.constexpr):
    """exp(scale * s - subtracted), where `subtracted` broadcasts and is in the scores' unit."""
    x = s * unit - subtracted
    if NATURAL:
        x = x * LOG2_E
    return tl.exp2(x)


@triton.jit
def softmax_step(s, row_max, row_sum, unit, NATURAL: tl.constexpr):
    """Folds the scores s [BLOCK_M, BLOCK_N] in. Returns p [BLOCK_M, BLOCK_N], row_max, row_sum, rescale [BLOCK_M].

    `rescale` is what everything accumulated so far must be multiplied by.
    """
    new_max = tl.maximum(row_max, tl.max(s, 1) * unit)
    # While a row has seen nothing its maximum is -inf, and -inf - -inf is NaN: subtract 0 instead.
    subtracted = tl.where(new_max == float("-inf"), 0.0, new_max)
    # [BLOCK_M, BLOCK_N]
    p = exp_scores(s, unit, subtracted[:, None], NATURAL)
    rescale = exp_scores(row_max, 1.0, subtracted, NATURAL)
    return p, new_max, row_sum * rescale + tl.sum(p, 1), rescale


@triton.jit
def first_statistics(sinks_ptr, i_h, BLOCK_M: tl.constexpr, NATURAL: tl.constexpr):
    """row_max and row_sum [BLOCK_M] before any key: the sink's, whose weight goes to no value, or nothing's."""
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    if sinks_ptr is not None:
        sink = tl.minimum(tl.load(sinks_ptr + i_h) * (1.0 if NATURAL else LOG2_E), 3.4e38)  # inf - inf would be NaN
        row_max = tl.zeros([BLOCK_M], dtype=tl.float32) + sink
    return row_max, tl.where(row_max == float("-inf"), 0.0, 1.0)


@triton.jit
def log_sum_exp(row_max, row_sum, NATURAL: tl.constexpr):
    """Natural log of the softmax's denominator [BLOCK_M]; -inf where a row saw nothing."""
    lse = row_max + tl.log(row_sum) if NATURAL else (row_max + tl.log2(row_sum)) * LN_2
    return tl.where(row_sum == 0.0, float("-inf"), lse)


@triton.jit
def subtracted_lse(lse, NATURAL: tl.constexpr):
    """lse [BLOCK_M] in the scores' unit, for recomputing p; +inf for -inf, so that an empty row's p is 0, not NaN."""
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    return lse if NATURAL else lse * LOG2_E
