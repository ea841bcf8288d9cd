"""xformers.ops.memory_efficient_attention, argument for argument, on any device and with gradients.

import pyattn.compat.xformers as xops    # was xformers.ops
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pyattn import api, core
from pyattn.check import ShapeError, UnsupportedError, by_names, check_dense
from pyattn.compat.xformers.biases import (
    BANDS,
    AttentionBias,
    Band,
    BlockDiagonalCausalFromBottomRightMask,
    BlockDiagonalCausalLocalAttentionFromBottomRightMask,
    BlockDiagonalCausalLocalAttentionMask,
    BlockDiagonalCausalLocalAttentionPaddedKeysMask,
    BlockDiagonalCausalMask,
    BlockDiagonalCausalWithOffsetPaddedKeysMask,
    BlockDiagonalLocalAttentionPaddedKeysMask,
    BlockDiagonalMask,
    BlockDiagonalPaddedKeysMask,
    LocalAttentionFromBottomRightMask,
    LowerTriangularFromBottomRightLocalAttentionMask,
    LowerTriangularFromBottomRightMask,
    LowerTriangularMask,
    LowerTriangularMaskWithTensorBias,
)
from pyattn.face import showing

_NAMES = {"q": "query", "k": "key", "v": "value", "bias": "attn_bias", "dropout_p": "p"}

__all__ = [
    "AttentionBias",
    "BlockDiagonalCausalFromBottomRightMask",
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask",
    "BlockDiagonalCausalLocalAttentionMask",
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask",
    "BlockDiagonalCausalMask",
    "BlockDiagonalCausalWithOffsetPaddedKeysMask",
    "BlockDiagonalLocalAttentionPaddedKeysMask",
    "BlockDiagonalMask",
    "BlockDiagonalPaddedKeysMask",
    "LocalAttentionFromBottomRightMask",
    "LowerTriangularFromBottomRightLocalAttentionMask",
    "LowerTriangularFromBottomRightMask",
    "LowerTriangularMask",
    "LowerTriangularMaskWithTensorBias",
    "memory_efficient_attention",
]

__dir__ = showing(__all__)


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """softmax(scale * query @ key.T + attn_bias) @ value, with xformers' names, order and meaning of every argument.

    Args:
        query: [b, m, h, k]; [b, m, k] for one head; [b, m, g, h, k] for g groups of h heads.
        key: [b, n, h, k], or as query; the heads of a group may be expanded, or one.
        value: [b, n, h, kv], or as query.
        attn_bias: tensor that is added to the scores [b, h, m, n] ([b, m, n]; [b, g, h, m, n]), and differentiable; or
            one of this module's masks, or of xformers' own.
        p: probability of dropping a weight, in [0, 1); applied whenever it is positive.
        scale: 1 / sqrt(k) by default.
        op: None; pyattn chooses.
        output_dtype: None, or query's.

    Returns:
        [b, m, h, kv], or as query; 0 for a query that sees no key.

    Raises:
        ShapeError, DtypeError, DeviceError, RangeError: an argument does not fit.
        UnsupportedError: `op`, another `output_dtype`, or a mask that this module does not have.
    """
    _check(query, key, value, op, output_dtype)
    options: dict[str, Any] = {"scale": scale, "dropout_p": p}
    q, (k, v) = _with_heads(query), _of_groups(key, value)  # [b, length, heads, size]
    if attn_bias is None or isinstance(attn_bias, Tensor):
        out = _dense(q, k, v, attn_bias, options)
    elif not _is_known(attn_bias):
        name = f"{type(attn_bias).__module__}.{type(attn_bias).__qualname__}"
        raise UnsupportedError(f"attn_bias: expected a tensor or one of {', '.join(BANDS)}, got {name}")
    elif hasattr(attn_bias, "q_seqinfo"):
        out = _blocks(q, k, v, BANDS[type(attn_bias).__name__](attn_bias), attn_bias, options)
    else:
        band = BANDS[type(attn_bias).__name__](attn_bias)
        options |= {"window": band[:2], "top_left": band.top_left}
        out = _dense(q, k, v, getattr(attn_bias, "_bias", None), options)
    return out if query.dim() == 4 else out.view(*query.shape[:-1], value.shape[-1])


def _check(query: Tensor, key: Tensor, value: Tensor, op: Any, output_dtype: torch.dtype | None) -> None:
    for name, t in zip(("query", "key", "value"), (query, key, value), strict=True):
        check_dense(name, t)
        if t.dim() != query.dim() or not 3 <= t.dim() <= 5:
            raise ShapeError(
                f"{name}: expected [b, length, k], [b, length, h, k] or [b, length, g, h, k], as query, key and value "
                f"all are, got {list(t.shape)}"
            )
    if op is not None:
        raise UnsupportedError(f"op: expected None, got {op!r}: pyattn chooses its kernels itself")
    if output_dtype not in (None, query.dtype):
        raise UnsupportedError(f"output_dtype: expected {query.dtype}, that of query, got {output_dtype}")


def _with_heads(t: Tensor) -> Tensor:
    """[b, length, heads, size]."""
    return t.unsqueeze(2) if t.dim() == 3 else t.flatten(2, 3) if t.dim() == 5 else t


def _of_groups(*tensors: Tensor) -> Iterator[Tensor]:
    """The same for keys and values, where the heads of a group that are one and the same are one."""
    if tensors[0].dim() != 5:
        return map(_with_heads, tensors)
    if all(t.shape[3] == 1 or t.stride(3) == 0 for t in tensors):
        return (t[:, :, :, 0] for t in tensors)
    size = max(t.shape[3] for t in tensors)
    return (_with_heads(t.expand(-1, -1, -1, size, -1) if t.shape[3] == 1 else t) for t in tensors)


def _is_known(attn_bias: Any) -> bool:
    """Whether it is one of this module's masks, or of xformers' own."""
    cls = type(attn_bias)
    return cls.__name__ in BANDS and (isinstance(attn_bias, AttentionBias) or cls.__module__.startswith("xformers."))


def _dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Tensor:
    if bias is not None:
        bias = bias.unsqueeze(1) if bias.dim() == 3 else bias.flatten(1, 2) if bias.dim() == 5 else bias
    out, _ = by_names(
        _NAMES, core.attend, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias=bias, **options
    )
    return out.transpose(1, 2)


def _blocks(q: Tensor, k: Tensor, v: Tensor, band: Band, bias: Any, options: dict[str, Any]) -> Tensor:
    """A batch of one, whose rows belong to blocks."""
    q_info, k_info = bias.q_seqinfo, bias.k_seqinfo
    for name, t, info in (("query", q, q_info), ("key", k, k_info), ("value", v, k_info)):
        if t.shape[:2] != (1, info.seqstart_py[-1]):
            raise ShapeError(f"{name}: expected [1, {info.seqstart_py[-1]}, ...], the rows of attn_bias's blocks, "
                             f"got {list(t.shape)}")  # fmt: skip
    q, k, v = q[0], k[0], v[0]
    q_starts, k_starts = (info.seqstart.to(q.device) for info in (q_info, k_info))
    if hasattr(k_info, "seqlen_py"):
        k, v, k_starts = _filled(k, v, k_info)
    elif band.top_left and k_info.seqstart_py != q_info.seqstart_py:
        return _padded(q, k, v, band, q_info, k_info, options)[None]
    out = by_names(_NAMES, api.attention_varlen, q, k, v, q_starts, k_starts, window=band[:2], **options)
    assert isinstance(out, Tensor)
    return out[None]


def _filled(k: Tensor, v: Tensor, info: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that padded blocks fill, without the room behind them, and where each block then starts."""
    spans = zip(info.seqstart_py, info.seqlen_py, strict=False)
    filled = [row for start, n in spans for row in range(start, start + n)]
    rows = torch.tensor(filled, device=k.device, dtype=torch.int64)
    starts = torch.tensor([0, *accumulate(info.seqlen_py)], device=k.device, dtype=torch.int32)
    return k[rows], v[rows], starts


def _padded(q: Tensor, k: Tensor, v: Tensor, band: Band, q_info: Any, k_info: Any, options: dict[str, Any]) -> Tensor:
    """Blocks as a padded batch: packed sequences are aligned at their ends, these at their beginnings."""

    def places(info: Any) -> tuple[Tensor, Tensor]:
        starts = torch.tensor(info.seqstart_py, device=q.device)
        lengths = starts.diff()
        i = torch.arange(int(max(lengths.tolist(), default=0)), device=q.device)
        exists = i < lengths[:, None]
        return torch.where(exists, starts[:-1, None] + i, 0), exists

    q_rows, q_exists = places(q_info)
    k_rows, k_exists = places(k_info)
    batch = (t[rows].transpose(1, 2) for t, rows in ((q, q_rows), (k, k_rows), (v, k_rows)))
    out, _ = by_names(
        _NAMES, core.attend, *batch, window=band[:2], top_left=True, key_lengths=k_exists.sum(-1), **options
    )
    return out.transpose(1, 2)[q_exists]
