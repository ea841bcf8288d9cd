"""Additive scores: the sum over columns c of weight_c tanh(q_ic + k_jc), for a tile of queries and keys.

No matrix product is in it: every pair of a query and a key has a tanh of its own in every column. A tile walks over the
columns by pairs, for which it divides once. With u = e^2q, v = e^2k

    tanh(q + k) = (uv - 1) / (uv + 1) = ((u - 1) v + (v - 1)) / (uv + 1)

whose second form is exact for small arguments, too; u, u - 1, v and v - 1 are computed once per row and column, the
`parts`. Where some row of a tile, or the head's weight, is too large for them, the tile takes each tanh as it stands.

`rows` and `cols`, counted from a tile's first query and key, broadcast against each other, in either orientation. The
pointers are those of the first query and key: one register for all, beside which a row is a number in the instruction.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config, launch
from .score import tanh
from .tiles import head_start, tile_ptrs

# Sums over columns are taken in parts of this many, whose rounding adds up less.
CHUNK = tl.constexpr(16)
FEW_COLUMNS = tl.constexpr(128)  # that `scores_of_few` takes at a time
MOST_ROWS = tl.constexpr(64)  # of a tile
_LARGEST = 40.0  # argument whose parts are normal float32 numbers
_LARGEST_SUM = tl.constexpr(16.0)  # of a query and a key, for which the product of two divisors is one
_LARGEST_WEIGHT = 1e9  # for which its product with two such divisors is finite


@triton.jit
def is_mild(q_reach, k_reach):
    """Whether the parts of all rows and keys of a tile will do, also those outside; `_parts` has the reaches."""
    return tl.max(q_reach, 0) + tl.max(k_reach, 0) <= _LARGEST_SUM


@triton.jit
def additive_scores(
    q_parts,
    k_parts,
    rows,
    cols,
    M,
    N,
    in_q,
    in_k,
    mild,
    weight_base,
    NATIVE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The scores [ROWS, COLS], before scaling. What is not `in_q` or not `in_k` is not read but 0."""
    # The product gives the tile the layout of one, a square to each thread, which reads fewer rows than a line would.
    zeros = tl.dot(tl.zeros([ROWS, 16], dtype=tl.float16), tl.zeros([16, COLS], dtype=tl.float16))
    s = zeros
    for first in tl.range(0, HEAD_DIM, CHUNK):
        part = zeros
        for c in tl.range(first, tl.minimum(first + CHUNK, HEAD_DIM), 2):
            w0 = tl.load(weight_base + c)
            w1 = tl.load(weight_base + c + 1)
            if mild:
                n0, d0 = _ratio(q_parts, k_parts, rows, cols, M, N, c, w0)
                n1, d1 = _ratio(q_parts, k_parts, rows, cols, M, N, c + 1, w1)
                part += (n0 * d1 + n1 * d0) * _reciprocal(d0 * d1, NATIVE)
            else:
                part += w0 * _tanh_of_sum(q_parts, k_parts, rows, cols, M, N, in_q, in_k, c)
                part += w1 * _tanh_of_sum(q_parts, k_parts, rows, cols, M, N, in_q, in_k, c + 1)
        s += part
    return s


@triton.jit
def pair_gradients(ds, q_parts, k_parts, rows, cols, M, N, in_q, in_k, mild, c, NATIVE: tl.constexpr):
    """The sums along the lines of a tile of ds (1 - t^2), and of ds t, for the columns c and c + 1: four vectors."""
    # Each branch ends in sums, whose layout is that of ds: the compiler carries none into a branch from behind it.
    if mild:
        n0, d0 = _ratio(q_parts, k_parts, rows, cols, M, N, c, 1.0)
        n1, d1 = _ratio(q_parts, k_parts, rows, cols, M, N, c + 1, 1.0)
        r = _reciprocal(d0 * d1, NATIVE)
        slopes_0, sums_0 = _column_gradient(ds, n0 * (d1 * r))
        slopes_1, sums_1 = _column_gradient(ds, n1 * (d0 * r))
    else:
        slopes_0, sums_0 = _column_gradient(ds, _tanh_of_sum(q_parts, k_parts, rows, cols, M, N, in_q, in_k, c))
        slopes_1, sums_1 = _column_gradient(ds, _tanh_of_sum(q_parts, k_parts, rows, cols, M, N, in_q, in_k, c + 1))
    return slopes_0, slopes_1, sums_0, sums_1


