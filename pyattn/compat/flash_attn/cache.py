"""Attention over a key/value cache to which new keys are appended first, in place: what flash_attn's faces share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyattn import check, core
from pyattn.check import DtypeError, RangeError, ShapeError, UnsupportedError
from pyattn.compat.flash_attn.arguments import check_shape


class Cache(NamedTuple):
    """A cache and how much of it each batch element has, as flash_attn's functions are given them."""

    k: Tensor  # [rows, n, hk, d]
    v: Tensor  # [rows, n, hk, dv]
    seqlens: int | Tensor | None = None  # [b], before anything is appended
    batch_idx: Tensor | None = None  # [b]
    leftpad: Tensor | None = None  # [b]
    table: Tensor | None = None  # [b, pages of one], by which k and v are pages


class Rotary(NamedTuple):
    """By what angles queries and new keys are turned."""

    cos: Tensor | None
    sin: Tensor | None
    interleaved: bool
    seqlens: Tensor | None = None  # [b], where positions begin; by default behind the cache's keys


class Packed(NamedTuple):
    """Where the sequences of queries and of new keys start, if they are packed; else they are [b, length, ..]."""

    q: Tensor | None = None
    max_seqlen_q: int | None = None
    new: Tensor | None = None


class _Rows(NamedTuple):
    """Of the rows of a batch or of packed sequences: whose each is, its place among those, and how many each has."""

    b: int
    element: Tensor  # int64 [b, 1]; packed [total]
    place: Tensor  # int64 [length]; packed [total]
    length: int | Tensor  # of packed sequences int32 [b]


