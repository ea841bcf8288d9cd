"""flash_attn_with_kvcache: one call that appends to a key/value cache, in place, and attends over it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyattn import check, core
from pyattn.check import DtypeError, RangeError, ShapeError, UnsupportedError
from pyattn.compat.flash_attn.arguments import check_shape, options, refuse_gradient


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

    The last query stands at the last key of its batch element, the new ones included. For decoding: no gradients.

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
        As `flash_attn_func`, of arguments before the cache is written to. UnsupportedError where a gradient would be
        recorded and, as in flash_attn, for cache_batch_idx with a block table and for rotary_cos without k.
        The values of cache_seqlens, cache_batch_idx and block_table are checked on the CPU; reading a GPU's would
        stall it.
    """
    q = _check_caches(q, k_cache, v_cache)
    b, s, _, _ = q.shape
    table, room = _table(q, k_cache, cache_batch_idx, block_table)
    before = _lengths(cache_seqlens, room, q)
    new = 0
    if k is not None or v is not None:
        k, v = _check_new(q, k, v, k_cache, v_cache, cache_seqlens)
        new = k.shape[1]
    refuse_gradient("flash_attn_with_kvcache", q, k_cache, v_cache, k, v)
    _check_range("cache_seqlens", before, room - new, "there is room for {} keys, {} of them new", room, new)
    shared = options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    if rotary_cos is not None or rotary_sin is not None:
        cos, sin, k = _check_rotary(rotary_cos, rotary_sin, q, k)
        steps = s if causal or "window" in shared else 1
        rows = cos.shape[0]
        _check_range("cache_seqlens", before, rows - max(steps, new), "rotary_cos has {} rows, one per position", rows)
        q = _rotated(q, cos, sin, _places(before, steps), rotary_interleaved)
        k = _rotated(k, cos, sin, _places(before, new), rotary_interleaved)
    if cache_leftpad is not None:
        first = check.check_integers("cache_leftpad", cache_leftpad, (b,), q)
        shared["mask"] = (torch.arange(room, device=q.device) >= first[:, None])[:, None, None]

    seen_k, seen_v = (k_cache, v_cache) if table is not None else (k_cache[:b], v_cache[:b])
    x, numbers = core.prepare(
        q.transpose(1, 2), seen_k.transpose(1, 2), seen_v.transpose(1, 2), key_lengths=before + new, block_table=table,
        cached=True, **shared,
    )  # fmt: skip
    if k is not None and v is not None:
        if block_table is not None and not check.is_traced(block_table):
            check.check_values(x)
        at = _rows(table, k_cache.shape[1], _places(before, new))
        k_cache[at] = k
        v_cache[at] = v
    out, lse = core.run(x, numbers, "auto")
    out = out.transpose(1, 2)
    return (out, lse) if return_softmax_lse else out


def _rotated(t: Tensor, cos: Tensor, sin: Tensor, places: Tensor, interleaved: bool) -> Tensor:
    """t [b, s, h, d] with its first r sizes turned, in pairs, by the angles at `places` [b, s or 1] in cos and sin
    [rows, r / 2]. In float32, or float64 for float64 t.

    Source: Su et al. 2021, arXiv:2104.09864.
    """
    wide = torch.float64 if t.dtype is torch.float64 else torch.float32
    cos, sin = (angles[places].unsqueeze(2).to(wide) for angles in (cos, sin))  # [b, s or 1, 1, r / 2]
    turning, rest = t.tensor_split([2 * cos.shape[-1]], -1)
    x, y = turning.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turning.chunk(2, -1)
    pair = (x * cos - y * sin, x * sin + y * cos)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned.to(t.dtype), rest), -1)


