"""pyattn.compat.flash_attn held against flash_attn's documented meaning, written out in plain torch with masks."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import sys
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyattn.check import DtypeError, RangeError, ShapeError, UnsupportedError
from pyattn.compat import flash_attn
from pyattn.compat.flash_attn import bert_padding
from pyattn.testing import assert_as_accurate

B, H, HK, D = 2, 4, 2, 8
SLOPES = torch.linspace(0.5, 0.1, B * H).view(B, H)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 1)},
    "window-left": {"window_size": (2, -1)},
    "window-right": {"window_size": [-1, 2]},
    "window-as-a-tensor": {"window_size": torch.tensor([2, 1])},
    "window-zero": {"window_size": (0, 0)},
    "window-negative-is-unlimited": {"window_size": (-2, -7)},
    "causal-means-right-0": {"causal": True, "window_size": (4, 9)},
    "scale": {"softmax_scale": 0.7},
    "softcap": {"softcap": 1.5, "softmax_scale": 2.0},
    "softcap-negative-is-none": {"softcap": -1.0},
    "numbers-of-numpy": {"softcap": np.float32(1.5), "softmax_scale": np.float32(0.5), "window_size": [np.int64(3), 1]},
    "alibi-per-head": {"alibi_slopes": SLOPES[0], "causal": True},
    "alibi-per-batch-capped": {"alibi_slopes": SLOPES, "softcap": 1.5, "window_size": (5, 0)},
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def plain(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False,
    window_size: Any = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None, first: int = 0,
    kept: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [b, s, h, dv] and lse [b, h, s]; `first` is the first visible key, `kept` the weights' dropout factors."""
    s, n, h = q.shape[1], k.shape[1], q.shape[2]
    k, v = (t.repeat_interleave(h // t.shape[2], 2) for t in (k, v))
    scores = torch.einsum("bshd,bnhd->bhsn", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    own, j = torch.arange(s)[:, None] + n - s, torch.arange(n)
    if alibi_slopes is not None:
        scores = scores - (alibi_slopes.view(-1, h, 1, 1) * (own - j).abs()).to(scores.dtype)
    left, right = window_size[0], 0 if causal else window_size[1]
    seen = (j >= own - left if left >= 0 else j >= 0) & (j <= own + right if right >= 0 else j >= 0) & (j >= first)
    scores = scores.masked_fill(~seen, -1e4)
    weights = scores.softmax(-1) * seen * kept
    lse = torch.where(seen.any(-1), scores.logsumexp(-1), -torch.inf)
    return torch.einsum("bhsn,bnhd->bshd", weights.to(v.dtype), v), lse


def for_element(options: dict[str, Any], i: int) -> dict[str, Any]:
    """The options with the slopes of batch element i."""
    slopes = options.get("alibi_slopes")
    return options | {"alibi_slopes": slopes if slopes is None else slopes.view(-1, H)[i % (slopes.numel() // H)]}


def one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`plain` of every packed sequence; out [total_q, h, dv] and lse [h, total_q]."""
    sides = (t.split([pair[side] for pair in lengths]) for t, side in ((q, 0), (k, 1), (v, 1)))
    found = [
        plain(*(t[None] for t in own), **for_element(options, i)) for i, own in enumerate(zip(*sides, strict=True))
    ]
    return torch.cat([out[0] for out, _ in found]), torch.cat([lse[0] for _, lse in found], 1)


def results(attention: Any, *tensors: Tensor) -> dict[str, Tensor]:
    """out, lse, and the gradients that come back through both."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out, lse, *_ = attention(*leaves)
    loss = (out * normal(*out.shape, seed=8).to(out.dtype)).sum()
    loss = loss + (lse.where(lse != -torch.inf, 0) * normal(*lse.shape, seed=9).to(lse.dtype)).sum()
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return {"out": out.detach(), "lse": lse.detach()} | {f"d_{i}": grad for i, grad in enumerate(grads)}


def usual_errors(plain: Any, *tensors: Tensor, draws: int = 8) -> dict[str, Tensor]:
    """Plain torch's error in the dtype of `tensors`, which at one point may be a lucky one: its root mean square over
    points nearby."""
    squares: dict[str, Tensor] = {}
    for seed in range(draws):
        nearby = [t * (1 + 0.01 * normal(*t.shape, seed=100 * seed + i).to(t.dtype)) for i, t in enumerate(tensors)]
        exact, found = results(plain, *(t.double() for t in nearby)), results(plain, *nearby)
        for name, t in exact.items():
            error = torch.where(t.isfinite(), found[name].double() - t, 0.0)
            squares[name] = squares.get(name, 0.0) + error.square() / draws
    return {name: t.sqrt() for name, t in squares.items()}


def assert_agree(actual: Any, expected: Any, *tensors: Tensor) -> None:
    """In float64 by value; float32 and bfloat16 as accurately as plain torch in that dtype."""
    exact = results(expected, *tensors)
    for name, t in results(actual, *tensors).items():
        torch.testing.assert_close(t, exact[name], msg=lambda text, name=name: f"{name}: {text}")
    for dtype in (torch.float32, torch.bfloat16):
        given = [t.to(dtype) for t in tensors]
        exact = results(expected, *(t.double() for t in given))
        baseline, usual = results(expected, *given), usual_errors(expected, *given)
        for name, t in results(actual, *given).items():
            assert_as_accurate(t, exact[name], baseline[name], usual[name], f"{dtype} {name}")


def qkv(s: int, n: int, *, dv: int = D) -> tuple[Tensor, Tensor, Tensor]:
    return normal(B, s, H, D), normal(B, n, HK, D, seed=1), normal(B, n, HK, dv, seed=2)


@pytest.mark.parametrize("lengths", [(7, 7), (5, 9), (9, 5), (1, 6), (0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_dense_agrees_with_plain_torch(options: dict[str, Any], lengths: tuple[int, int]) -> None:
    call = partial(flash_attn.flash_attn_func, **options, return_attn_probs=True)
    assert_agree(call, partial(plain, **options), *qkv(*lengths))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_packed_together_agrees_with_plain_torch(options: dict[str, Any]) -> None:
    call = partial(flash_attn.flash_attn_qkvpacked_func, **options, return_attn_probs=True)
    assert_agree(call, lambda qkv: plain(*qkv.unbind(2), **options), normal(B, 7, 3, H, D))
    call = partial(flash_attn.flash_attn_kvpacked_func, **options, return_attn_probs=True)
    q, kv = normal(B, 5, H, D), normal(B, 7, 2, HK, D, seed=1)
    assert_agree(call, lambda q, kv: plain(q, *kv.unbind(2), **options), q, kv)


def starts(lengths: Any) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


VARLEN = {"mixed": ((5, 7), (4, 2)), "empty": ((0, 3), (6, 0)), "one": ((1, 9), (1, 1)), "nothing": ((0, 0), (0, 0))}


@pytest.mark.parametrize("lengths", VARLEN.values(), ids=VARLEN)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_varlen_agrees_with_plain_torch(options: dict[str, Any], lengths: Any) -> None:
    q_lengths, k_lengths = zip(*lengths, strict=True)
    cu_q, cu_k, longest = starts(q_lengths), starts(k_lengths), max(q_lengths)
    total_q, total_k = sum(q_lengths), sum(k_lengths)
    q, kv, qkv = normal(total_q, H, D), normal(total_k, 2, HK, D), normal(total_q, 3, H, D)
    call = partial(flash_attn.flash_attn_varlen_func, **options, return_attn_probs=True)
    assert_agree(
        lambda *t: call(*t, cu_q, cu_k, longest, 9), lambda *t: one_by_one(*t, lengths, **options), q, *kv.unbind(1)
    )
    call_kv = partial(flash_attn.flash_attn_varlen_kvpacked_func, **options, return_attn_probs=True)
    assert_agree(
        lambda *t: call_kv(*t, cu_q, cu_k, longest, 9),
        lambda q, kv: one_by_one(q, *kv.unbind(1), lengths, **options),
        q, kv,
    )  # fmt: skip
    call_qkv = partial(flash_attn.flash_attn_varlen_qkvpacked_func, **options, return_attn_probs=True)
    pairs = [(length, length) for length in q_lengths]
    assert_agree(
        lambda qkv: call_qkv(qkv, cu_q, longest), lambda qkv: one_by_one(*qkv.unbind(1), pairs, **options), qkv
    )


@pytest.mark.parametrize("page_size", [1, 4, 256])
@pytest.mark.parametrize("lengths", VARLEN.values(), ids=VARLEN)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_varlen_with_pages_agrees_with_plain_torch(options: dict[str, Any], lengths: Any, page_size: int) -> None:
    q_lengths, k_lengths = zip(*lengths, strict=True)
    q, k, v = (normal(sum(size), h, D, seed=h) for size, h in ((q_lengths, H), (k_lengths, HK), (k_lengths, HK)))
    (pages_k, table), (pages_v, _) = (paged(t.split(k_lengths), page_size) for t in (k, v))
    call = partial(flash_attn.flash_attn_varlen_func, **options, return_attn_probs=True, block_table=table)
    out, lse, _ = call(q, pages_k, pages_v, starts(q_lengths), starts(k_lengths), max(q_lengths) + 2, 0)
    torch.testing.assert_close((out, lse), one_by_one(q, k, v, lengths, **options))


def paged(rows: Any, page_size: int) -> tuple[Tensor, Tensor]:
    """Rows of keys [n, hk, d] in pages that lie in any order, NaN behind them, and the block table."""
    each = max(1, -(-max(len(row) for row in rows) // page_size))
    table = torch.randperm(len(rows) * each + 1, generator=torch.Generator().manual_seed(each))[1:].view(-1, each)
    pages = torch.full((len(rows) * each + 1, page_size, *rows[0].shape[1:]), torch.nan, dtype=rows[0].dtype)
    for row, own in zip(rows, table, strict=True):
        for j, key in enumerate(row):
            pages[own[j // page_size], j % page_size] = key
    return pages, table.int()


ROOM, LENGTHS = 16, (9, 0)
ANGLES = torch.arange(ROOM)[:, None] / torch.tensor([1.0, 7.0, 3.0, 11.0], dtype=torch.float64)


def turned(t: Tensor, positions: Tensor, interleaved: bool, half: int) -> Tensor:
    """t [s, h, d] with its first 2 * half sizes as complex numbers, each times the unit of its angle."""
    turning, rest = t[..., : 2 * half], t[..., 2 * half :]
    x, y = (turning[..., ::2], turning[..., 1::2]) if interleaved else (turning[..., :half], turning[..., half:])
    z = torch.complex(x.contiguous(), y.contiguous()) * torch.exp(1j * ANGLES[positions, :half])[:, None]
    if interleaved:
        return torch.cat([torch.view_as_real(z).flatten(-2), rest], -1)
    return torch.cat([z.real, z.imag, rest], -1)


def stored(kind: str, k: Tensor, v: Tensor) -> tuple[dict[str, Tensor], Any]:
    """The arguments by which a call finds keys [b, n, hk, *], and how to read them back out of a cache."""
    if kind.startswith("paged"):
        page_size = int(kind.removeprefix("paged-"))
        (pages_k, table), (pages_v, _) = (paged(t, page_size) for t in (k, v))
        given = {"k_cache": pages_k, "v_cache": pages_v, "block_table": table}
        return given, lambda t: t[table].flatten(1, 2)[:, :ROOM]
    if kind == "dense":
        return {"k_cache": k.clone(), "v_cache": v.clone()}, lambda t: t
    rows = torch.tensor([4, 1]) if kind == "batch-idx" else torch.arange(B)
    caches = [torch.full((5, *t.shape[1:]), torch.nan, dtype=t.dtype).index_copy(0, rows, t) for t in (k, v)]
    given = dict(zip(("k_cache", "v_cache"), caches, strict=True))
    return given | ({"cache_batch_idx": rows.int()} if kind == "batch-idx" else {}), lambda t: t[rows]


@pytest.mark.parametrize("kind", ["dense", "more-rows", "batch-idx", "paged-5", "paged-256"])
@pytest.mark.parametrize(("s", "new", "rotary"), [
    (s, new, rotary) for s, new in ((1, 0), (5, 0), (1, 1), (3, 3), (4, 2), (2, 6))
    for rotary in (None, (True, 4), (False, 4), (True, 3), (False, 3)) if new or not rotary
], ids=str)  # fmt: skip
def test_kvcache_agrees_with_plain_torch(s: int, new: int, rotary: Any, kind: str) -> None:
    for options, leftpad in itertools.product(OPTIONS.values(), (None, (9, 2))):
        q, k, v = normal(B, s, H, D), normal(B, ROOM, HK, D, seed=1), normal(B, ROOM, HK, D, seed=2)
        for t, length in zip((*k, *v), LENGTHS * 2, strict=True):
            t[length:] = torch.nan
        given, read = stored(kind, k, v)
        given |= {"cache_seqlens": torch.tensor(LENGTHS, dtype=torch.int32)}
        new_k, new_v = normal(B, new, HK, D, seed=3), normal(B, new, HK, D, seed=4)
        if new:
            given |= {"k": new_k, "v": new_v}
        if rotary:
            angles = ANGLES[:, : rotary[1]]
            given |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "rotary_interleaved": rotary[0]}
        if leftpad:
            given |= {"cache_leftpad": torch.tensor(leftpad)}
        out, lse = flash_attn.flash_attn_with_kvcache(q, **given, **options, return_softmax_lse=True)

        caches = [read(given[name]) for name in ("k_cache", "v_cache")]
        local = options.get("causal") or max(options.get("window_size", (-1, -1))) >= 0
        for t, length in enumerate(LENGTHS):
            own_q, own_k = q[t], new_k[t]
            if rotary:
                own_q = turned(own_q, length + torch.arange(s) * (1 if local else 0), *rotary)
                own_k = turned(own_k, length + torch.arange(new), *rotary)
            keys, values = torch.cat([k[t, :length], own_k]), torch.cat([v[t, :length], new_v[t]])
            torch.testing.assert_close([cache[t, : length + new] for cache in caches], [keys, values])
            assert all(cache[t, length + new :].isnan().all() for cache in caches)
            first = leftpad[t] if leftpad else 0
            expected = plain(own_q[None], keys[None], values[None], first=first, **for_element(options, t))
            torch.testing.assert_close((out[[t]], lse[[t]]), expected)


@pytest.mark.parametrize("cache_seqlens", [7, None, torch.tensor([7, 7])], ids=str)
def test_kvcache_lengths_may_be_an_int_or_the_whole_cache(cache_seqlens: Any) -> None:
    q, k, v = qkv(2, 7)
    out = flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=cache_seqlens, causal=True, num_splits=3)
    torch.testing.assert_close(out, plain(q, k, v, causal=True)[0])


def test_kvcache_rounds_rotated_queries_and_keys_to_the_dtype_of_the_cache() -> None:
    q, k, v = (t.bfloat16() for t in qkv(1, 8))
    new = normal(B, 1, HK, D, dtype=torch.bfloat16)
    cos, sin = ANGLES.cos().bfloat16(), ANGLES.sin().bfloat16()
    flash_attn.flash_attn_with_kvcache(q, k, v, new, new, cos, sin, cache_seqlens=5)
    z = torch.view_as_complex(new.float().unflatten(-1, (-1, 2))) * torch.complex(cos[5].float(), sin[5].float())
    assert torch.equal(k[:, 5], torch.view_as_real(z).flatten(-2).bfloat16()[:, 0])


def test_dropout_drops_weights_and_scales_the_rest() -> None:
    def attention(*t: Tensor) -> Tensor:
        torch.manual_seed(3)
        return flash_attn.flash_attn_func(*t, dropout_p=0.3)

    q, k, v = qkv(30, 40)
    one_hot = torch.eye(40, dtype=q.dtype)[None, :, None].expand(B, -1, HK, -1)  # so that out is the weights
    factors = (attention(q, k, one_hot) / plain(q, k, one_hot)[0]).transpose(1, 2)
    kept = factors != 0
    torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 1 / 0.7))
    assert abs(kept.double().mean() - 0.7) < 0.02
    none = torch.zeros(B, H, 30)  # as lse, which is not to be had with dropout
    actual = results(lambda *t: (attention(*t), none), q, k, v)
    torch.testing.assert_close(actual, results(lambda *t: (plain(*t, kept=factors)[0], none), q, k, v))


def test_layouts_are_those_of_flash_attn() -> None:
    q, k, v = qkv(5, 7)
    out, _, weights = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    assert out.is_contiguous() and weights.shape == (0,)
    assert flash_attn.flash_attn_with_kvcache(q, k, v).is_contiguous()
    assert flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], starts([5]), starts([7]), 5, 7).is_contiguous()


def test_any_strides_and_head_sizes_agree_with_plain_torch() -> None:
    def strided(*tensors: Tensor) -> Any:
        columns = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in tensors]
        assert all(t.stride(-1) != 1 for t in columns)
        return flash_attn.flash_attn_func(*columns, deterministic=True, return_attn_probs=True)

    assert_agree(strided, plain, *qkv(5, 7, dv=24))
    assert_agree(strided, plain, *(normal(1, n, 2, 256, seed=n) for n in (2, 5, 5)))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_bert_padding_packs_and_pads_with_gradients(dtype: torch.dtype) -> None:
    x = normal(3, 4, 2, 5).requires_grad_()
    mask = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=dtype)
    unused = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]], dtype=dtype)
    tokens, indices, cu_seqlens, longest, seqused = bert_padding.unpad_input(x, mask)
    assert torch.equal(tokens, x[mask.bool()]) and indices.tolist() == [1, 2, 3, 4] and longest == 3
    assert cu_seqlens.tolist() == [0, 3, 4, 4] and cu_seqlens.dtype is torch.int32 and seqused.tolist() == [3, 1, 0]
    assert torch.equal(tokens, bert_padding.index_first_axis(x.flatten(0, 1), indices))
    padded, factor = bert_padding.pad_input(tokens, indices, 3, 4), normal(3, 4, 2, 5, seed=1)
    assert torch.equal(padded, x * mask[..., None, None])
    (grad,) = torch.autograd.grad((padded * factor).sum(), x)
    assert torch.equal(grad, factor * mask[..., None, None])
    tokens, _, cu_seqlens, longest, seqused = bert_padding.unpad_input(x, mask, unused)
    assert torch.equal(tokens, x[(mask + unused).bool()]) and longest == 4
    assert cu_seqlens.tolist() == [0, 4, 6, 6] and seqused.tolist() == [3, 1, 0]


def test_dropout_is_drawn_from_torch_generator_and_the_same_under_checkpoint() -> None:
    tensors = [t.requires_grad_() for t in qkv(5, 6)]

    def attention(*t: Tensor) -> Tensor:
        packed = flash_attn.flash_attn_varlen_func(*(x[0] for x in t), starts([5]), starts([6]), 5, 6, dropout_p=0.4)
        return flash_attn.flash_attn_func(*t, dropout_p=0.4, causal=True) + packed

    found = []
    for run in (attention, lambda *t: checkpoint(attention, *t, use_reentrant=False)):
        torch.manual_seed(0)
        out = run(*tensors)
        found.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    torch.testing.assert_close(*found)
    assert not torch.equal(attention(*tensors), found[0][0])


def test_autocast_lowers_float32_as_it_does_for_torch() -> None:
    q, k, v = (t.float() for t in qkv(5, 7))
    with torch.autocast("cpu", torch.bfloat16):
        out = flash_attn.flash_attn_func(q, k, v)
        cached = flash_attn.flash_attn_with_kvcache(q, k.bfloat16(), v.bfloat16(), k[:, :1], v[:, :1], cache_seqlens=6)
        with pytest.raises(DtypeError, match="k_cache: expected bfloat16, got float32"):
            flash_attn.flash_attn_with_kvcache(q, k, v)
    assert torch.equal(out, flash_attn.flash_attn_func(q.bfloat16(), k.bfloat16(), v.bfloat16()))
    assert cached.dtype is torch.bfloat16


def dense(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    return flash_attn.flash_attn_func(q, k, v, 0.2, causal=True, window_size=(4, 0), alibi_slopes=SLOPES)


def varlen(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    packed = (t.flatten(0, 1) for t in (q, k, v))
    places = (torch.arange(B + 1) * q.shape[1], torch.arange(B + 1) * k.shape[1], size, size)
    return flash_attn.flash_attn_varlen_func(*packed, *places, softcap=3.0, return_attn_probs=True)[0]


def cached(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    with torch.no_grad():
        k_cache, v_cache, lengths = k.clone(), v.clone(), torch.arange(B) + size - 4
        out = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k[:, :3], v[:, :3], cache_seqlens=lengths)
    return (out * q + k_cache.sum() + v_cache.sum()) * k.sum() * v.sum()


@pytest.mark.parametrize("function", [dense, varlen, cached])
def test_compile_gives_the_eager_result_for_every_length(function: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for s, n in ((5, 7), (11, 13), (17, 9)):
        tensors, found = [t.requires_grad_() for t in qkv(s, n)], []
        with torch._dynamo.config.patch(error_on_recompile=s > 5):
            for run in (function, compiled):
                torch.manual_seed(0)
                out = run(*tensors, n)
                found.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
        torch.testing.assert_close(*found)


USER_CODE = """
import flash_attn, flash_attn.flash_attn_interface as interface
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
assert tuple(map(int, flash_attn.__version__.split("."))) >= (2, 8) and interface.flash_attn_func is flash_attn_func
out = flash_attn_func(q, q, q, causal=True)
"""


def test_install_lets_user_code_import_flash_attn() -> None:
    from transformers.utils.import_utils import _is_package_available

    flash_attn.install()
    try:
        flash_attn.install()
        names = {"q": normal(1, 3, 2, 4)}
        exec(USER_CODE, names)
        assert torch.equal(names["out"], flash_attn.flash_attn_func(names["q"], names["q"], names["q"], causal=True))
        assert importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute") is None
        assert _is_package_available("flash_attn", return_version=True) == (True, "2.8.3")
    finally:
        flash_attn.uninstall()
    assert importlib.util.find_spec("flash_attn") is None
    flash_attn.uninstall()


def test_install_refuses_where_another_flash_attn_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleType("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", other)
    with pytest.raises(UnsupportedError, match="install: expected no flash_attn imported yet"):
        flash_attn.install()
    flash_attn.uninstall()
    assert sys.modules["flash_attn"] is other and "flash_attn.bert_padding" not in sys.modules


COMMON = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
VARLEN_SIZES = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
SIGNATURES = {
    "func": f"q k v {COMMON}",
    "qkvpacked_func": f"qkv {COMMON}",
    "kvpacked_func": f"q kv {COMMON}",
    "varlen_func": f"q k v {VARLEN_SIZES} {COMMON} block_table",
    "varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {COMMON}",
    "varlen_kvpacked_func": f"q kv {VARLEN_SIZES} {COMMON}",
    "with_kvcache": "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad "
    "block_table softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits "
    "return_softmax_lse",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_that_of_flash_attn(name: str) -> None:
    parameters = inspect.signature(getattr(flash_attn, f"flash_attn_{name}")).parameters
    assert list(parameters) == SIGNATURES[name].split()
    defaults = {p.default for p in parameters.values()} - {inspect.Parameter.empty, None, False, (-1, -1)}
    assert defaults == ({True} if name == "with_kvcache" else set())


X, PACKED, CU = normal(B, 4, H, D), normal(8, H, D), torch.tensor([0, 3, 8])
PAGES = {"q": PACKED, "k": normal(3, 4, HK, D), "v": normal(3, 4, HK, D), "cu_seqlens_q": CU, "cu_seqlens_k": CU,
         "max_seqlen_q": 5, "max_seqlen_k": 5, "block_table": torch.tensor([[0, 1], [1, 2]])}  # fmt: skip
CACHE = {"q": X, "k_cache": normal(B, 9, H, D), "v_cache": normal(B, 9, H, D), "k": X, "v": X, "cache_seqlens": 5}
TABLE, WIDE = {"block_table": torch.tensor([[0], [1]])}, torch.ones(9, 5)
WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("func", {"q": [1]}, DtypeError, "q: expected a torch.Tensor, got list"),
    ("func", {"q": PACKED}, ShapeError, r"q: expected \[b, s, h, d\], got \[8, 4, 8\]"),
    ("func", {"k": X[:1]}, ShapeError, r"k: expected \[b=2, n, hk, d=8\], got \[1, 4, 4, 8\]"),
    ("func", {"v": X[:, :2]}, ShapeError, r"v: expected \[b=2, n=4, hk=4, dv\], got \[2, 2, 4, 8\]"),
    ("func", {"window_size": 3}, DtypeError, "window_size: expected a pair of ints"),
    ("func", {"window_size": (3, None)}, DtypeError, "window_size: expected a pair of ints"),
    ("func", {"softcap": float("nan")}, RangeError, "softcap: expected a positive number"),
    ("func", {"softmax_scale": "1"}, DtypeError, "^softmax_scale: expected a number"),
    ("func", {"softcap": "1"}, DtypeError, "softcap: expected a number"),
    ("func", {"dropout_p": 0.1, "softcap": 2.0}, UnsupportedError, "softcap: expected 0 with dropout_p=0.1"),
    ("func", {"dropout_p": 0.1, "return_attn_probs": True}, UnsupportedError, "return_attn_probs: .* S_dmask"),
    ("kvpacked_func", {"q": X, "kv": X[:, :, None]}, ShapeError, r"kv: expected \[b, n, stacked=2, hk, d\]"),
    ("varlen_func", {"max_seqlen_q": 4}, RangeError, "max_seqlen_q: expected at least 5, got 4"),
    ("varlen_func", {"k": [1]}, DtypeError, "^k: expected a torch.Tensor, got list"),
    ("varlen_func", {"k": PACKED}, ShapeError, r"^k: expected \[rows, n, hk, d=8\], got \[8, 4, 8\]"),
    ("varlen_func", {"cu_seqlens_k": CU * 4}, RangeError, r"^cu_seqlens_k: expected values in \[0, 8\], got 12"),
    ("varlen_func", {"dropout_p": 0.1}, UnsupportedError, "block_table: expected dropout_p=0"),
    ("func", {"window_size": torch.tensor([1.5, 2.0])}, DtypeError, "window_size: expected a pair of ints"),
    ("with_kvcache", {"cache_seqlens": None}, DtypeError, "cache_seqlens: .* with k and v, got None"),
    ("with_kvcache", {"cache_seqlens": 6}, RangeError, r"cache_seqlens: expected values in \[0, 5\], got 6"),
    ("with_kvcache", {"cache_seqlens": CU}, ShapeError, r"cache_seqlens: expected shape \[2\]"),
    ("with_kvcache", {"v": None}, DtypeError, "v: expected a torch.Tensor, got NoneType"),
    ("with_kvcache", {"k": X.float()}, DtypeError, "k: expected float64, got float32"),
    ("with_kvcache", {"k_cache": X[:1], "v_cache": X[:1]}, ShapeError, "k_cache: expected at least b=2 rows"),
    ("with_kvcache", {"k_cache": X.mT.contiguous().mT, "v_cache": X}, ShapeError, "k_cache: .* stride of 1"),
    ("with_kvcache", {"cache_batch_idx": torch.tensor([0, 2])}, RangeError, r"idx: expected values in \[0, 1\]"),
    ("with_kvcache", {"cache_batch_idx": CU[:2], **TABLE}, UnsupportedError, "cache_batch_idx: expected None"),
    ("with_kvcache", {"block_table": CU[:2, None]}, RangeError, r"block_table: .* got 3 at \[1, 0\]"),
    ("with_kvcache", {"rotary_cos": ANGLES[:8], "rotary_sin": ANGLES[:8]}, RangeError, r"\[0, 4\].* has 8 rows"),
    ("with_kvcache", {"rotary_cos": WIDE, "rotary_sin": WIDE}, ShapeError, "rotary_cos: .* r at most d=8"),
    ("with_kvcache", {"rotary_cos": ANGLES}, DtypeError, "rotary_sin: expected a torch.Tensor"),
    ("with_kvcache", {"rotary_cos": ANGLES, "k": None, "v": None}, UnsupportedError, "rotary_cos: expected k"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "error", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_wrong_argument_is_named_and_nothing_written(name: str, changes: Any, error: type, message: str) -> None:
    given = {"func": {"q": X, "k": X, "v": X}, "varlen_func": PAGES, "with_kvcache": CACHE}.get(name, {})
    with pytest.raises(error, match=message):
        getattr(flash_attn, f"flash_attn_{name}")(**given | changes)
    assert torch.equal(CACHE["k_cache"], normal(B, 9, H, D))


@pytest.mark.parametrize(("name", "given", "learned"), [
    ("varlen_func", PAGES, "q"), ("varlen_func", PAGES, "k"), ("varlen_func", PAGES, "v"),
    ("with_kvcache", CACHE, "q"), ("with_kvcache", CACHE, "k"), ("with_kvcache", CACHE, "v"),
])  # fmt: skip
def test_backward_through_a_cache_raises_and_not_before(name: str, given: dict[str, Any], learned: str) -> None:
    given = {name: t.clone() if isinstance(t, Tensor) else t for name, t in given.items()}
    call = getattr(flash_attn, f"flash_attn_{name}")
    expected, leaf = call(**given), given[learned].clone().requires_grad_()
    out = call(**given | {learned: leaf})
    assert torch.equal(out, expected) and not any(t.requires_grad for t in given.values() if isinstance(t, Tensor))
    with pytest.raises(UnsupportedError, match=r"no gradients"):
        out.sum().backward()


def test_bert_padding_wrong_shape_is_named() -> None:
    with pytest.raises(ShapeError, match=r"attention_mask: expected \[b, s\] = \[2, 4\]"):
        bert_padding.unpad_input(X, torch.ones(2, 3))
    with pytest.raises(ShapeError, match=r"indices: expected \[8\], a row for each of the values"):
        bert_padding.pad_input(PACKED, CU, 2, 4)