@triton.jit
def _column_gradient(ds, t):
    return tl.sum(ds * (1 - t * t), 1), tl.sum(ds * t, 1)


@triton.jit
def _ratio(q_parts, k_parts, rows, cols, M, N, c, w):
    """Numerator, times w, and denominator of tanh(q_ic + k_jc)."""
    q_parts += c * 3 * M.to(tl.int64)
    k_parts += c * 3 * N.to(tl.int64)
    u = tl.load(q_parts + rows)
    u_1 = tl.load(q_parts + M + rows) * w
    v = tl.load(k_parts + cols)
    v_1 = tl.load(k_parts + N + cols) * w
    return u_1 * v + v_1, u * v + 1


@triton.jit
def _tanh_of_sum(q_parts, k_parts, rows, cols, M, N, in_q, in_k, c):
    q_parts += (c * 3 + 2) * M.to(tl.int64)
    k_parts += (c * 3 + 2) * N.to(tl.int64)
    return tanh(tl.load(q_parts + rows, mask=in_q, other=0.0) + tl.load(k_parts + cols, mask=in_k, other=0.0))


@triton.jit
def _reciprocal(x, NATIVE: tl.constexpr):
    """1 / x of normal numbers. A division would look for others."""
    if NATIVE:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return 1.0 / x


