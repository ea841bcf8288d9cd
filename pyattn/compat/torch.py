"""torch.nn.functional.scaled_dot_product_attention, argument for argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, SupportsFloat, TypeGuard

import torch
from torch import Tensor

from pyattn import core
from pyattn.check import DtypeError, RangeError, ShapeError, autocast_dtype, by_names, number
from pyattn.compat.nested import nested_attention
from pyattn.face import showing

if TYPE_CHECKING:
    from torch.nn.attention.bias import CausalBias

__all__ = ["scaled_dot_product_attention"]

__dir__ = showing(__all__)

_NAMES = {"q": "query", "k": "key", "v": "value", "mask": "attn_mask", "bias": "attn_mask", "causal": "is_causal"}


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: SupportsFloat = 0.0,
    is_causal: bool = False,
    *,
    scale: SupportsFloat | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale * query @ key.T + attn_mask) @ value, with torch's names, order and meaning of every argument.

    Args:
        query: [..., h, l, e], at least 2-D; the leading dimensions of query, key and value broadcast.
        key: [..., h, s, e].
        value: [..., h, s, ev].
        attn_mask: broadcastable to the scores [..., h, l, s]. bool: True means attend. float32 or query's dtype: added
            to the scaled scores, and differentiable. Or `torch.nn.attention.bias.causal_upper_left`, `.._lower_right`.
        dropout_p: probability of dropping a weight, in [0, 1]; applied whenever it is positive.
        is_causal: query i sees the keys j <= i: the first query is aligned with the first key. Beside attn_mask, both
            hold; but where sdpa_kernel allows SDPBackend.MATH alone, torch refuses the two, and so does this.
        scale: 1 / sqrt(e) by default.
        enable_gqa: key and value may have fewer heads; head i reads key/value head i // (h // hk).

    Nested query and key [b, h, *, e] and value [b, h, *, ev], of layout torch.jagged, are sequences of their own
    lengths; nothing is padded. They have no attn_mask, and with is_causal query and key have the same lengths.

    Returns:
        [..., h, l, ev] in query's dtype; 0 for a query that sees no key. Nested as query is.

    Raises:
        ShapeError, DtypeError, DeviceError, RangeError, UnsupportedError: where torch raises, too.

        UnsupportedError: also where no backend takes the call; lists every backend's reason.

    Differs from torch: any call may have attn_mask and is_causal (in torch 2.13 one that its fused CPU kernel takes; in
    2.15 none), and a NaN in a key or value that a boolean mask hides from every query does not reach the output. As in
    torch's fused kernels, a row that a floating mask of large finite numbers hides as a whole has the mean of the
    values as its output, as softmax of equal numbers has; -inf, or a boolean mask, gives zeros.
    """
    scale = None if scale is None else number("scale", scale)
    dropout_p = number("dropout_p", dropout_p)
    if any(isinstance(t, Tensor) and t.is_nested for t in (query, key, value)):
        return nested_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    _check_query_key_value(query, key, value, enable_gqa)
    if attn_mask is not None:
        _check_mask(attn_mask, query, key, is_causal)
    options: dict[str, Any] = {"scale": scale, "causal": is_causal, "top_left": True, "dropout_p": dropout_p}
    if _is_causal_bias(attn_mask):
        options |= {"causal": True, "top_left": attn_mask.variant.name == "UPPER_LEFT"}
        attn_mask = None
    is_batch = _is_batch(query, key, value, enable_gqa)
    if attn_mask is not None:
        scores = (*query.shape[:-1], key.shape[-2]) if is_batch else _scores_shape(query, key, enable_gqa)
        _check_mask_shape(attn_mask, scores)
    if not is_batch:
        return _folded_attention(query, key, value, attn_mask, enable_gqa, options)
    if query.dim() == 4:
        return _attention(query, key, value, attn_mask, options)
    q, k, v = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    return _attention(q, k, v, attn_mask, options).squeeze(0)


