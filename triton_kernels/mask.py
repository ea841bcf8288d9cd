"""The one predicate of who sees whom, for a tile of queries against a tile of keys."""

import triton
import triton.language as tl


@triton.jit
def visible(
    start_m,
    start_n,
    rows,
    cols,
    M,
    n_keys,
    offset,
    left,
    right,
    mask_base,
    stride_mask_m,
    stride_mask_n,
    MASK_CONTIGUOUS: tl.constexpr,
    OFFSET: tl.constexpr,
    q_ids=None,
    k_ids=None,
    q_ranks=None,
    k_ranks=None,
    row_first=None,
    row_stop=None,
):
    """Which keys `start_n + cols` the queries `start_m + rows` see; rows and cols broadcast, in either orientation.

    `left`, `right`, `mask_base`, the rows' and columns' segment ids and ranks, and the rows' windows, all of which
    broadcast as they do, are None where the call has no such limit. Of the mask only elements are read that the other
    limits leave visible.
    """
    i_m = start_m + rows
    j_n = start_n + cols
    see = (i_m < M) & (j_n < n_keys)
    if left is not None:
        see = see & (j_n >= i_m + (offset - left))
    if right is not None:
        see = see & (j_n <= i_m + (offset + right))
    if q_ids is not None:
        see = see & (q_ids == k_ids)
    if q_ranks is not None:
        see = see & (q_ranks > k_ranks)
    if row_first is not None:
        see = see & (j_n >= row_first) & (j_n < row_stop)
    if mask_base is not None:
        first = mask_base + (start_m * stride_mask_m + start_n * stride_mask_n)
        inner_n = cols.to(OFFSET)
        if not MASK_CONTIGUOUS:
            inner_n = inner_n * stride_mask_n.to(OFFSET)
        inner = rows.to(OFFSET) * stride_mask_m.to(OFFSET) + inner_n
        see = see & (tl.load(first + inner, mask=see, other=0) != 0)
    return see


@triton.jit
def drop_unseen(tile, see, HIDES: tl.constexpr):
    """Rows of keys or values that no query of the tile sees as 0: a NaN there would survive a weight of 0.

    Only needed where something may hide keys in the middle of others: what lies outside the band is not loaded.
    """
    if HIDES:
        tile = tl.where((tl.max(see.to(tl.int32), 0) > 0)[:, None], tile, 0.0)
    return tile
