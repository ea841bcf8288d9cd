"""The module flash_attn_interface, FlashAttention-3's, function for function, on every device that pyattn runs on.

`install()` puts it in that module's place, for code that imports flash_attn_interface or flash_attn_3.

Everywhere: causal masks and windows are aligned bottom-right. `num_splits`, `pack_gqa`, `sm_margin`, `deterministic`
and `scheduler_metadata` are taken and without effect: they choose how, not what, is computed, and the bits are the same
every time. `qv`, `attention_chunk` and 8-bit numbers with their `q_descale`, `k_descale` and `v_descale` are refused.
The gradient of lse counts, which the original drops.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from typing import Any

import torch
from torch import Tensor

from pyattn import api, check
from pyattn.check import DtypeError, RangeError, ShapeError, UnsupportedError, by_names
from pyattn.compat import flash_attn, stand_ins
from pyattn.compat.flash_attn.arguments import check_shape, options, without_gradient
from pyattn.compat.flash_attn.cache import Cache, Packed, Rotary, attend
from pyattn.face import showing

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "install",
    "uninstall",
]

__dir__ = showing(__all__)

Result = Tensor | tuple[Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:
    """softmax(softmax_scale * q @ k.T) @ v, with FlashAttention-3's names, order and meaning of every argument.

    Args:
        q: [b, s, h, d] float16, bfloat16, float32 or float64.
        k: [b, n, hk, d] in q's dtype; hk divides h, and head i reads key/value head i // (h // hk).
        v: [b, n, hk, dv].
        softmax_scale: 1 / sqrt(d) by default.
        causal: query i sees keys j <= i + n - s; the right side of window_size is then 0.
        window_size: (left, right), the number of keys besides one's own that a query sees around i + n - s; a
            negative side is unlimited.
        softcap: scores become softcap * tanh(score / softcap); 0 or less is none.
        return_attn_probs: return (out, lse).
        The others: see this module.

    Returns:
        out [b, s, h, dv] in q's dtype, 0 for a query that sees no key. With return_attn_probs (out, lse): lse [b, h, s]
        in float32 (float64 for float64 q) is differentiable, and -inf for a query that sees no key.

    Raises:
        ShapeError, DtypeError, DeviceError, RangeError: an argument does not fit.
        UnsupportedError: an argument that is refused, or no backend can run the call.
    """
    _refuse(qv, q_descale, k_descale, v_descale, attention_chunk)
    out, lse, _ = flash_attn.flash_attn_func(
        q, k, v, 0.0, softmax_scale, causal, window_size, softcap, return_attn_probs=True
    )  # fmt: skip
    return (out, lse) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of q, k and v stacked in qkv [b, s, 3, h, d], or with num_heads_q along the heads of
    [b, s, num_heads_q + 2 * hk, d]."""
    if isinstance(qkv, Tensor) and qkv.dim() == 4:
        q, k, v = _of_stacked_heads(qkv, num_heads_q)
    else:
        q, k, v = check_shape("qkv", qkv, "b s stacked h d", None, None, 3, None, None).unbind(2)
    return flash_attn_func(
        q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap,
        return_attn_probs=return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` over sequences of different lengths, packed one after the other.

    Args:
        q: [total_q, h, d] float16, bfloat16, float32 or float64.
        k, v: [total_k, hk, d] and [total_k, hk, dv].
        cu_seqlens_q, cu_seqlens_k: integer [sequences + 1], where each sequence starts in q and in k, and the end.
        max_seqlen_q, max_seqlen_k: not read; the lengths are in cu_seqlens.
        seqused_q, seqused_k: integer [sequences], how many rows of each sequence there are, counted from its first; the
            rest is room. By default all.
        The others: as for `flash_attn_func`.

    Returns:
        out [total_q, h, dv], or (out, lse [h, total_q]) as of `flash_attn_func`. Rows behind seqused_q have out 0 and
        lse -inf, and like those behind seqused_k gradients of 0; what they hold goes nowhere.
    """
    _refuse(qv, q_descale, k_descale, v_descale, attention_chunk)
    shared = options(softmax_scale, causal, window_size, softcap, None)
    if seqused_q is not None or seqused_k is not None:
        check.check_dense("q", q)
        starts = check.check_cu_seqlens(cu_seqlens_q, cu_seqlens_k, q)
        cu_seqlens_q, cu_seqlens_k = _with_room(*starts, seqused_q, seqused_k)
    out, lse = api.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, return_lse=True, **shared)
    return (out, lse) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`flash_attn_func` of new queries over a cache, to which new keys and values are appended first, in place.

    The last query stands at the last key of its batch element, the new ones included. For decoding: no gradients, and
    one that is asked for raises.

    Args:
        q: [b, s, h, d] float16, bfloat16, float32 or float64; with cu_seqlens_q [total_q, h, d].
        k_cache: [at least b, n, hk, d] in q's dtype, with a last stride of 1. With a page table
            [pages, page size, hk, d], for any page size.
        v_cache: [at least b, n, hk, dv], or [pages, page size, hk, dv].
        k, v: [b, s_new, hk, d] and [b, s_new, hk, dv], written behind the first cache_seqlens keys; with
            cu_seqlens_k_new [total_new, hk, d] and [total_new, hk, dv].
        rotary_cos, rotary_sin: [positions, r / 2], which rotate the first r sizes of q and k: k at the positions
            rotary_seqlens, rotary_seqlens + 1, ..; q there, too, if causal or with a window, else all at the first.
        cache_seqlens: int or integer [b], the number of keys before the call; by default the cache is full.
        cache_batch_idx: integer [b], which row of the cache, or of page_table, each batch element has; by default its
            own.
        cache_leftpad: integer [b], the first key that each batch element sees; cache_seqlens counts those before it.
        page_table: integer [b, pages of one], or with cache_batch_idx of any number of rows; key j of a batch element
            is row j % page size of the page that stands in column j // page size of its row.
        cu_seqlens_q, cu_seqlens_k_new: integer [b + 1], where each batch element starts in packed q, in packed k and v.
        max_seqlen_q: no batch element has more queries. Needed with cu_seqlens_q, and then checked on the CPU.
        rotary_seqlens: integer [b]; cache_seqlens by default.
        rotary_interleaved: rotate sizes 0 and 1, 2 and 3, ..; else 0 and r / 2, 1 and r / 2 + 1, ..
        return_softmax_lse: also return lse.
        The others: as for `flash_attn_func`.

    Returns:
        out [b, s, h, dv] in q's dtype, or [total_q, h, dv]. With return_softmax_lse (out, lse, out_accum, lse_accum):
        lse [b, h, s], or [h, total_q], as of `flash_attn_func`; the last two, which hold parts of a split in the
        original, are empty.

    Raises:
        As `flash_attn_func`, of arguments before the cache is written to. UnsupportedError in a backward and, as in the
        original, for rotary_cos without k.
        The values of lengths, indices and tables are checked on the CPU; reading a GPU's would stall it.
    """
    _refuse(qv, q_descale, k_descale, v_descale, attention_chunk)
    out, lse = by_names(
        {"block_table": "page_table"}, without_gradient, "flash_attn_with_kvcache", (q, k_cache, v_cache, k, v),
        attend, q, k, v,
        Cache(k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, page_table),
        Rotary(rotary_cos, rotary_sin, rotary_interleaved, rotary_seqlens),
        Packed(cu_seqlens_q, max_seqlen_q, cu_seqlens_k_new),
        options(softmax_scale, causal, window_size, softcap, None),
    )  # fmt: skip
    return (out, lse, q.new_empty(0), lse.new_empty(0)) if return_softmax_lse else out


def flash_attn_combine(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attentions of the same queries over parts of them.

    Args:
        out_partial: [parts, .., d], of each part.
        lse_partial: [parts, ..]; -inf where a query sees no key of a part, whose out_partial is then not read.
        out: [.., d], written to, where given.
        out_dtype: that of the result; out_partial's by default.

    Returns:
        (out [.., d], lse [..] in lse_partial's dtype).
    """
    check.check_dense("out_partial", out_partial)
    check.check_tensor("lse_partial", lse_partial, check.DTYPES, out_partial)
    if lse_partial.shape != out_partial.shape[:-1]:
        raise ShapeError(f"lse_partial: expected {list(out_partial.shape[:-1])}, out_partial without its last size, "
                         f"got {list(lse_partial.shape)}")  # fmt: skip
    lse = lse_partial.logsumexp(0)
    unseen = (lse_partial == -torch.inf)[..., None]
    parts = ((lse_partial - lse).exp()[..., None] * out_partial).masked_fill(unseen, 0.0)
    joined = parts.sum(0).to(out_dtype or out_partial.dtype)
    return (joined if out is None else out.copy_(joined)), lse


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """An empty tensor for `flash_attn_with_kvcache`, which has nothing to schedule beforehand."""
    return torch.empty(0, dtype=torch.int32, device=cache_seqlens.device)


def install() -> None:
    """From here on `import flash_attn_interface` imports this module, in this process. A second call changes nothing.

    Raises:
        UnsupportedError: another flash_attn_interface or flash_attn_3 is imported already, and may be in use.
    """
    stand_ins.install(_STAND_INS)


def uninstall() -> None:
    """Undoes `install`. Who has imported flash_attn_interface meanwhile keeps what was imported."""
    stand_ins.uninstall(_STAND_INS)


def _refuse(qv: Any, q_descale: Any, k_descale: Any, v_descale: Any, attention_chunk: int) -> None:
    """What the kernels have not."""
    if qv is not None:
        raise UnsupportedError("qv: expected None, got a value: no kernel adds a second product to the scores")
    for name, descale in (("q_descale", q_descale), ("k_descale", k_descale), ("v_descale", v_descale)):
        if descale is not None:
            raise UnsupportedError(
                f"{name}: expected None, got a value: no kernel reads 8-bit numbers, whose scale it is"
            )
    if attention_chunk != 0:
        raise UnsupportedError(
            f"attention_chunk: expected 0, got {attention_chunk}: no kernel has chunks; pyattn.attention takes them as "
            "segment_ids"
        )


def _of_stacked_heads(qkv: Tensor, h: int | None) -> tuple[Tensor, ...]:
    """q, k and v of [b, s, h + 2 * hk, d]."""
    if h is None:
        raise DtypeError(
            "num_heads_q: expected an int with qkv of 4 dimensions, got None: k and v share the other heads"
        )
    if not 0 < h < qkv.shape[2] or (qkv.shape[2] - h) % 2 != 0:
        raise ShapeError(f"qkv: expected [b, s, num_heads_q={h} + 2 * hk, d], got {list(qkv.shape)}")
    hk = (qkv.shape[2] - h) // 2
    return qkv.split((h, hk, hk), 2)


def _with_room(
    starts_q: Tensor, starts_k: Tensor, used_q: Tensor | None, used_k: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Where sequences start of which each has room behind it, in queries and in keys.

    Each becomes three: what there is; the room of the queries beside no keys; no queries beside the room of the keys.
    So nobody sees the room and it sees nothing, and nothing is copied.
    """
    used_q = _used("seqused_q", starts_q, used_q)
    used_k = _used("seqused_k", starts_k, used_k)
    of_q = torch.stack((starts_q[:-1], starts_q[:-1] + used_q, starts_q[1:]), 1)
    of_k = torch.stack((starts_k[:-1], starts_k[:-1] + used_k, starts_k[:-1] + used_k), 1)
    return torch.cat((of_q.flatten(), starts_q[-1:])), torch.cat((of_k.flatten(), starts_k[-1:]))


def _used(name: str, starts: Tensor, used: Tensor | None) -> Tensor:
    """int32 [sequences]."""
    lengths = starts.diff()
    if used is None:
        return lengths
    used = check.check_integers(name, used, tuple(lengths.shape), starts)
    if used.device.type == "cpu" and not check.is_traced(used):
        wrong = ((used < 0) | (used > lengths)).nonzero()
        if len(wrong) > 0:
            t = int(wrong[0])
            raise RangeError(f"{name}: expected at most {int(lengths[t])} at position {t}, the rows of that sequence, "
                             f"got {int(used[t])}")  # fmt: skip
    return used


def _package() -> Any:
    """flash_attn_3, as far as it is Python."""
    package = module_from_spec(ModuleSpec("flash_attn_3", None, is_package=True))
    package.flash_attn_interface = sys.modules[__name__]  # type: ignore[attr-defined]
    return package


_STAND_INS = {
    "flash_attn_interface": sys.modules[__name__],
    "flash_attn_3": _package(),
    "flash_attn_3.flash_attn_interface": sys.modules[__name__],
}
