"""Tiles of a [rows, head size] matrix: where it starts, loading and storing it with bounds.

Offsets that grow with the tensor are 64-bit scalars. Offsets inside one tile have the type OFFSET: int32, which costs
half the registers and a third of the instructions, unless the host finds a stride that could overflow it.
ALIGN is a number of elements that every stride is a multiple of; it is what lets a row load be one wide instruction.
It is said by arithmetic, because a hint is lost wherever the compiler folds or rewrites the operation it stands on.
"""

import triton
import triton.language as tl


@triton.jit
def _aligned(stride, ALIGN: tl.constexpr):
    """The same stride, visibly a multiple of ALIGN."""
    return stride // ALIGN * ALIGN


@triton.jit
def head_start(ptr, i_b, i_h, row, stride_b, stride_h, stride_row, ALIGN: tl.constexpr):
    """Pointer to the matrix of one batch entry and head, from `row` on; the first entry, or row, where that is None."""
    start = i_h.to(tl.int64) * _aligned(stride_h, ALIGN)
    if i_b is not None:
        start += i_b.to(tl.int64) * _aligned(stride_b, ALIGN)
    if row is not None:
        start += row * _aligned(stride_row, ALIGN)
    return ptr + start


@triton.jit
def statistics_start(ptr, i_b, i_h, H, M, row):
    """Pointer to the statistics [b, H, M] of one batch entry and head, from `row` on, where it is not None."""
    start = (i_b * H + i_h).to(tl.int64) * M
    if row is not None:
        start += row
    return ptr + start


@triton.jit
def load_statistic(ptr, i_b, i_h, H, M, row, rows, inside, other):
    """One statistic [b, H, M] of `rows`, which count from `row`; `other` of those not `inside`."""
    return tl.load(statistics_start(ptr, i_b, i_h, H, M, row) + rows, mask=inside, other=other)


@triton.jit
def load_d_lse(ptr, i_b, i_h, H, M, row, rows, inside, AXIS: tl.constexpr):
    """The gradient of lse, as a statistic that broadcasts along AXIS of a tile of scores; None where ptr is."""
    d_lse = ptr
    if ptr is not None:
        d_lse = tl.expand_dims(load_statistic(ptr, i_b, i_h, H, M, row, rows, inside, 0.0), AXIS)
    return d_lse


@triton.jit
def scores_start(ptr, i_b, i_h, stride_b, stride_h):
    """Pointer to the scores of one batch entry and head in a tensor of their shape; None where ptr is."""
    start = ptr
    if ptr is not None:
        start = head_start(ptr, i_b, i_h, None, stride_b, stride_h, None, 1)
    return start


@triton.jit
def tile_ptrs(
    base, stride, start, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr
):
    """Pointers to the rows `start ...` [ROWS, BLOCK_D]."""
    stride = _aligned(stride, ALIGN)
    first = base + start.to(tl.int64) * stride
    rows = tl.arange(0, ROWS).to(OFFSET) * stride.to(OFFSET)
    # [ROWS, BLOCK_D]
    return first + (rows[:, None] + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def load_tile(
    base,
    stride,
    start,
    wanted,
    BOUNDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Rows `start ...` [ROWS, BLOCK_D]; where BOUNDED, rows not `wanted` [ROWS] are not read but 0.

    Columns past HEAD_DIM are 0, so that products over the padded head size are those over the true one.
    """
    ptrs = tile_ptrs(base, stride, start, ROWS, BLOCK_D, ALIGN, OFFSET)
    if BOUNDED:
        inside = wanted[:, None]
        if HEAD_DIM != BLOCK_D:
            inside = inside & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
        return tl.load(ptrs, mask=inside, other=0.0)
    if HEAD_DIM != BLOCK_D:
        return tl.load(ptrs, mask=(tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def page_rows(table, PAGES, page_size, keys, wanted):
    """(page, row) of each of `keys` by one batch element's block table; those not `wanted` are not looked up."""
    page = tl.load(table + keys // page_size, mask=wanted, other=0)
    return tl.minimum(tl.maximum(page, 0), PAGES - 1), keys % page_size  # a wrong page must not be read


@triton.jit
def gather_tile(
    base,
    stride_outer,
    stride,
    outer,
    row,
    wanted,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """As `load_tile`, of the rows `row` [ROWS] of the pages, or the heads, `outer` [ROWS]."""
    start = outer.to(tl.int64) * _aligned(stride_outer, ALIGN) + row * _aligned(stride, ALIGN)
    inside = wanted[:, None]
    if HEAD_DIM != BLOCK_D:
        inside = inside & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    # [ROWS, BLOCK_D]
    return tl.load(base + (start[:, None] + tl.arange(0, BLOCK_D)[None, :]), mask=inside, other=0.0)


@triton.jit
def store_tile(
    base,
    stride,
    start,
    wanted,
    tile,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Rounds `tile` [ROWS, BLOCK_D] to the tensor's dtype and writes its `wanted` rows and true columns."""
    ptrs = tile_ptrs(base, stride, start, ROWS, BLOCK_D, ALIGN, OFFSET)
    inside = wanted[:, None]
    if HEAD_DIM != BLOCK_D:
        inside = inside & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    tl.store(ptrs, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def score_ptrs(base, start_m, start_n, rows, cols, stride_m, stride_n, OFFSET: tl.constexpr):
    """Pointers into a tensor of the scores' shape: queries `start_m + rows`, keys `start_n + cols`, which broadcast."""
    first = base + (start_m * stride_m + start_n * stride_n)
    return first + (rows.to(OFFSET) * stride_m.to(OFFSET) + cols.to(OFFSET) * stride_n.to(OFFSET))
