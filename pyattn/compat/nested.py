"""scaled_dot_product_attention of torch's nested tensors, which hold sequences of different lengths without padding."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from pyattn import core
from pyattn.check import DtypeError, ShapeError, UnsupportedError, by_names

_NAMES = {"q": "query", "k": "key", "v": "value", "causal": "is_causal"}

Nested: TypeAlias = Any  # torch.nested._internal.nested_tensor.NestedTensor, a Tensor with more methods


def nested_attention(
    query: Nested,
    key: Nested,
    value: Nested,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Nested:
    """`pyattn.scaled_dot_product_attention` of nested [b, h, *, e], [b, h, *, e] and [b, h, *, ev]."""
    if attn_mask is not None:
        raise UnsupportedError("attn_mask: expected None with nested tensors, as in torch, got a mask")
    tensors = {"query": query, "key": key, "value": value}
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise DtypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    _check(tensors)
    options: dict[str, Any] = {"causal": is_causal, "scale": scale, "dropout_p": 0.0 if dropout_p == 1 else dropout_p}
    if all(t._ragged_idx == 1 for t in tensors.values()):
        out = _of_ragged_heads(query, key, value, options)
    else:
        q, k, v = (_packed(name, t) for name, t in tensors.items())
        out = _of_ragged_lengths(q, k, v, enable_gqa, options)
    return 0.0 * out if dropout_p == 1 else out  # no weight is kept


def _of_ragged_lengths(q: Nested, k: Nested, v: Nested, enable_gqa: bool, options: dict[str, Any]) -> Nested:
    """[b, h, *, ev] for q [b, *, h, e] and so on."""
    h, hk, hv = (t.size(2) for t in (q, k, v))
    if hk != hv or (h % hk != 0 if enable_gqa else h != hk):
        expected = f"one number of heads that divides query's {h}" if enable_gqa else f"query's {h} heads"
        raise ShapeError(f"key, value: expected {expected}, got {hk} and {hv}")
    if not _same_lengths(k, v):
        raise ShapeError("value: expected sequences as long as key's, got others")
    if options["causal"] and not _same_lengths(q, k):
        raise UnsupportedError(
            "is_causal: expected key sequences as long as query's, got others: torch's own kernels disagree about "
            "those, FlashAttention aligns the last query with the last key, the memory-efficient kernel the first ones"
        )
    out, _ = by_names(
        _NAMES,
        core.attend,
        q.values(),
        k.values(),
        v.values(),
        cu_seqlens_q=q.offsets(),
        cu_seqlens_k=k.offsets(),
        **options,
    )
    return _nested_like(q, out).transpose(1, 2)


def _of_ragged_heads(q: Nested, k: Nested, v: Nested, options: dict[str, Any]) -> Nested:
    """[b, *, l, ev] for q [b, *, l, e] and so on, the form that torch.nested gives to sequences of one length."""
    if not (_same_lengths(q, k) and _same_lengths(k, v)):
        raise ShapeError("key, value: expected as many heads as query has in each batch element, got others")
    out, _ = by_names(_NAMES, core.attend, *(t.values().unsqueeze(0) for t in (q, k, v)), top_left=True, **options)
    return _nested_like(q, out.squeeze(0))


def _check(tensors: dict[str, Nested]) -> None:
    query = tensors["query"]
    for name, t in tensors.items():
        if t.layout is not torch.jagged:
            kind = f"a nested tensor of {t.layout}" if t.is_nested else "a dense tensor"
            raise UnsupportedError(
                f"{name}: expected a nested tensor of torch.jagged, as all three are if one is, got {kind}: "
                "torch.nested.as_nested_tensor(list(t.unbind()), layout=torch.jagged) makes it one"
            )
        if t.lengths() is not None:
            raise UnsupportedError(f"{name}: expected sequences without gaps, got those of torch.nested.narrow: "
                                   "its result's contiguous() closes them")  # fmt: skip
        if t.dim() != 4:
            raise ShapeError(f"{name}: expected 4 dimensions [b, heads, length, head size], got {t.dim()}")
        if t.size(0) != query.size(0):
            raise ShapeError(f"{name}: expected query's {query.size(0)} sequences, got {t.size(0)}")
        if t.dtype is not query.dtype and not torch.is_autocast_enabled(query.device.type):
            raise DtypeError(f"{name}: expected {query.dtype}, the dtype of query, got {t.dtype}")


def _packed(name: str, t: Nested) -> Nested:
    """[b, heads, *, size] as [b, *, heads, size]."""
    if t._ragged_idx != 2:
        raise ShapeError(f"{name}: expected ragged lengths [b, heads, *, head size], got {list(t.shape)}")
    return t.transpose(1, 2)


def _nested_like(t: Nested, values: Tensor) -> Nested:
    """values with t's offsets. With its least and greatest length, too, where known: reading them stalls a GPU."""
    known = {"min_seqlen": t._maybe_min_seqlen, "max_seqlen": t._maybe_max_seqlen}
    return torch.nested.nested_tensor_from_jagged(values, t.offsets(), **known)


def _same_lengths(a: Nested, b: Nested) -> bool:
    """Whether the ragged sizes of the two agree. Reads them only where they are not one and the same tensor."""
    if a.size(a._ragged_idx) == b.size(b._ragged_idx):
        return True
    return not torch.compiler.is_compiling() and torch.equal(a.offsets(), b.offsets())
