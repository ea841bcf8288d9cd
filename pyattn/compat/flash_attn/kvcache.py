"""flash_attn_with_kvcache: one call that appends to a key/value cache, in place, and attends over it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyattn.check import UnsupportedError
from pyattn.compat.flash_attn.arguments import options, without_gradient
from pyattn.compat.flash_attn.cache import Cache, Packed, Rotary, attend


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attn_func` of new queries over a cache, to which new keys and values are appended first, in place.

    The last query stands at the last key of its batch element, the new ones included. For decoding: no gradients, and
    one that is asked for raises.

    Args:
        q: [b, s, h, d] float16, bfloat16, float32 or float64.
        k_cache: [at least b, n, hk, d] in q's dtype, with a last stride of 1. With a block table
            [pages, page size, hk, d], for any page size.
        v_cache: [at least b, n, hk, dv], or [pages, page size, hk, dv].
        k, v: [b, s_new, hk, d] and [b, s_new, hk, dv], written behind the first cache_seqlens keys.
        rotary_cos, rotary_sin: [positions, r / 2], which rotate the first r sizes of q and k: k at the positions
            cache_seqlens, cache_seqlens + 1, ..; q there, too, if causal or with a window, else all at cache_seqlens.
        cache_seqlens: int or integer [b], the number of keys before the call; by default the cache is full.
        cache_batch_idx: integer [b], which row of the cache each batch element has; by default its own.
        cache_leftpad: integer [b], the first key that each batch element sees; cache_seqlens counts those before it.
        block_table: integer [b, pages of one]; key j of batch element t is row j % page size of page
            block_table[t, j // page size]. Then n is the keys that there is room for.
        rotary_interleaved: rotate sizes 0 and 1, 2 and 3, ..; else 0 and r / 2, 1 and r / 2 + 1, ..
        num_splits: without effect: how the keys are divided is chosen by their number, and changes no meaning.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as for `flash_attn_func`.
        return_softmax_lse: also return lse.

    Returns:
        out [b, s, h, dv] in q's dtype, and with return_softmax_lse lse [b, h, s], as of `flash_attn_func`.

    Raises:
        As `flash_attn_func`, of arguments before the cache is written to. UnsupportedError in a backward and, as in
        flash_attn, for cache_batch_idx with a block table and for rotary_cos without k.
        The values of cache_seqlens, cache_batch_idx and block_table are checked on the CPU; reading a GPU's would
        stall it.
    """
    if cache_batch_idx is not None and block_table is not None:
        raise UnsupportedError("cache_batch_idx: expected None with block_table, got a tensor: both say which rows")
    out, lse = without_gradient(
        "flash_attn_with_kvcache", (q, k_cache, v_cache, k, v), attend, q, k, v,
        Cache(k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, block_table),
        Rotary(rotary_cos, rotary_sin, rotary_interleaved), Packed(),
        options(softmax_scale, causal, window_size, softcap, alibi_slopes),
    )  # fmt: skip
    return (out, lse) if return_softmax_lse else out