@triton.jit
def scores_of_few(
    q_base,
    stride_qh,
    stride_qm,
    k_base,
    stride_kn,
    weight_base,
    first_row,
    count,
    GROUP,
    start_n,
    wanted,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGN: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """The scores [ROWS, COLS], before scaling, of a group's `count` rows from `first_row` on, as `decode` counts rows.

    Keys not `wanted` are not read but 0. Each tanh is taken as it stands: for few rows, parts of the keys would cost
    more than they save. A row's sums gather side by side, and their lanes are added once.
    """
    # [ROWS, COLS]
    s = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for i in tl.range(0, count):
        head = (first_row + i) % GROUP
        q_row = head_start(q_base, None, head, (first_row + i) // GROUP, 0, stride_qh, stride_qm, ALIGN)
        weight_row = weight_base + head * HEAD_DIM
        # [COLS, FEW_COLUMNS]
        sums = tl.zeros([COLS, FEW_COLUMNS], dtype=tl.float32)
        for first in tl.range(0, HEAD_DIM, FEW_COLUMNS):
            c = first + tl.arange(0, FEW_COLUMNS)
            q = tl.load(q_row + c, mask=c < HEAD_DIM, other=0.0).to(tl.float32)
            weight = tl.load(weight_row + c, mask=c < HEAD_DIM, other=0.0).to(tl.float32)
            k_ptrs = tile_ptrs(k_base + first, stride_kn, start_n, COLS, FEW_COLUMNS, ALIGN, OFFSET)
            k = tl.load(k_ptrs, mask=wanted[:, None] & (c < HEAD_DIM)[None, :], other=0.0).to(tl.float32)
            sums += weight[None, :] * tanh(q[None, :] + k)
        s = tl.where(tl.arange(0, ROWS)[:, None] == i, tl.sum(sums, 1)[None, :], s)
    return s


@triton.jit
def set_column(tile, i, column):
    """`tile` [ROWS, CHUNK] with the column i replaced."""
    return tl.where(tl.arange(0, CHUNK)[None, :] == i, column[:, None], tile)


@triton.jit
def add_tile(base, start, wanted, first, tile, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr):
    """Adds `tile` [ROWS, CHUNK] to rows from `start`, columns from `first` on of float32 sums [rows, HEAD_DIM].

    This program alone writes these rows.
    """
    c = first + tl.arange(0, CHUNK)
    ptrs = base + (start + tl.arange(0, ROWS)).to(tl.int64)[:, None] * HEAD_DIM + c[None, :]
    inside = wanted[:, None] & (c < HEAD_DIM)[None, :]
    tl.store(ptrs, tl.load(ptrs, mask=inside, other=0.0) + tile, mask=inside)


@triton.jit
def parts_start(ptr, i_b, i_h, H, ROWS, row, EVEN: tl.constexpr):
    """Pointer to the parts [b, H, EVEN, 3, ROWS] of one batch entry and head, from `row` on, where it is not None."""
    start = (i_b * H + i_h).to(tl.int64) * ROWS * (3 * EVEN)
    if row is not None:
        start += row
    return ptr + start


@triton.jit
def sums_start(ptr, i_b, i_h, H, ROWS, row, HEAD_DIM: tl.constexpr):
    """Pointer to the sums [b, H, ROWS, HEAD_DIM] of one batch entry and head, from `row` on, where it is not None."""
    start = (i_b * H + i_h).to(tl.int64) * ROWS
    if row is not None:
        start += row
    return ptr + start * HEAD_DIM


# What the kernels of additive attention take and others do not, for those that serve both.
NOT_ADDITIVE: dict[str, Any] = dict.fromkeys(
    ("weight_ptr", "q_parts_ptr", "k_parts_ptr", "q_reach_ptr", "k_reach_ptr")
) | {
    "NATIVE": False,
    "EVEN": 0,
    "Q_TILES": 0,
    "K_TILES": 0,
}


def common_arguments(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, call: launch.Call) -> dict[str, Any]:
    """The keyword arguments that the kernels of additive attention have in common."""
    arguments = call.arguments(q, k, v)
    del arguments["BLOCK_D"]  # no tile is as wide as the scores' columns
    even = max(2, q.shape[3] + q.shape[3] % 2)
    signed, wide_q, wide_k = (
        torch.nn.functional.pad(t.float(), (0, even - q.shape[3])) for t in (weight * arguments.pop("SCALE_SIGN"), q, k)
    )
    shift = _shift(wide_k)
    spare = 0 if call.cu_seqlens_q is None else MOST_ROWS.value  # a packed sequence's tiles begin anywhere
    q_parts, q_reach = _parts(wide_q, shift.repeat_interleave(q.shape[1] // k.shape[1], 1), spare)
    q_reach = torch.where(signed.abs().amax(1)[:, None] <= _LARGEST_WEIGHT, q_reach, torch.inf)
    k_parts, k_reach = _parts(wide_k, -shift, spare)
    return arguments | {
        "weight_ptr": signed,
        "q_parts_ptr": q_parts,
        "k_parts_ptr": k_parts,
        "q_reach_ptr": q_reach,
        "k_reach_ptr": k_reach,
        "EVEN": even,
        "Q_TILES": q_reach.shape[2] // MOST_ROWS.value,
        "K_TILES": k_reach.shape[2] // MOST_ROWS.value,
        "NATIVE": config.architecture_of(q.device) in ("ampere", "ada", "hopper"),
    }


def _shift(k: Tensor) -> Tensor:
    """What brings the largest key of each column near 0, in units of log 2 / 2: whole numbers [b, hk, 1, a].

    (u - 1) v + (v - 1) cancels where v is large. u 2^shift and v / 2^shift have the same product and are as exact.
    """
    if k.numel() == 0:
        return k.new_zeros(k.shape[0], k.shape[1], 1, k.shape[3])
    largest = torch.where(k.abs() <= _LARGEST, k, -torch.inf).amax(2, keepdim=True)
    return torch.where(largest.isfinite(), (largest * (2 / math.log(2))).round(), 0.0)


def _parts(x: Tensor, shift: Tensor, spare: int) -> tuple[Tensor, Tensor]:
    """e^2x 2^shift, that less 1, and x [b, heads, a, 3, rows]; each row's largest x + shift log(2) / 2, if all fit.

    Rows are added, so that tiles need not look where the last one is.
    """
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % MOST_ROWS.value + spare))
    moved = x + shift * (math.log(2) / 2)
    fits = ((x.abs() <= _LARGEST) & (moved.abs() <= _LARGEST)).all(-1)
    b, heads, rows, a = x.shape
    parts = x.new_empty(b, heads, a, 3, rows)
    power, less, itself = parts.permute(3, 0, 1, 4, 2)
    itself.copy_(x)
    power.copy_(torch.ldexp((2 * x).exp(), shift))
    less.copy_(torch.where(shift == 0, (2 * x).expm1(), power - 1))
    return parts, torch.where(fits, moved.amax(-1), torch.inf)
