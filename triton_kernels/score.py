"""From the products q.k of a tile to its scores: scale, softcap, bias, ALiBi."""

import triton
import triton.language as tl

from .softmax import LOG2_E
from .tiles import score_ptrs


@triton.jit
def tanh(x):
    """After Cephes' tanhf: a polynomial near 0, where 1 - e^-2x would cancel; (1 - e^-2x) / (1 + e^-2x) elsewhere."""
    z = x * x
    small = (((z * -5.70498872745e-3 + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
    small = x + x * z * (small - 3.33332819422e-1)
    e = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    large = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def load_slope(slopes_ptr, number):
    """ALiBi's; None where slopes_ptr is."""
    slope = slopes_ptr
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + number)
    return slope


@triton.jit
def to_scores(
    s,
    start_m,
    start_n,
    rows,
    cols,
    M,
    N,
    offset,
    magnitude,
    softcap,
    slope,
    bias_base,
    stride_bias_m,
    stride_bias_n,
    OFFSET: tl.constexpr,
):
    """Products s of the queries `start_m + rows` and keys `start_n + cols`, which broadcast, in either orientation.

    `softcap`, `slope` and `bias_base` are None where the call has none. Returns the logits, or s itself if it has none
    of the three, whose scale is left to the exponential; and the softcap's tanh, or s.
    """
    t = s
    if softcap is not None:
        t = tanh(s * magnitude)
        s = t * softcap
    elif bias_base is not None or slope is not None:
        s = s * magnitude
    if bias_base is not None:
        ptrs = score_ptrs(bias_base, start_m, start_n, rows, cols, stride_bias_m, stride_bias_n, OFFSET)
        inside = (start_m + rows < M) & (start_n + cols < N)
        s += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
    if slope is not None:
        s -= slope * tl.abs(start_m + rows + offset - (start_n + cols)).to(tl.float32)
    return s, t


@triton.jit
def through_softcap(ds, t, softcap):
    """From the gradient of the logits to that of scale * q.k; t is the softcap's tanh."""
    if softcap is not None:
        # Where a pair is not seen, ds is 0 and t may be anything.
        ds = tl.where(ds == 0.0, 0.0, ds * (1 - t * t))
    return ds
