"""Tiles of a [rows, head size] matrix: where it starts, loading and storing it with bounds.

Offsets that grow with the tensor are 64-bit scalars. Offsets inside one tile have the type OFFSET: int32, which costs
half the registers and a third of the instructions, unless the host finds a stride that could overflow it.
ALIGN is a number of elements that every stride is a multiple of; it is what lets a row load be one wide instruction.
"""

import triton
import triton.language as tl


@triton.jit
def head_start(ptr, i_b, i_h, stride_b, stride_h, ALIGN: tl.constexpr):
    """Pointer to the matrix of one batch entry and head."""
    return ptr + tl.multiple_of(i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h, ALIGN)


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
