"""What to compute: one definition of attention, shared by every backend.

Sizes: `b` batch, `h` query heads, `hk` key/value heads (head `i` reads key/value head `i // (h // hk)`), `m` queries,
`n` keys, `d` query/key head size, `dv` value head size. All but h and hk may be 0; with d = 0 every q_i . k_j is 0.

    s[i, j]  = scale * (q_i . k_j)                                 or, with a weight (additive scores),
    s[i, j]  = scale * (weight_h . tanh(q_i + k_j))                or, with a relative term,
    s[i, j]  = scale * (q_i . k_j + relative_q_i . relative_k_{i + offset - j - first})
    s[i, j]  = softcap * tanh(s[i, j] / softcap)                   if softcap
    s[i, j] += bias[i, j] - slope_h * |i + offset - j|             if bias / ALiBi slopes
    p        = softmax of s over the visible j (and the head's sink logit, if sinks)
    lse_i    = log of that softmax's denominator                   natural log, float32, before dropout
    out_i    = sum_j keep(i, j) / (1 - dropout_p) * p[i, j] * v_j

Query `i` stands at key position `i + offset`. `offset = n - m` aligns the last query with the last key (bottom-right);
`offset = 0` aligns the first with the first (top-left, as in torch's SDPA). Key `j` is *visible* to query `i` when

    i + offset - left <= j <= i + offset + right                   causal is right = 0; None is unlimited
    j < key_lengths[b]
    q_segments[b, i] == k_segments[b, j]
    q_ranks[b, i] > k_ranks[b, j]
    row_first[b, i] <= j < row_stop[b, i]
    mask[b, h, i, j]                                               True means attend

The relative term is a product with the row of `relative_k` for the distance `i + offset - j` from key to query, of
which row 0 is the distance `first`. Its size `e` is its own. Rows for all distances that the band leaves are there;
what others hold has no effect.

Packed sequences lie one after the other on one axis, `b = 1`: sequence `t` is the queries `cu_seqlens_q[t]` to
`cu_seqlens_q[t + 1]` and the keys `cu_seqlens_k[t]` to `cu_seqlens_k[t + 1]`. Each is attention of its own: `i` and `j`
count inside the sequence, `offset` is its own `n - m`, and `t` stands in the place of the batch index `b`.

A cache of keys and values is filled up to `key_lengths[b]`, and its last query stands at the last key of that:
`offset = key_lengths[b] - m`. Where it is paged, k is pages [pages, hk, page size, d], v is [pages, hk, page size, dv],
and key `j` of batch element `b` is row `j % page size` of page `block_table[b, j // page size]`.

A row that sees nothing has out 0, lse -inf and zero gradients. A NaN or infinity in a key or value that no query sees
has no effect; one that some queries see may reach others, too. Softmax and sums accumulate in float32 (float64 for
float64 inputs). `keep` is bit-exact on every backend: Philox-4x32-10 (Salmon et al. 2011) with the key `seed`
(low word, high word) and the counter `(j // 4, i, h, b)` gives four words; key `j` takes word `j % 4` and is kept when
that word is at least `int(dropout_p * 2**32)`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Every feature a backend can declare, with the words the README's table shows for it.
FEATURES = {
    "causal": "causal",
    "window": "sliding window",
    "key_lengths": "key lengths",
    "segment_ids": "segment ids",
    "mask": "boolean mask, any broadcast",
    "bias": "additive bias with gradient",
    "softcap": "softcap",
    "alibi": "ALiBi slopes",
    "sinks": "attention sinks with gradient",
    "dropout": "dropout",
    "gqa": "grouped key/value heads",
    "dv": "value head size other than d",
    "packed": "packed sequences (varlen)",
    "cached": "key/value cache",
    "paged": "paged key/value cache",
    "additive": "additive scores with gradient",
    "relative": "relative term with gradient",
    "ranks": "ranks (a query sees lower ones)",
    "row_windows": "row windows (every query's own)",
}


class Inputs(NamedTuple):
    """The tensors of one call, in the order of the operator's arguments. Absent features are None.

    `q, k, v` have a last stride of 1. Those of packed sequences are views [1, heads, total length, head size].
    """

    q: Tensor  # [b, h, m, d]
    k: Tensor  # [b, hk, n, d], or with a block table [pages, hk, page size, d]
    v: Tensor  # [b, hk, n, dv], or with a block table [pages, hk, page size, dv]
    mask: Tensor | None = None  # bool [1|b, 1|h, 1|m, 1|n], any strides
    bias: Tensor | None = None  # float [1|b, 1|h, 1|m, 1|n], any strides
    key_lengths: Tensor | None = None  # int32 [b], each in [0, n]
    q_segments: Tensor | None = None  # int32 or int64 [b, m]
    k_segments: Tensor | None = None  # int32 or int64 [b, n]
    alibi_slopes: Tensor | None = None  # float32 [b, h]; [s, h] for s packed sequences
    sinks: Tensor | None = None  # float32 (float64 with float64 q) [h]
    seed: Tensor | None = None  # int64 [], on q's device
    cu_seqlens_q: Tensor | None = None  # int32 [s + 1], contiguous: the start of each packed sequence, and the end
    cu_seqlens_k: Tensor | None = None  # int32 [s + 1], contiguous
    block_table: Tensor | None = None  # int32 [b, n / page size], contiguous
    weight: Tensor | None = None  # float [h, d], of additive scores
    exp_keys: Tensor | None = None  # exp(2 k) in the accumulator's dtype, to save time; a last stride of 1
    relative_q: Tensor | None = None  # [b, h, m, e] in q's dtype; a last stride of 1
    relative_k: Tensor | None = None  # [1|b, h, distances, e] in q's dtype; a last stride of 1
    q_ranks: Tensor | None = None  # int32 [b, m]
    k_ranks: Tensor | None = None  # int32 [b, n]
    row_first: Tensor | None = None  # int32 [b, m]
    row_stop: Tensor | None = None  # int32 [b, m]

    @property
    def n(self) -> int:
        """How many keys a batch element has, or has room for."""
        return self.k.shape[2] * (1 if self.block_table is None else self.block_table.shape[1])


class Numbers(NamedTuple):
    """What a call sets besides its tensors, checked."""

    scale: float
    offset: int | None  # None is key_lengths[b] - m; 0 and without meaning for packed sequences, which have one each
    left: int | None
    right: int | None
    softcap: float | None
    dropout_p: float
    first: int | None = None  # distance of the first row of relative_k; None without a relative term


class Results(NamedTuple):
    """What a forward gives: to the caller, and to the backward of the same backend."""

    out: Tensor  # [b, h, m, dv] in q's dtype, laid out by `empty_output`
    lse: Tensor  # [b, h, m] in the accumulator's dtype and contiguous, as are the next two
    # lse in two parts, because one number cannot hold a large score and the log of a sum beside it: the row's largest
    # score and, relative to its exponential, the denominator. In the backend's own terms, and for its backward alone.
    row_max: Tensor
    row_sum: Tensor


class Grads(NamedTuple):
    """Gradients in the dtype and shape of their inputs; of those after v None where there is none to have."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    sinks: Tensor | None = None
    weight: Tensor | None = None
    relative_q: Tensor | None = None
    relative_k: Tensor | None = None


