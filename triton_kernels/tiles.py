"""Tiles of a [rows, head size] matrix: where it starts, loading and storing it with bounds.

Offsets that grow with the tensor are 64-bit scalars. Offsets inside one tile have the type OFFSET: int32, which costs
half the registers and a third of the instructions, unless the host finds a stride that could overflow it.
ALIGN is a number of elements that every stride is a multiple of; it is what lets a row load be one wide instruction.
"""

import triton
import triton.language as tl


@triton.jit
def head_start(ptr, i_b, i_h, row, stride_b, stride_h, stride_row, ALIGN: tl.constexpr):
    """Pointer to the matrix of one batch entry and head, from `row` on, where it is not None."""
    start = i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h
    if row is not None:  # adding 0 would lose the hint: the addition folds away, and the hint with it
        start += row * stride_row
    return ptr + tl.multiple_of(start, ALIGN)


@triton.jit
def statistics_start(ptr, i_b, i_h, H, M, row):
    """Pointer to the statistics [b, H, M] of one batch entry and head, from `row` on, where it is not None."""
    start = (i_b * H + i_h).to(tl.int64) * M
    if row is not None:
        start += row
    return ptr + start


@triton.jit
def _tile_ptrs(
    base, stride, start, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr
):
    first = base + tl.multiple_of(start.to(tl.int64) * stride, ALIGN)
    rows = tl.multiple_of(tl.arange(0, ROWS).to(OFFSET) * stride.to(OFFSET), ALIGN)
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
    ptrs = _tile_ptrs(base, stride, start, ROWS, BLOCK_D, ALIGN, OFFSET)
    if BOUNDED:
        inside = wanted[:, None]
        if HEAD_DIM != BLOCK_D:
            inside = inside & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
        return tl.load(ptrs, mask=inside, other=0.0)
    if HEAD_DIM != BLOCK_D:
        return tl.load(ptrs, mask=(tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], other=0.0)
    return tl.load(ptrs)


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
    ptrs = _tile_ptrs(base, stride, start, ROWS, BLOCK_D, ALIGN, OFFSET)
    inside = wanted[:, None]
    if HEAD_DIM != BLOCK_D:
        inside = inside & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    tl.store(ptrs, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def score_ptrs(base, start_m, start_n, rows, cols, stride_m, stride_n, OFFSET: tl.constexpr):
    """Pointers into a tensor of the scores' shape: queries `start_m + rows`, keys `start_n + cols`, which broadcast."""
    first = base + (start_m * stride_m + start_n * stride_n)
    return first + (rows.to(OFFSET) * stride_m.to(OFFSET) + cols.to(OFFSET) * stride_n.to(OFFSET))
