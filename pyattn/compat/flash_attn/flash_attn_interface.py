"""flash_attn.flash_attn_interface: attention over [b, s, h, d] and over packed sequences [total, h, d].

Everywhere: causal masks and windows are aligned bottom-right; `deterministic` is taken and always true of pyattn; the
gradient of lse counts, which flash_attn drops; lse is -inf, where flash_attn's is +inf, for a query that sees no key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyattn import api, check, core
from pyattn.check import UnsupportedError
from pyattn.compat.flash_attn.arguments import check_shape, options, refuse_with_dropout, without_gradient
from pyattn.compat.flash_attn.cache import Cache, Packed, Rotary, attend
from pyattn.compat.flash_attn.kvcache import flash_attn_with_kvcache
from pyattn.face import showing

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

__dir__ = showing(__all__)

Result = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """softmax(softmax_scale * q @ k.T) @ v, with flash_attn's names, order and meaning of every argument.

    Args:
        q: [b, s, h, d] float16, bfloat16, float32 or float64.
        k: [b, n, hk, d] in q's dtype; hk divides h, and head i reads key/value head i // (h // hk).
        v: [b, n, hk, dv].
        dropout_p: probability of dropping a weight, in [0, 1); applied whenever it is positive.
        softmax_scale: 1 / sqrt(d) by default.
        causal: query i sees keys j <= i + n - s; the right side of window_size is then 0.
        window_size: (left, right), the number of keys besides one's own that a query sees around i + n - s; a
            negative side is unlimited.
        softcap: scores become softcap * tanh(score / softcap); 0 or less is none.
        alibi_slopes: [h] or [b, h]; adds -slope * |i + n - s - j|.
        deterministic: without effect: the gradients have the same bits every time.
        return_attn_probs: return (out, lse, S_dmask).

    Returns:
        out [b, s, h, dv] in q's dtype, 0 for a query that sees no key, contiguous where q is. With return_attn_probs
        (out, lse, S_dmask): lse [b, h, s] in float32 (float64 for float64 q) is differentiable, which flash_attn's is
        not, and -inf for a query that sees no key; S_dmask is empty, as flash_attn's is without dropout.

    Raises:
        ShapeError, DtypeError, DeviceError, RangeError: an argument does not fit.
        UnsupportedError: dropout together with return_attn_probs or softcap, or no backend can run the call.
    """
    check_shape("q", q, "b s h d", None, None, None, None)
    b, _, _, d = q.shape
    check_shape("k", k, "b n hk d", b, None, None, d)
    check_shape("v", v, "b n hk dv", b, k.shape[1], k.shape[2], None)
    shared = options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    if dropout_p != 0:
        refuse_with_dropout(dropout_p, return_attn_probs, shared.get("softcap"))
    out, lse = core.attend(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), dropout_p=dropout_p, **shared
    )  # fmt: skip
    out = out.transpose(1, 2)
    return (out, lse, q.new_empty(0)) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of q, k and v stacked in qkv [b, s, 3, h, d]."""
    check_shape("qkv", qkv, "b s stacked h d", None, None, 3, None, None)
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of q [b, s, h, d] and of k and v stacked in kv [b, n, 2, hk, d]."""
    check_shape("kv", kv, "b n stacked hk d", None, None, 2, None, None)
    k, v = kv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """`flash_attn_func` over sequences of different lengths, packed one after the other.

    Args:
        q: [total_q, h, d] float16, bfloat16, float32 or float64.
        k, v: [total_k, hk, d] and [total_k, hk, dv]; with a block table [pages, page size, hk, d] and [.., dv].
        cu_seqlens_q, cu_seqlens_k: integer [sequences + 1], where each sequence starts in q and in k, and the end.
        max_seqlen_q: no sequence has more queries. Read with a block table only, and then checked on the CPU.
        max_seqlen_k: not read; the lengths are in cu_seqlens_k.
        alibi_slopes: [h] or [sequences, h].
        block_table: integer [sequences, pages of one]; key j of sequence t is row j % page size of page
            block_table[t, j // page size], for any page size. There is no dropout then, and a backward raises.
        dropout_p, softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs: as for
            `flash_attn_func`.

    Returns:
        out [total_q, h, dv], or (out, lse [h, total_q], S_dmask) as for `flash_attn_func`.

    Raises:
        As `flash_attn_func`; UnsupportedError for a block table with dropout, or in its backward.
    """
    shared = options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    if dropout_p != 0:
        refuse_with_dropout(dropout_p, return_attn_probs, shared.get("softcap"))
        if block_table is not None:
            raise UnsupportedError(
                f"block_table: expected dropout_p=0 with it, got {dropout_p}: a cache has no dropout"
            )
    if block_table is None:
        out, lse = api.attention_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, dropout_p=dropout_p, return_lse=True, **shared
        )
    else:
        out, lse = without_gradient(
            "flash_attn_varlen_func, block_table", (q, k, v), _paged, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
            block_table, shared,
        )  # fmt: skip
    return (out, lse, q.new_empty(0)) if return_attn_probs else out


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of q, k and v stacked in qkv [total, 3, h, d]."""
    check_shape("qkv", qkv, "total stacked h d", None, 3, None, None)
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of q [total_q, h, d] and of k and v stacked in kv [total_k, 2, hk, d]."""
    check_shape("kv", kv, "total_k stacked hk d", None, 2, None, None)
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def _paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    block_table: Tensor,
    shared: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Packed queries over paged keys: (out [total_q, h, dv], lse [h, total_q])."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        check.check_dense(name, t)
    starts_q, starts_k = check.check_cu_seqlens(cu_seqlens_q, cu_seqlens_k, q)
    k, v = (t.to(check.autocast_dtype(t)) for t in (k, v))
    names = {"k_cache": "k", "v_cache": "v", "cache_seqlens": "cu_seqlens_k"}
    cache = Cache(k, v, starts_k.diff(), table=block_table)
    return check.by_names(
        names, attend, q, None, None, cache, Rotary(None, None, True), Packed(starts_q, max_seqlen_q), shared
    )