def _rows(table: Tensor | None, page_size: int, places: Tensor) -> tuple[Tensor, Tensor]:
    """Where in the cache [rows, page size, ..] the keys at `places` [b, s] lie: their rows and places in these."""
    if table is None:
        return torch.arange(places.shape[0], device=places.device)[:, None], places
    return table.long().gather(1, places // page_size), places % page_size


def _places(before: Tensor, count: int) -> Tensor:
    """The positions [b, count] that follow `before` [b]."""
    return before[:, None] + torch.arange(count, device=before.device)


def _table(
    q: Tensor, k_cache: Tensor, batch_idx: Tensor | None, block_table: Tensor | None
) -> tuple[Tensor | None, int]:
    """The pages of every batch element, and how many keys they have room for."""
    b, (rows, n) = q.shape[0], k_cache.shape[:2]
    if block_table is not None:
        if batch_idx is not None:
            raise UnsupportedError("cache_batch_idx: expected None with block_table, got a tensor: both say which rows")
        check_shape("block_table", block_table, "b pages", b, None)
        return block_table, block_table.shape[1] * n
    if batch_idx is None:
        if rows < b:
            raise ShapeError(f"k_cache: expected at least b={b} rows, got {list(k_cache.shape)}: b is {b} in q")
        return None, n
    batch_idx = check.check_integers("cache_batch_idx", batch_idx, (b,), q)
    _check_range("cache_batch_idx", batch_idx, rows - 1, "k_cache has {} rows", rows)
    return batch_idx[:, None], n  # a cache in pages, each of which is a row


def _lengths(cache_seqlens: int | Tensor | None, room: int, q: Tensor) -> Tensor:
    """int32 [b]."""
    if cache_seqlens is None or isinstance(cache_seqlens, int):
        keys = room if cache_seqlens is None else cache_seqlens
        return torch.full((q.shape[0],), keys, dtype=torch.int32, device=q.device)
    return check.check_integers("cache_seqlens", cache_seqlens, (q.shape[0],), q)


def _check_caches(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    """q in the dtype in which it is attended with, which the caches must have: they are written to."""
    q = check_shape("q", q, "b s h d", None, None, None, None)
    q = q.to(check.autocast_dtype(q))
    check_shape("k_cache", k_cache, "rows n hk d", None, None, None, q.shape[-1])
    rows, n, hk, _ = k_cache.shape
    check_shape("v_cache", v_cache, "rows n hk dv", rows, n, hk, None)
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        check.check_tensor(name, t, (q.dtype,), q)
        if t.stride()[-1] != 1:
            raise ShapeError(
                f"{name}: expected a last stride of 1, got strides {t.stride()}: it is written to in place"
            )
    return q


def _check_new(
    q: Tensor, k: Tensor | None, v: Tensor | None, k_cache: Tensor, v_cache: Tensor, cache_seqlens: int | Tensor | None
) -> tuple[Tensor, Tensor]:
    """k and v, in the dtype in which they are attended with."""
    if cache_seqlens is None:
        raise DtypeError("cache_seqlens: expected an int or a tensor with k and v, got None: they follow those keys")
    b, hk = q.shape[0], k_cache.shape[2]
    k = check_shape("k", k, "b s_new hk d", b, None, hk, k_cache.shape[3])
    v = check_shape("v", v, "b s_new hk dv", b, k.shape[1], hk, v_cache.shape[3])
    k, v = (t.to(check.autocast_dtype(t)) for t in (k, v))
    for name, t in (("k", k), ("v", v)):
        check.check_tensor(name, t, (q.dtype,), q)
    return k, v


def _check_rotary(cos: Tensor | None, sin: Tensor | None, q: Tensor, k: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """rotary_cos, rotary_sin and k, none of them missing."""
    if k is None:
        raise UnsupportedError(
            "rotary_cos: expected k and v with it, got None: as in flash_attn it turns no cached key"
        )
    cos = check_shape("rotary_cos", cos, "positions r/2", None, None)
    sin = check_shape("rotary_sin", sin, "positions r/2", *cos.shape)
    for name, t in (("rotary_cos", cos), ("rotary_sin", sin)):
        check.check_tensor(name, t, check.DTYPES, q)
    d = q.shape[-1]
    if 2 * cos.shape[1] > d:
        raise ShapeError(f"rotary_cos: expected [positions, r/2], r at most d={d}, got {list(cos.shape)}")
    return cos, sin, k


def _check_range(name: str, t: Tensor, most: int, why: str, *numbers: int) -> None:
    """Checks values, of tensors on the CPU; reading a GPU's would stall it.

    `why` is filled with `numbers` only to be raised: written out, a size is no longer one that torch.compile may vary.
    """
    if t.device.type == "cpu" and t.numel() > 0 and not check.is_traced(t):
        low, high = (int(end) for end in torch.aminmax(t))
        if low < 0 or high > most:
            wrong = low if low < 0 else high
            raise RangeError(f"{name}: expected values in [0, {most}], got {wrong}: {why.format(*numbers)}")