class AttentionSpec(NamedTuple):
    """One call without its tensors: frozen, hashable, all that a backend needs to accept or refuse it.

    A NamedTuple, as `Inputs` is, because it is built in a third of a frozen dataclass's time, on every call.
    """

    b: int
    h: int
    hk: int
    m: int
    n: int
    d: int
    dv: int
    dtype: torch.dtype
    device: str  # torch device type: "cpu", "cuda", ...
    scale: float
    offset: int | None
    left: int | None
    right: int | None
    softcap: float | None
    dropout_p: float
    first: int | None = None
    mask: bool = False
    bias: bool = False
    key_lengths: bool = False
    segment_ids: bool = False
    alibi: bool = False
    sinks: bool = False
    sequences: int | None = None  # how many are packed; None when they are not
    page_size: int | None = None  # keys per page; None when the cache is not paged
    additive: bool = False
    relative: tuple[int, int] | None = None  # distances and e of a relative term
    ranks: bool = False
    row_windows: bool = False

    @classmethod
    def of(cls, x: Inputs, numbers: Numbers) -> AttentionSpec:
        """The spec of a call whose tensors are already checked."""
        q, _, v, mask, bias, key_lengths, q_segments, _, slopes, sinks, _, cu_seqlens_q, _, block_table, weight = x[:15]
        relative_k, q_ranks, _, row_first = x[17:21]
        b, h, m, d = q.shape
        _, hk, n, dv = v.shape
        return cls(
            b, h, hk, m, n if block_table is None else x.n, d, dv, q.dtype,
            "cpu" if q.is_cpu else q.device.type, *numbers,
            mask is not None, bias is not None, key_lengths is not None, q_segments is not None,
            slopes is not None, sinks is not None, None if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1,
            None if block_table is None else n, weight is not None,
            None if relative_k is None else (relative_k.shape[2], relative_k.shape[3]), q_ranks is not None,
            row_first is not None,
        )  # fmt: skip

    @property
    def features(self) -> frozenset[str]:
        """The names out of FEATURES that this call uses."""
        causal = self.right == 0 and self.left is None
        used = {
            "causal": causal,
            "window": not causal and (self.left is not None or self.right is not None),
            "key_lengths": self.key_lengths,
            "segment_ids": self.segment_ids,
            "mask": self.mask,
            "bias": self.bias,
            "softcap": self.softcap is not None,
            "alibi": self.alibi,
            "sinks": self.sinks,
            "dropout": self.dropout_p > 0,
            "gqa": self.h != self.hk,
            "dv": self.d != self.dv,
            "packed": self.sequences is not None,
            "cached": self.offset is None,
            "paged": self.page_size is not None,
            "additive": self.additive,
            "relative": self.relative is not None,
            "ranks": self.ranks,
            "row_windows": self.row_windows,
        }
        return frozenset(name for name, is_used in used.items() if is_used)

    @property
    def accumulator(self) -> torch.dtype:
        """dtype of the softmax statistics and of every sum."""
        return torch.float64 if self.dtype is torch.float64 else torch.float32

    @property
    def output_bytes(self) -> int:
        """Bytes of `out` and `lse`: what any backend must allocate."""
        rows = self.b * self.h * self.m
        return rows * (self.dv * self.dtype.itemsize + self.accumulator.itemsize)

    @property
    def score_bytes(self) -> int:
        """Bytes of one [b, h, m, n] matrix in `dtype`: what an unfused implementation allocates several times."""
        return self.b * self.h * self.m * self.n * self.dtype.itemsize


