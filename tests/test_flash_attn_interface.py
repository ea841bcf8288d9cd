"""pyattn.compat.flash_attn_interface, FlashAttention-3's module, held against plain torch and flash_attn's face."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from test_flash_attn import ANGLES, HK, OPTIONS, B, D, H, assert_agree, normal, one_by_one, plain, qkv, starts
from torch import Tensor

from pyattn.check import DtypeError, PyattnError, RangeError, ShapeError, UnsupportedError
from pyattn.compat import flash_attn
from pyattn.compat import flash_attn_interface as interface

OPTIONS = {name: options for name, options in OPTIONS.items() if "alibi_slopes" not in options}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_dense_agrees_with_plain_torch(options: dict[str, Any]) -> None:
    tensors = qkv(5, 7)
    assert_agree(
        lambda *t: interface.flash_attn_func(*t, return_attn_probs=True, **options),
        lambda *t: plain(*t, **options),
        *tensors,
    )
    assert torch.equal(
        interface.flash_attn_func(*tensors, **options, num_splits=3, pack_gqa=True, deterministic=True, sm_margin=1),
        interface.flash_attn_func(*tensors, **options, return_attn_probs=True)[0],
    )


def test_packed_together_agrees_with_plain_torch() -> None:
    assert_agree(
        lambda qkv: interface.flash_attn_qkvpacked_func(qkv, causal=True, return_attn_probs=True),
        lambda qkv: plain(*qkv.unbind(2), causal=True),
        normal(B, 7, 3, H, D),
    )
    assert_agree(
        lambda qkv: interface.flash_attn_qkvpacked_func(qkv, 0.3, num_heads_q=H, return_attn_probs=True),
        lambda qkv: plain(*qkv.split((H, HK, HK), 2), 0.3),
        normal(B, 7, H + 2 * HK, D),
    )


# Of each sequence: queries and keys that there are, and rows of room behind them.
ROOMS = {
    "mixed": ((5, 7, 0, 2), (4, 2, 3, 0), (0, 3, 2, 4)),
    "empty": ((0, 3, 0, 0), (6, 0, 1, 5)),
    "nothing": ((0, 0, 3, 4),),
    "none": (),
}


@pytest.mark.parametrize("sides", ["both", "queries", "keys", "neither"])
@pytest.mark.parametrize("rooms", ROOMS.values(), ids=ROOMS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_varlen_agrees_with_plain_torch_and_leaves_the_room_alone(options: Any, rooms: Any, sides: str) -> None:
    rooms = [(m, n, q if sides in ("both", "queries") else 0, k if sides in ("both", "keys") else 0)
             for m, n, q, k in rooms]  # fmt: skip
    wholes = [(m + q, n + k) for m, n, q, k in rooms]
    of_q, of_k = (torch.cat([torch.arange(whole[i]) < own[i] for whole, own in zip(wholes, rooms, strict=True)])
                  if rooms else torch.zeros(0, dtype=torch.bool) for i in (0, 1))  # fmt: skip
    q, k, v = (normal(len(own), h, D, seed=h) for own, h in ((of_q, H), (of_k, HK), (of_k, HK)))
    cu_q, cu_k = (starts([whole[i] for whole in wholes]) for i in (0, 1))
    used = {
        name: torch.tensor([own[i] for own in rooms], dtype=torch.int32)
        for i, name in enumerate(("seqused_q", "seqused_k"))
        if sides in ("both", ("queries", "keys")[i])
    }
    pairs = [own[:2] for own in rooms]

    def expected(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        own = (q[of_q], k[of_k], v[of_k])
        out, lse = one_by_one(*own, pairs, **options) if rooms else (own[0], own[0].sum(-1).T)
        return (
            torch.zeros_like(q).index_put((of_q,), out),
            lse.new_full((H, len(q)), -torch.inf).T.index_put((of_q,), lse.T).T,
        )

    def actual(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (t.masked_fill(~own[:, None, None], torch.nan) for t, own in ((q, of_q), (k, of_k), (v, of_k)))
        return interface.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 9, 9, return_attn_probs=True, **used, **options)

    assert_agree(actual, expected, q, k, v)


ROOM = 12
LENGTHS, QUERIES, NEW = (5, 0, 3), (2, 4, 1), (3, 1, 0)  # of each batch element


def padded(t: Tensor, lengths: Any) -> Tensor:
    """Packed rows as a batch, NaN behind them."""
    rows = t.new_full((len(lengths), max(lengths), *t.shape[1:]), torch.nan)
    for row, own in zip(rows, t.split(lengths), strict=True):
        row[: len(own)] = own
    return rows


@pytest.mark.parametrize("kind", ["dense", "batch-idx", "paged", "paged-batch-idx"])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize(("new", "rotary"), [(False, None), (True, None), (True, "seqlens"), (True, "others")], ids=str)
def test_kvcache_gives_each_batch_element_what_flash_attn_gives_it_alone(
    kind: str, packed: bool, new: bool, rotary: str | None
) -> None:
    b = len(LENGTHS)
    queries, added = (QUERIES, NEW) if packed else ((4,) * b, (2,) * b)
    for options, leftpad in itertools.product(OPTIONS.values(), (None, (4, 0, 3))):
        q, k_new, v_new = (normal(sum(rows), h, D, seed=h) for rows, h in ((queries, H), (added, HK), (added, HK)))
        rows = torch.tensor([4, 1, 2]) if "batch-idx" in kind else torch.arange(b)
        caches = [normal(5, ROOM, HK, D, seed=seed) for seed in (5, 6)]
        given: dict[str, Any] = {"cache_seqlens": torch.tensor(LENGTHS, dtype=torch.int32)}
        if "batch-idx" in kind:
            given["cache_batch_idx"] = rows.int()
        stored = [cache.clone() for cache in caches]
        if kind.startswith("paged"):
            table = torch.randperm(5 * 3, generator=torch.Generator().manual_seed(0)).view(5, 3)
            stored = [cache.unflatten(1, (3, 4)).flatten(0, 1)[table.flatten().argsort()] for cache in caches]
            given["page_table"] = (table if "batch-idx" in kind else table[:b]).int()
        extra: dict[str, Any] = {}
        if rotary:
            extra = {"rotary_cos": ANGLES.cos(), "rotary_sin": ANGLES.sin(), "rotary_interleaved": False}
        first = torch.tensor((7, 2, 0) if rotary == "others" else LENGTHS)
        if rotary == "others":
            given["rotary_seqlens"] = first.int()
        if leftpad:
            given["cache_leftpad"] = torch.tensor(leftpad)
        if packed:
            given |= {"q": q, "cu_seqlens_q": starts(queries), "max_seqlen_q": max(queries) + 1}
            given |= {"k": k_new, "v": v_new, "cu_seqlens_k_new": starts(added)} if new else {}
        else:
            given |= {"q": padded(q, queries)}
            given |= {"k": padded(k_new, added), "v": padded(v_new, added)} if new else {}
        out, lse, *parts = interface.flash_attn_with_kvcache(
            k_cache=stored[0], v_cache=stored[1], **given, **extra, **options, return_softmax_lse=True
        )
        assert [part.numel() for part in parts] == [0, 0]
        if not packed:
            out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
        if kind.startswith("paged"):
            stored = [t[table].flatten(1, 2) for t in stored]
        outs, lses = out.split(queries), lse.split(queries, 1)
        for t, row in enumerate(rows.tolist()):
            own = [cache[row : row + 1].clone() for cache in caches]
            alone = {"k": k_new.split(added)[t][None], "v": v_new.split(added)[t][None]} if new else {}
            own_q = q.split(queries)[t][None]
            if rotary:  # turned here, because flash_attn turns by the cache's length alone
                local = options.get("causal") or max(options.get("window_size", (-1, -1))) >= 0
                own_q = turned(own_q, first[t] + torch.arange(queries[t]) * (1 if local else 0))
                alone["k"] = turned(alone["k"], first[t] + torch.arange(added[t]))
            pad = None if leftpad is None else torch.tensor(leftpad[t : t + 1])
            want, want_lse = flash_attn.flash_attn_with_kvcache(
                own_q, *own, **alone, cache_seqlens=LENGTHS[t], cache_leftpad=pad, **options, return_softmax_lse=True
            )
            torch.testing.assert_close((outs[t], lses[t]), (want[0], want_lse[0]))
            torch.testing.assert_close([cache[row] for cache in stored], [cache[0] for cache in own])


def turned(t: Tensor, positions: Tensor) -> Tensor:
    """t [1, s, h, d] with its halves turned by the angles at positions [s]."""
    x, y = t.chunk(2, -1)
    z = torch.complex(x.contiguous(), y.contiguous()) * torch.exp(1j * ANGLES[positions])[:, None]
    return torch.cat([z.real, z.imag], -1)


def test_combine_gives_attention_over_all_keys() -> None:
    q, k, v = qkv(5, 9)
    parts = [interface.flash_attn_func(q, k[:, own], v[:, own], return_attn_probs=True)
             for own in (slice(0, 4), slice(4, 4), slice(4, 9))]  # fmt: skip
    outs = torch.stack([out for out, _ in parts])
    lses = torch.stack([lse.transpose(1, 2) for _, lse in parts])  # [parts, b, s, h]
    outs[1] = torch.nan  # which nobody reads
    expected, lse = interface.flash_attn_func(q, k, v, return_attn_probs=True)
    found, found_lse = interface.flash_attn_combine(outs, lses)
    torch.testing.assert_close((found, found_lse), (expected, lse.transpose(1, 2)))
    out = torch.empty_like(expected)
    assert interface.flash_attn_combine(outs, lses, out)[0] is out and torch.equal(out, found)
    assert interface.flash_attn_combine(outs, lses, out_dtype=torch.bfloat16)[0].dtype is torch.bfloat16
    nothing = torch.full_like(lses, -torch.inf)
    assert (interface.flash_attn_combine(outs, nothing)[0] == 0).all()
    with pytest.raises(ShapeError, match=r"lse_partial: expected \[3, 2, 5, 4\], .* got \[3, 2, 4, 5\]"):
        interface.flash_attn_combine(outs, lses.mT)


def dense(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    return interface.flash_attn_func(q, k, v, causal=True)


def varlen(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    packed = (t.flatten(0, 1) for t in (q, k, v))
    places = (torch.arange(B + 1) * q.shape[1], torch.arange(B + 1) * k.shape[1], size, size)
    return interface.flash_attn_varlen_func(*packed, *places, seqused_k=torch.arange(B) + k.shape[1] - 4)


def cached(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    with torch.no_grad():
        k_cache, v_cache, lengths = k.clone(), v.clone(), torch.arange(B) + k.shape[1] - 4
        at = {"cu_seqlens_q": torch.arange(B + 1) * q.shape[1], "cu_seqlens_k_new": torch.arange(B + 1) * 3}
        new = (t[:, :3].flatten(0, 1) for t in (k, v))
        out = interface.flash_attn_with_kvcache(
            q.flatten(0, 1), k_cache, v_cache, *new, cache_seqlens=lengths, max_seqlen_q=size, **at
        )
    return (out * q.flatten(0, 1) + k_cache.sum() + v_cache.sum()) * k.sum() * v.sum()


@pytest.mark.parametrize("function", [dense, varlen, cached])
def test_compile_gives_the_eager_result_for_every_length(function: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for s, n in ((5, 7), (11, 13), (8, 9)):
        tensors, found = [t.requires_grad_() for t in qkv(s, n)], []
        with torch._dynamo.config.patch(error_on_recompile=s > 5):
            for run in (function, compiled):
                out = run(*tensors, s)
                found.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
        torch.testing.assert_close(*found)


USER_CODE = """
import flash_attn_interface, flash_attn_3.flash_attn_interface as inside
from flash_attn_interface import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn_3.flash_attn_interface import get_scheduler_metadata
assert inside.flash_attn_func is flash_attn_func
metadata = get_scheduler_metadata(1, 3, 3, 2, 2, 4, cache_seqlens=seqlens)
out = flash_attn_with_kvcache(q, q, q, cache_seqlens=seqlens, scheduler_metadata=metadata)
"""


def test_install_lets_user_code_import_it() -> None:
    interface.install()
    try:
        interface.install()
        names = {"q": normal(1, 3, 2, 4), "seqlens": torch.tensor([3], dtype=torch.int32)}
        exec(USER_CODE, names)
        assert torch.equal(names["out"], interface.flash_attn_func(names["q"], names["q"], names["q"]))
        assert importlib.util.find_spec("flash_attn_interface") and importlib.util.find_spec("flash_attn_3")
    finally:
        interface.uninstall()
    assert importlib.util.find_spec("flash_attn_interface") is None


def test_install_refuses_where_another_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleType("flash_attn_3")
    monkeypatch.setitem(sys.modules, "flash_attn_3", other)
    with pytest.raises(UnsupportedError, match="install: expected no flash_attn_3 imported yet"):
        interface.install()
    interface.uninstall()
    assert sys.modules["flash_attn_3"] is other and "flash_attn_interface" not in sys.modules


SCALE, DESCALES = "softmax_scale=None causal=False", "q_descale=None k_descale=None v_descale=None"
SCORES = f"{DESCALES} window_size=(-1, -1) attention_chunk=0 softcap=0.0"
HOW = "num_splits=1 pack_gqa=None deterministic=False sm_margin=0 return_attn_probs=False"
SIGNATURES = {
    "flash_attn_func": f"q k v {SCALE} qv=None {SCORES} {HOW}",
    "flash_attn_qkvpacked_func": f"qkv {SCALE} {SCORES} deterministic=False num_heads_q=None sm_margin=0 "
    "return_attn_probs=False",
    "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q=None seqused_k=None "
    f"{SCALE} qv=None {SCORES} {HOW}",
    "flash_attn_combine": "out_partial lse_partial out=None out_dtype=None",
    "flash_attn_with_kvcache": "q k_cache v_cache k=None v=None qv=None rotary_cos=None rotary_sin=None "
    "cache_seqlens=None cache_batch_idx=None cache_leftpad=None page_table=None cu_seqlens_q=None "
    f"cu_seqlens_k_new=None max_seqlen_q=None rotary_seqlens=None {DESCALES} {SCALE} window_size=(-1, -1) "
    "attention_chunk=0 softcap=0.0 rotary_interleaved=True scheduler_metadata=None num_splits=0 pack_gqa=None "
    "sm_margin=0 return_softmax_lse=False",
    "get_scheduler_metadata": "batch_size max_seqlen_q max_seqlen_k num_heads_q num_heads_kv headdim cache_seqlens "
    "qkv_dtype=torch.bfloat16 headdim_v=None cu_seqlens_q=None cu_seqlens_k_new=None cache_leftpad=None page_size=None "
    "max_seqlen_k_new=0 causal=False window_size=(-1, -1) attention_chunk=0 has_softcap=False num_splits=0 "
    "pack_gqa=None sm_margin=0",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_that_of_the_original(name: str) -> None:
    parameters = inspect.signature(getattr(interface, name)).parameters.values()
    given = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
    assert " ".join(given) == SIGNATURES[name]


X, PACKED, CU = normal(B, 4, H, D), normal(8, H, D), torch.tensor([0, 3, 8])
DENSE = {"q": X, "k": X, "v": X}
VARLEN = {"q": PACKED, "k": PACKED, "v": PACKED, "cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": 5,
          "max_seqlen_k": 5}  # fmt: skip
CACHE = {"q": X, "k_cache": normal(B, 9, H, D), "v_cache": normal(B, 9, H, D), "k": X, "v": X, "cache_seqlens": 5}
TABLE = torch.tensor([[0], [1]])
WRONG: list[tuple[str, dict[str, Any], type[PyattnError], str]] = [
    *((name, {"qv": X}, UnsupportedError, "^qv: expected None")
      for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")),
    *((name, {"attention_chunk": 4}, UnsupportedError, "^attention_chunk: expected 0, got 4")
      for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")),
    *(("flash_attn_func", {name: torch.ones(1)}, UnsupportedError, f"^{name}: .* 8-bit numbers")
      for name in ("q_descale", "k_descale", "v_descale")),
    ("flash_attn_func", {name: X.to(torch.float8_e4m3fn) for name in "qkv"}, DtypeError, "^q: .* got torch.float8"),
    ("flash_attn_func", {"q": PACKED}, ShapeError, r"^q: expected \[b, s, h, d\]"),
    ("flash_attn_varlen_func", {"cu_seqlens_q": None}, DtypeError, "^cu_seqlens_q: expected a torch.Tensor"),
    ("flash_attn_varlen_func", {"q": [1], "seqused_q": CU}, DtypeError, "^q: expected a torch.Tensor, got list"),
    ("flash_attn_varlen_func", {"seqused_q": CU}, ShapeError, r"^seqused_q: expected shape \[2\]"),
    ("flash_attn_varlen_func", {"seqused_q": CU[[0, 2]]}, RangeError, "^seqused_q: .* at most 5 at position 1.* got 8"),
    ("flash_attn_varlen_func", {"seqused_k": -CU[:2]}, RangeError, "^seqused_k: .* got -3"),
    ("flash_attn_with_kvcache", {"page_table": TABLE[:1]}, ShapeError, "^page_table: "),
    ("flash_attn_with_kvcache", {"page_table": TABLE, "cache_batch_idx": CU[:2]}, RangeError, r"\[0, 1\], got 3"),
    ("flash_attn_with_kvcache", {"cache_seqlens": 6}, RangeError, r"^cache_seqlens: expected values in \[0, 5\]"),
    ("flash_attn_with_kvcache", {"cu_seqlens_q": CU}, ShapeError, r"^q: expected \[total_q, h, d\]"),
    ("flash_attn_with_kvcache", {"q": PACKED, "cu_seqlens_q": CU}, DtypeError, "^max_seqlen_q: expected an int"),
    ("flash_attn_with_kvcache", {"q": PACKED, "cu_seqlens_q": CU, "max_seqlen_q": 4}, RangeError,
     "^max_seqlen_q: expected at least 5, got 4"),
    ("flash_attn_with_kvcache", {"q": PACKED, "cu_seqlens_q": CU[1:], "max_seqlen_q": 5}, RangeError,
     "^cu_seqlens_q: expected 0 at position 0"),
    ("flash_attn_with_kvcache", {"k": PACKED, "v": PACKED, "cu_seqlens_k_new": CU[:2]}, ShapeError,
     r"^cu_seqlens_k_new: expected \[sequences\+1=3\]"),
    ("flash_attn_with_kvcache", {"k": PACKED, "v": PACKED, "cu_seqlens_k_new": CU - 1}, RangeError,
     "^cu_seqlens_k_new: expected 0"),
    ("flash_attn_with_kvcache", {"rotary_cos": ANGLES[:8], "rotary_sin": ANGLES[:8], "rotary_seqlens": CU[1:]},
     RangeError, r"^rotary_seqlens: expected values in \[0, 7\], got 8"),
    ("flash_attn_qkvpacked_func", {"qkv": normal(B, 4, 8, D)}, DtypeError, "^num_heads_q: expected an int"),
    ("flash_attn_qkvpacked_func", {"qkv": normal(B, 4, 8, D), "num_heads_q": 3}, ShapeError, "^qkv: .*num_heads_q=3"),
    ("flash_attn_qkvpacked_func", {"qkv": normal(B, 4, 2, H, D)}, ShapeError, "^qkv: expected .*stacked=3"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"), WRONG, ids=[f"{name} {message}" for name, _, _, message in WRONG]
)
def test_wrong_argument_is_named_and_nothing_written(name: str, changes: Any, error: type, message: str) -> None:
    given = {"flash_attn_func": DENSE, "flash_attn_varlen_func": VARLEN, "flash_attn_with_kvcache": CACHE}.get(name, {})
    with pytest.raises(error, match=message):
        getattr(interface, name)(**given | changes)
    assert torch.equal(CACHE["k_cache"], normal(B, 9, H, D))


def test_backward_through_a_cache_raises_and_not_before() -> None:
    given = {name: t.clone() if isinstance(t, Tensor) else t for name, t in CACHE.items()}
    for learned in ("q", "k", "v"):
        leaf = given[learned].clone().requires_grad_()
        out = interface.flash_attn_with_kvcache(**given | {learned: leaf})
        assert not given["k_cache"].requires_grad
        with pytest.raises(UnsupportedError, match=r"flash_attn_with_kvcache: .* no gradients"):
            out.sum().backward()