def attend(
    q: Tensor, k: Tensor | None, v: Tensor | None, cache: Cache, rotary: Rotary, packed: Packed, shared: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """out and lse of queries over a cache, to which k and v are appended, where given.

    shared: the options that every function has, as `arguments.options` gives them.

    Returns:
        out [b, s, h, dv] and lse [b, h, s]; for packed queries [total_q, h, dv] and [h, total_q].
    """
    q = _check_caches(q, cache, packed.q is not None)
    of_q = _rows("cu_seqlens_q", q, packed.q, None, q)
    b = of_q.b
    table, room = _table(b, q, cache)
    before = _lengths(cache.seqlens, b, room, q)
    of_new: _Rows | None = None
    new: int | Tensor = 0
    if k is not None or v is not None:
        k, v = _check_new(b, q, k, v, cache, packed.new is not None)
        of_new = _rows("cu_seqlens_k_new", k, packed.new, b, q)
        new = of_new.length
    _check_range("cache_seqlens", before, room - new, "there is room for {} keys, the new ones included", room)
    if rotary.cos is not None or rotary.sin is not None:
        local = bool(shared["causal"]) or "window" in shared
        q, k = _turned(q, k, of_q, of_new, rotary, before, local)
    if cache.leftpad is not None:
        first = check.check_integers("cache_leftpad", cache.leftpad, (b,), q)
        shared["mask"] = (torch.arange(room, device=q.device) >= first[:, None])[:, None, None]
    if packed.q is not None:
        q, at = _aligned_at_the_end(q, of_q, packed.max_seqlen_q)

    seen_k, seen_v = (t if table is not None else t[:b] for t in (cache.k, cache.v))
    x, numbers = core.prepare(
        q.transpose(1, 2), seen_k.transpose(1, 2), seen_v.transpose(1, 2), key_lengths=before + new, block_table=table,
        cached=True, **shared,
    )  # fmt: skip
    if of_new is not None and k is not None and v is not None:
        if cache.table is not None and not check.is_traced(cache.table):
            check.check_values(x)
        behind = _slots(table, cache.k.shape[1], of_new.element, before[of_new.element] + of_new.place)
        cache.k[behind] = k
        cache.v[behind] = v
    out, lse = core.run(x, numbers, "auto")
    out = out.transpose(1, 2)
    return (out, lse) if packed.q is None else (out[at], lse.transpose(1, 2)[at].T)


def _rows(name: str, t: Tensor, starts: Tensor | None, sequences: int | None, q: Tensor) -> _Rows:
    """Those of t [b, length, ..], or with the starts of its sequences [total, ..]."""
    if starts is None:
        b, length = t.shape[:2]
        return _Rows(b, torch.arange(b, device=q.device)[:, None], torch.arange(length, device=q.device), length)
    size = check_shape(name, starts, "sequences+1", None if sequences is None else sequences + 1).shape[0]
    starts = check.check_integers(name, starts, (size,), q)
    if size == 0:
        raise ShapeError(f"{name}: expected [sequences + 1], the start of each sequence and the end, got [0]")
    if starts.device.type == "cpu" and not check.is_traced(starts):
        check.check_starts(name, starts.tolist(), t.shape[0])
    row = torch.arange(t.shape[0], device=q.device)
    element = torch.searchsorted(starts[1:], row, right=True)
    return _Rows(size - 1, element, row - starts[element], starts.diff())


def _aligned_at_the_end(q: Tensor, rows: _Rows, longest: int | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Packed queries as a batch [b, longest, h, d], and where in it they are.

    Each sequence's last query is the last row, where the last key is, so that all stand where they should.
    """
    assert isinstance(rows.length, Tensor)
    if longest is None:
        raise DtypeError("max_seqlen_q: expected an int with cu_seqlens_q, got None: the queries become a padded batch")
    if rows.length.device.type == "cpu" and not check.is_traced(rows.length):
        most = max(rows.length.tolist(), default=0)
        if most > longest:
            raise RangeError(f"max_seqlen_q: expected at least {most}, got {longest}: a sequence has that many")
    at = rows.element, rows.place + longest - rows.length[rows.element]
    padded = q.new_zeros(rows.b, longest, *q.shape[1:])
    padded[at] = q
    return padded, at


def _turned(
    q: Tensor, k: Tensor | None, of_q: _Rows, of_new: _Rows | None, rotary: Rotary, before: Tensor, local: bool
) -> tuple[Tensor, Tensor]:
    """q and k, turned; without a causal mask or a window all the queries of a batch element stand at one position."""
    if k is None or of_new is None:
        raise UnsupportedError(
            "rotary_cos: expected k and v with it, got None: as in flash_attn it turns no cached key"
        )
    cos, sin = _check_rotary(rotary, q)
    name, first, known = "cache_seqlens", before, cos.shape[0]
    if rotary.seqlens is not None:
        name, first = "rotary_seqlens", check.check_integers("rotary_seqlens", rotary.seqlens, before.shape, q)
    for length in (of_q.length if local else 1, of_new.length):
        _check_range(name, first, known - length, "rotary_cos has {} rows, one per position", known)
    q_places = first[of_q.element] + (of_q.place if local else 0)
    k_places = first[of_new.element] + of_new.place
    return _rotated(q, cos, sin, q_places, rotary.interleaved), _rotated(k, cos, sin, k_places, rotary.interleaved)


def _rotated(t: Tensor, cos: Tensor, sin: Tensor, places: Tensor, interleaved: bool) -> Tensor:
    """t [.., h, d], its first r sizes turned in pairs by the angles at `places` [..] in cos and sin [rows, r / 2].

    In float32, or float64 for float64 t. Source: Su et al. 2021, arXiv:2104.09864.
    """
    wide = torch.float64 if t.dtype is torch.float64 else torch.float32
    cos, sin = (angles[places].unsqueeze(-2).to(wide) for angles in (cos, sin))  # [.., 1, r / 2]
    turning, rest = t.tensor_split([2 * cos.shape[-1]], -1)
    x, y = turning.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turning.chunk(2, -1)
    pair = (x * cos - y * sin, x * sin + y * cos)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned.to(t.dtype), rest), -1)


def _slots(table: Tensor | None, page_size: int, element: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Where in the cache [rows, page size, ..] the keys at `places` of each element lie: rows, and places in these."""
    if table is None:
        return element, places
    return table.long()[element, places // page_size], places % page_size


def _table(b: int, q: Tensor, cache: Cache) -> tuple[Tensor | None, int]:
    """The pages of every batch element, and how many keys they have room for."""
    rows, n = cache.k.shape[:2]
    batch_idx = cache.batch_idx
    if batch_idx is not None:
        batch_idx = check.check_integers("cache_batch_idx", batch_idx, (b,), q)
    if cache.table is not None:
        table = check_shape("block_table", cache.table, "b pages", b if batch_idx is None else None, None)
        if batch_idx is not None:
            _check_range("cache_batch_idx", batch_idx, len(table) - 1, "block_table has {} rows", len(table))
            table = table[batch_idx.long()]
        return table, table.shape[1] * n
    if batch_idx is None:
        if rows < b:
            raise ShapeError(f"k_cache: expected at least b={b} rows, got {list(cache.k.shape)}: b is {b} in q")
        return None, n
    _check_range("cache_batch_idx", batch_idx, rows - 1, "k_cache has {} rows", rows)
    return batch_idx[:, None], n  # a cache in pages, each of which is a row


def _lengths(seqlens: int | Tensor | None, b: int, room: int, q: Tensor) -> Tensor:
    """int32 [b]."""
    if seqlens is None or isinstance(seqlens, int):
        return torch.full((b,), room if seqlens is None else seqlens, dtype=torch.int32, device=q.device)
    return check.check_integers("cache_seqlens", seqlens, (b,), q)


def _check_caches(q: Tensor, cache: Cache, packed: bool) -> Tensor:
    """q in the dtype in which it is attended with, which the caches must have: they may be written to."""
    q = check_shape("q", q, *(("total_q h d", None, None, None) if packed else ("b s h d", None, None, None, None)))
    q = q.to(check.autocast_dtype(q))
    check_shape("k_cache", cache.k, "rows n hk d", None, None, None, q.shape[-1])
    check_shape("v_cache", cache.v, "rows n hk dv", *cache.k.shape[:3], None)
    for name, t in (("k_cache", cache.k), ("v_cache", cache.v)):
        check.check_tensor(name, t, (q.dtype,), q)
    return q


def _check_new(
    b: int, q: Tensor, k: Tensor | None, v: Tensor | None, cache: Cache, packed: bool
) -> tuple[Tensor, Tensor]:
    """k and v, in the dtype in which they are attended with."""
    for name, t in (("k_cache", cache.k), ("v_cache", cache.v)):
        if t.stride()[-1] != 1:
            raise ShapeError(
                f"{name}: expected a last stride of 1, got strides {t.stride()}: it is written to in place"
            )
    if cache.seqlens is None:
        raise DtypeError("cache_seqlens: expected an int or a tensor with k and v, got None: they follow those keys")
    form, sizes = ("total_k_new", (None,)) if packed else ("b s_new", (b, None))
    k = check_shape("k", k, f"{form} hk d", *sizes, *cache.k.shape[2:])
    v = check_shape("v", v, f"{form} hk dv", *k.shape[:-2], *cache.v.shape[2:])
    k, v = (t.to(check.autocast_dtype(t)) for t in (k, v))
    for name, t in (("k", k), ("v", v)):
        check.check_tensor(name, t, (q.dtype,), q)
    return k, v


def _check_rotary(rotary: Rotary, q: Tensor) -> tuple[Tensor, Tensor]:
    """rotary_cos and rotary_sin, neither of them missing."""
    cos = check_shape("rotary_cos", rotary.cos, "positions r/2", None, None)
    sin = check_shape("rotary_sin", rotary.sin, "positions r/2", *cos.shape)
    for name, t in (("rotary_cos", cos), ("rotary_sin", sin)):
        check.check_tensor(name, t, check.DTYPES, q)
    d = q.shape[-1]
    if 2 * cos.shape[1] > d:
        raise ShapeError(f"rotary_cos: expected [positions, r/2], r at most d={d}, got {list(cos.shape)}")
    return cos, sin


def _check_range(name: str, t: Tensor, most: int | Tensor, why: str, *numbers: int) -> None:
    """Checks values, of tensors on the CPU; reading a GPU's would stall it.

    `why` is filled with `numbers` only to be raised: written out, a size is no longer one that torch.compile may vary.
    """
    if t.device.type == "cpu" and not check.is_traced(t):
        wrong = (t < 0) | (t > most)
        if wrong.any():
            value, limit = (int(of[wrong][0]) for of in (t, torch.as_tensor(most).expand_as(t)))
            raise RangeError(f"{name}: expected values in [0, {limit}], got {value}: {why.format(*numbers)}")