def band_distances(m: int, n: int, offset: int, left: int | None, right: int | None) -> tuple[int, int]:
    """The lowest and the highest distance of a key and a query inside the band; of no pair, the lowest is higher."""
    if m == 0 or n == 0:
        return 0, -1
    lowest, highest = offset - (n - 1), offset + m - 1
    return (
        lowest if right is None else max(lowest, -right),
        highest if left is None else min(highest, left),
    )


def empty_output(q: Tensor, dv: int) -> Tensor:
    """Uninitialised [b, h, m, dv] in q's layout, so that undoing q's head transpose stays free.

    q split from a [b, m, h * d] projection has heads inside the sequence; out then has them there too.
    """
    b, h, m, _ = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty(b, m, h, dv).transpose(1, 2)
    return q.new_empty(b, h, m, dv)


def empty_results(q: Tensor, dv: int) -> Results:
    """Uninitialised."""
    b, h, m, _ = q.shape
    lse = q.new_empty(b, h, m, dtype=torch.float64 if q.dtype is torch.float64 else torch.float32)
    return Results(empty_output(q, dv), lse, torch.empty_like(lse), torch.empty_like(lse))


def empty_gradient(t: Tensor) -> Tensor:
    """Uninitialised, laid out as t is, where torch can do that with a last stride of 1; not for overlapping rows."""
    like = torch.empty_like(t)
    return like if like.stride()[-1:] == t.stride()[-1:] else torch.empty(t.shape, dtype=t.dtype, device=t.device)


def empty_gradients(x: Inputs, bias_gradient: bool) -> Grads:
    """`empty_gradient` of every input that has one; of the bias only where it is wanted."""
    bias = x.bias if bias_gradient else None
    inputs = (x.q, x.k, x.v, bias, x.sinks, x.weight, x.relative_q, x.relative_k)
    return Grads._make(None if t is None else empty_gradient(t) for t in inputs)


def as_batch(packed: Tensor) -> Tensor:
    """Packed sequences [total length, heads, size] as the view [1, heads, total length, size]."""
    return packed.transpose(0, 1).unsqueeze(0)


def as_packed(batch: Tensor) -> Tensor:
    """Undoes `as_batch`."""
    return batch.squeeze(0).transpose(0, 1)


def unit_stride(t: Tensor) -> Tensor:
    """t with a last stride of 1. Not by contiguous(), which leaves an empty tensor's strides as they are."""
    return t if t.stride()[-1] == 1 else t.clone(memory_format=torch.contiguous_format)


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")