def _is_batch(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> bool:
    """Whether q, k and v are [b, h, m, d] or [h, m, d] already. Most are, and folding takes longer than a call."""
    rank = q.dim()
    if not rank == k.dim() == v.dim() or not 3 <= rank <= 4:
        return False
    of_q, of_k, of_v = q.shape, k.shape, v.shape
    h, hk = of_q[-3], of_k[-3]
    same_batch = rank == 3 or of_q[0] == of_k[0] == of_v[0]
    return same_batch and hk == of_v[-3] and hk > 0 and (hk == h or (enable_gqa and h % hk == 0))


def _folded_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool, options: dict[str, Any]
) -> Tensor:
    """Of tensors whose leading dimensions broadcast: merged into one of batch elements and one of heads."""
    true_rank = max(query.dim(), key.dim(), value.dim())
    rank = max(4, true_rank)
    q, k, v = (_of_rank(t, rank) for t in (query, key, value))
    lead = _leading_sizes(q, k, v, enable_gqa)
    if attn_mask is not None:
        attn_mask = _of_rank(attn_mask, rank)
    rows, columns = _axes(lead, attn_mask)
    if k.shape[-3] != v.shape[-3] or columns != [rank - 3]:
        k, v = _repeated(k, lead[-1]), _repeated(v, lead[-1])
    q = q.expand(*lead, *q.shape[-2:])
    k, v = (t.expand(*lead[:-1], *t.shape[-3:]) for t in (k, v))
    if attn_mask is not None:
        attn_mask = _folded(attn_mask, rows, columns)
    q, k, v = (_folded(t, rows, columns) for t in (q, k, v))
    out = _attention(q, k, v, attn_mask, options)
    return _unfolded(out, lead, rows, columns)[(0,) * (rank - true_rank)]


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, options: dict[str, Any]) -> Tensor:
    if attn_mask is not None:
        options["mask" if attn_mask.dtype is torch.bool else "bias"] = attn_mask
    if options["dropout_p"] == 1:  # no weight is kept: the same as a query that sees nothing
        options |= {"dropout_p": 0.0, "mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=q.device)}
    return by_names(_NAMES, core.attend, q, k, v, **options)[0]


def _check_query_key_value(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    least, form = (3, "[..., heads, length, head size]") if enable_gqa else (2, "[..., length, head size]")
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor):
            raise DtypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
        if t.dim() < least:
            raise ShapeError(f"{name}: expected at least {least} dimensions {form}, got {list(t.shape)}")
        if t.dtype is not query.dtype and not torch.is_autocast_enabled(query.device.type):
            raise DtypeError(f"{name}: expected {query.dtype}, the dtype of query, got {t.dtype}")
    e, s = query.shape[-1], key.shape[-2]
    if key.shape[-1] != e:
        raise ShapeError(f"key: expected [..., s, e={e}], got {list(key.shape)}: e is {e} in query")
    if value.shape[-2] != s:
        raise ShapeError(f"value: expected [..., s={s}, ev], got {list(value.shape)}: key has {s} keys")


def _is_causal_bias(attn_mask: Tensor | None) -> TypeGuard[CausalBias]:
    """Whether it is one of torch's causal_upper_left and causal_lower_right objects."""
    if attn_mask is None or type(attn_mask) is Tensor:
        return False
    from torch.nn.attention.bias import CausalBias  # here, because it imports all of torch._dynamo

    return isinstance(attn_mask, CausalBias)


def _check_mask(attn_mask: Any, query: Tensor, key: Tensor, is_causal: bool) -> None:
    if is_causal and query.numel() > 0 and _asks_for_torchs_definition():
        raise RangeError(
            "attn_mask, is_causal: expected at most one of the two under sdpa_kernel(SDPBackend.MATH), got both: "
            "Explicit attn_mask should not be set when is_causal=True, says torch there"
        )
    if not isinstance(attn_mask, Tensor):
        raise DtypeError(f"attn_mask: expected a torch.Tensor, got {type(attn_mask).__name__}")
    if _is_causal_bias(attn_mask):
        if is_causal:
            raise RangeError("attn_mask, is_causal: expected at most one of the two to be causal, got both")
        have, want = (attn_mask.seq_len_q, attn_mask.seq_len_kv), (query.shape[-2], key.shape[-2])
        if have != want:
            raise ShapeError(
                f"attn_mask: expected a causal bias of size {want}, the lengths in query and key, got {have}"
            )
        return
    if attn_mask.dtype not in (torch.bool, torch.float32) and attn_mask.dtype is not (dtype := autocast_dtype(query)):
        raise DtypeError(f"attn_mask: expected torch.bool, torch.float32 or query's {dtype}, got {attn_mask.dtype}")


def _asks_for_torchs_definition() -> bool:
    """Whether torch.nn.attention.sdpa_kernel allows that alone. In a trace it cannot be read."""
    cuda = torch.backends.cuda
    fused = cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.cudnn_sdp_enabled
    return not torch.compiler.is_compiling() and not any(enabled() for enabled in fused)


def _check_mask_shape(attn_mask: Tensor, scores: Sequence[int]) -> None:
    """The mask may broadcast, but unlike torch's arithmetic in general it may not make the scores larger."""
    fits = attn_mask.dim() <= len(scores) and all(
        have == 1 or have == want for have, want in zip(reversed(attn_mask.shape), reversed(scores), strict=False)
    )
    if not fits:
        raise ShapeError(f"attn_mask: expected a shape that broadcasts to that of the scores, {list(scores)}, "
                         f"got {list(attn_mask.shape)}")  # fmt: skip


def _scores_shape(query: Tensor, key: Tensor, enable_gqa: bool) -> list[int]:
    rank = max(query.dim(), key.dim())
    q, k = _of_rank(query, rank), _of_rank(key, rank)
    return [*_broadcast(q.shape[:-2], (*k.shape[:-3], 1) if enable_gqa else k.shape[:-2]), q.shape[-2], k.shape[-2]]


def _leading_sizes(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> list[int]:
    """The sizes [..., h] of the output before its last two, for tensors of one rank."""
    if not enable_gqa:
        return _broadcast(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    h = q.shape[-3]
    for name, t in (("key", k), ("value", v)):
        if t.shape[-3] == 0 or h % t.shape[-3] != 0:
            raise ShapeError(
                f"{name}: expected a number of heads that divides the {h} heads of query, got {t.shape[-3]}"
            )
    return [*_broadcast(q.shape[:-3], k.shape[:-3], v.shape[:-3]), h]


def _broadcast(*shapes: Sequence[int]) -> list[int]:
    """The common shape of shapes of one rank."""
    common = []
    for sizes in zip(*shapes, strict=True):
        size = 1
        for other in sizes:
            if other != 1 and size != 1 and other != size:
                listed = ", ".join(str(list(shape)) for shape in shapes)
                raise ShapeError(f"query, key, value: expected leading dimensions that broadcast, got {listed}")
            size = other if size == 1 else size
        common.append(size)
    return common


def _axes(lead: list[int], attn_mask: Tensor | None) -> tuple[list[int], list[int]]:
    """Which leading axes merge into the batch and which into the heads of [b, h, m, d].

    The last axis is the heads, except where the mask broadcasts over some of the others and not over all: only when
    those it broadcasts over are on the one side and the rest on the other can it be merged without being expanded.
    """
    *batch, heads = range(len(lead))
    if attn_mask is not None:
        kept = [axis for axis in batch if attn_mask.shape[axis] != 1]
        if kept and any(attn_mask.shape[axis] != lead[axis] for axis in batch):
            rows = [axis for axis in (*batch, heads) if attn_mask.shape[axis] != 1]
            return rows, [axis for axis in (*batch, heads) if axis not in rows]
    return ([heads], batch) if lead[heads] == 0 else (batch, [heads])  # a batch may be empty, heads may not


def _folded(t: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """t as 4-D, its axes `rows` merged into one and `columns` into the next. A view where strides allow."""
    return t.permute(*rows, *columns, -2, -1).flatten(len(rows), -3).flatten(0, len(rows) - 1)


def _unfolded(out: Tensor, lead: list[int], rows: list[int], columns: list[int]) -> Tensor:
    """Undoes `_folded`."""
    order = [*rows, *columns]
    split = out.reshape(*(lead[axis] for axis in order), *out.shape[-2:])
    return split.permute(*(order.index(axis) for axis in range(len(lead))), -2, -1)


def _repeated(t: Tensor, heads: int) -> Tensor:
    """t with every one of its heads repeated in place, `heads` in all."""
    have = t.shape[-3]
    if have in (1, heads):
        return t.expand(*t.shape[:-3], heads, *t.shape[-2:])
    return t.repeat_interleave(heads // have, -3)


def _of_rank(t: Tensor, rank: int) -> Tensor:
    return t if t.dim() == rank else t[(None,) * (rank - t.dim())]
