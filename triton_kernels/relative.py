"""The relative term of scores: relative_q_i . r, with r the row of relative_k for the distance from key j to query i.

A square tile of BLOCK queries and keys has 2 * BLOCK - 1 distances. Two products [query, row] with BLOCK rows of
relative_k each, `low` and then `high`, hold the scores of all of them; query i of the tile needs the columns from i on
of the first and those before i of the second. These make one tile again, which only has to be turned. So the shift of
the whole matrix that Dai et al. (2019, arXiv:1901.02860, appendix B) make is one within a tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Relative(NamedTuple):
    """The operands of the term as the kernels take them: contiguous, with rows of whole 16 bytes."""

    q: Tensor  # [b, h, m, size]
    k: Tensor  # [1|b, h, distances, size], of the distances that queries and keys have inside the band
    first: int  # the distance of the first row of k
    rows: slice  # which rows of relative_k those are

    @classmethod
    def of(cls, relative_q: Tensor, relative_k: Tensor, first: int, lowest: int, highest: int) -> Relative:
        """As `pyattn.spec` has them, of the distances from the lowest to the highest that some pair has."""
        rows = slice(lowest - first, highest - first + 1) if lowest <= highest else slice(0, 0)
        return cls(_whole(relative_q), _whole(relative_k[:, :, rows]), lowest, rows)

    def arguments(self) -> dict[str, Any]:
        """As the kernels take them; rk_heads are the heads between one batch entry of k and the next."""
        batch, h, distances, size = self.k.shape
        return {
            "rq_ptr": self.q, "rk_ptr": self.k, "rk_heads": h if batch > 1 else 0,
            "distances": distances, "first_distance": self.first, "HEAD_DIM_E": size,
            "BLOCK_E": max(16, triton.next_power_of_2(size)),
        }  # fmt: skip

    def like(self, gradient: Tensor) -> Relative:
        """Room for gradients of the operands, in a dtype."""
        return self._replace(
            q=torch.empty_like(self.q, dtype=gradient.dtype), k=torch.empty_like(self.k, dtype=gradient.dtype)
        )

    def store(self, d_relative_q: Tensor, d_relative_k: Tensor) -> None:
        """Writes self, gradients of the operands, as those of what they were made of."""
        d_relative_q.copy_(self.q[..., : d_relative_q.shape[3]])
        d_relative_k.zero_()[:, :, self.rows].copy_(self.k[..., : d_relative_k.shape[3]])


NO_RELATIVE: dict[str, Any] = {
    **dict.fromkeys(("rq_ptr", "rk_ptr", "rk_heads", "distances", "first_distance")),
    "HEAD_DIM_E": 0, "BLOCK_E": 0,
}  # fmt: skip


def _whole(t: Tensor) -> Tensor:
    width = 16 // t.element_size()
    return torch.nn.functional.pad(t, (0, -t.shape[3] % width)).contiguous()


@triton.jit
def load_rows(base, start, n_rows, HEAD_DIM_E: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Rows `start ...` [ROWS, BLOCK_E] of a contiguous matrix [n_rows, HEAD_DIM_E]; 0 outside it."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_E)
    inside = ((start + rows >= 0) & (start + rows < n_rows))[:, None]
    if HEAD_DIM_E != BLOCK_E:
        inside = inside & (cols < HEAD_DIM_E)[None, :]
    first = base + start.to(tl.int64) * HEAD_DIM_E
    # [ROWS, BLOCK_E]
    return tl.load(first + (rows[:, None] * HEAD_DIM_E + cols[None, :]), mask=inside, other=0.0)


@triton.jit
def store_rows(base, start, n_rows, tile, HEAD_DIM_E: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Rounds `tile` [ROWS, BLOCK_E] to the matrix's dtype and writes what of it is inside [n_rows, HEAD_DIM_E]."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_E)
    inside = ((start + rows >= 0) & (start + rows < n_rows))[:, None] & (cols < HEAD_DIM_E)[None, :]
    first = base + start.to(tl.int64) * HEAD_DIM_E
    tl.store(first + (rows[:, None] * HEAD_DIM_E + cols[None, :]), tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def matrix_start(ptr, number, rows, HEAD_DIM_E: tl.constexpr):
    """Pointer to one of matrices [rows, HEAD_DIM_E] that follow one another."""
    return ptr + number.to(tl.int64) * rows * HEAD_DIM_E


@triton.jit
def load_low_and_high(base, row, distances, HEAD_DIM_E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """The rows of relative_k for a tile, twice [BLOCK, BLOCK_E]; `row` is that of its first query and first key."""
    low = load_rows(base, row - (BLOCK - 1), distances, HEAD_DIM_E, BLOCK, BLOCK_E)
    return low, load_rows(base, row + 1, distances, HEAD_DIM_E, BLOCK, BLOCK_E)


@triton.jit
def turning(start, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """i - c - 1 for the tile's rows i and columns c, and a multiple of 2 * BLOCK; transposed where KEYS is 0.

    start: any multiple of BLOCK that changes in the loop. Without it the compiler would compute all that follows from
    the numbers once, before the loop, and keep it in more registers than there are.
    """
    index = tl.arange(0, BLOCK)
    turns = index[:, None] - index[None, :] if KEYS == 1 else index[None, :] - index[:, None]
    return turns + (2 * start - 1)


@triton.jit
def of_low(turns, BLOCK: tl.constexpr):
    """Which columns [query, row] are of the low rows: those from i on."""
    return turns & BLOCK != 0


@triton.jit
def turn(tile, turns, KEYS: tl.constexpr):
    """Between columns of keys and columns of rows: column c of row i is column i - c - 1 of the other, and around.

    Undoes itself. KEYS is the axis of the columns, 0 in a tile that is transposed.
    """
    return tl.gather(tile, turns & (tile.shape[0] - 1), KEYS)


@triton.jit
def relative_products(rq_tile, low, high, start, KEYS: tl.constexpr):
    """The term of a tile [query, key], float32; [key, query] where KEYS is 0. start: as `turning` has it."""
    if KEYS == 1:
        of_rows_low = tl.dot(rq_tile, tl.trans(low), input_precision="ieee")
        of_rows_high = tl.dot(rq_tile, tl.trans(high), input_precision="ieee")
    else:
        of_rows_low = tl.dot(low, tl.trans(rq_tile), input_precision="ieee")
        of_rows_high = tl.dot(high, tl.trans(rq_tile), input_precision="ieee")
    turns = turning(start, low.shape[0], KEYS)
    return turn(tl.where(of_low(turns, low.shape[0]), of_rows_low, of_rows_high), turns, KEYS)


@triton.jit
def add_query_gradient(drq, ds, low, high, start):
    """drq [BLOCK, BLOCK_E] and what a tile ds [query, key] gives to it, without the factor scale."""
    turns = turning(start, low.shape[0], 1)
    turned = turn(ds, turns, 1).to(low.dtype)
    is_low = of_low(turns, low.shape[0])
    drq = tl.dot(tl.where(is_low, turned, 0.0), low, drq, input_precision="ieee")
    return tl.dot(tl.where(is_low, 0.0, turned), high, drq, input_precision="ieee")
