"""Attention over a key/value cache, dense and paged: the definition against calls without one, backends against it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pyattn
from pyattn import core, registry, testing
from pyattn.backends.cpu import CpuBackend, isas
from pyattn.backends.reference import cast, definition
from pyattn.rounding import expected_errors
from pyattn.spec import AttentionSpec, Inputs, Numbers, dtype_name

H, HK, D, DV = 6, 2, 40, 24
LENGTHS = (200, 0, 131)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (50, None), "causal": True},
    "window-both-ways": {"window": (3, 1)},
    "alibi-softcap-sinks": {"alibi_slopes": torch.linspace(0.5, 0.1, H), "softcap": 2.0, "sinks": torch.ones(H)},
}
PAGE_SIZES = (1, 7, 16, 64, 128)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
RUNNERS = {("cpu", isa): CpuBackend(isa) for isa in isas()} | {
    (device, name): backend
    for name, backend in registry.BACKENDS.items()
    for device in DEVICES
    if name != "cpu" and backend.unavailable() is None and device in backend.devices
}


def cache(m: int, page_size: int | None, dtype: torch.dtype = torch.float64, room: int = 256) -> dict[str, Any]:
    """Queries, and a cache with NaN behind every length, in pages that lie in any order."""
    generator = torch.Generator().manual_seed(m)
    b = len(LENGTHS)
    q, k, v = (
        torch.randn(b, heads, rows, size, generator=generator, dtype=torch.float64).to(dtype)
        for heads, rows, size in ((H, m, D), (HK, room, D), (HK, room, DV))
    )
    for t, length in zip((*k, *v), 2 * LENGTHS, strict=True):
        t[:, length:] = torch.nan
    lengths = torch.tensor(LENGTHS)
    if page_size is None:
        return {"q": q, "k": k, "v": v, "key_lengths": lengths}
    each = -(-room // page_size)
    table = torch.randperm(b * each, generator=generator).view(b, each)
    pages = {name: torch.full((b * each, HK, page_size, t.shape[3]), torch.nan, dtype=dtype) for name, t in
             (("k", k), ("v", v))}  # fmt: skip
    for name, t in (("k", k), ("v", v)):
        padded = torch.nn.functional.pad(t, (0, 0, 0, each * page_size - room), value=torch.nan)
        pages[name][table] = padded.unflatten(2, (each, page_size)).transpose(1, 2)
    used = torch.arange(each) * page_size < lengths[:, None]
    return {"q": q, **pages, "key_lengths": lengths, "block_table": torch.where(used, table, -1)}


def one_by_one(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """A call of `attention` for every batch element, over the keys that it has."""
    options |= {"return_lse": True, "backend": "reference"}
    found = [
        pyattn.attention(q[[b]], k[[b], :, :length], v[[b], :, :length], **options) for b, length in enumerate(LENGTHS)
    ]
    return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])


@pytest.mark.parametrize("page_size", [None, *PAGE_SIZES])
@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_cache_gives_what_each_element_gives_alone(options: dict[str, Any], m: int, page_size: int | None) -> None:
    dense = cache(m, None)
    expected = one_by_one(dense["q"], dense["k"], dense["v"], **options)
    found = pyattn.attention_kvcache(**cache(m, page_size), return_lse=True, backend="reference", **options)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)


def held_against_definition(runner: Any, x: Inputs, numbers: Numbers) -> list[testing.Result]:
    spec = AttentionSpec.of(x, numbers)
    exact, plain = (definition(spec, cast(x, dtype)) for dtype in (torch.float64, x.q.dtype))
    d_out, d_lse = torch.zeros_like(exact[0]), torch.zeros_like(exact[1])
    expected = expected_errors(spec, cast(x, torch.float64), d_out, d_lse)
    eps = torch.finfo(spec.accumulator).eps
    found = runner.forward(spec, x)[:2]
    return [
        testing.compare(name, got, want, baseline, eps * expected[name])
        for name, got, want, baseline in zip(("out", "lse"), found, exact, plain, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("page_size", [None, *PAGE_SIZES])
@pytest.mark.parametrize("m", [0, 1, 5, 70])
@pytest.mark.parametrize("runner", RUNNERS, ids="-".join)
def test_cache_backend_agrees_with_definition(runner: Any, m: int, page_size: int | None, dtype: torch.dtype) -> None:
    given = {name: t.to(runner[0]) for name, t in cache(m, page_size, dtype).items()}
    for name, options in OPTIONS.items():
        options = {key: v.to(runner[0]) if isinstance(v, Tensor) else v for key, v in options.items()}
        results = held_against_definition(RUNNERS[runner], *core.prepare(**given, **options, cached=True))
        assert [r for r in results if not r.excess <= 1] == [], name


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no lengths": ({"key_lengths": None}, pyattn.DtypeError, "key_lengths: expected a torch.Tensor"),
    "lengths beyond the cache": (
        {"key_lengths": torch.tensor([1, 2, 300])},
        pyattn.RangeError,
        r"\[0, n=256\], got 300",
    ),
    "table of floats": ({"block_table": torch.ones(3, 16)}, pyattn.DtypeError, "block_table: expected int8"),
    "table of another batch": (
        {"block_table": torch.zeros(2, 16, dtype=torch.int64)},
        pyattn.ShapeError,
        r"block_table: expected \[b=3, pages of one batch element\], got \[2, 16\]",
    ),
    "page that there is not": (
        {"block_table": torch.full((3, 16), 48)},
        pyattn.RangeError,
        r"block_table: expected pages in \[0, 48\) up to key_lengths, got 48 at \[0, 0\]: key_lengths\[0\] is 200",
    ),
    "pages of v are others": (
        {"v": torch.ones(3, HK, 16, DV)},
        pyattn.ShapeError,
        r"v: expected \[pages=48, hk=2, n=16",
    ),
    "pages of no keys": (
        {"k": torch.ones(48, HK, 0, D), "v": torch.ones(48, HK, 0, DV)},
        pyattn.ShapeError,
        "k: expected pages of at least 1 key",
    ),
    "gradient": ({"q": torch.ones(3, H, 1, D, requires_grad=True)}, pyattn.UnsupportedError, "torch.no_grad"),
}


@pytest.mark.parametrize(("changes", "error", "message"), WRONG.values(), ids=WRONG)
def test_cache_wrong_argument_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pyattn.attention_kvcache(**cache(1, 16, torch.float32) | changes)


def test_cache_under_no_grad_takes_parameters() -> None:
    given = cache(1, 16, torch.float32)
    with torch.no_grad():
        out = pyattn.attention_kvcache(**given | {"q": torch.nn.Parameter(given["q"])})
    torch.testing.assert_close(out, pyattn.attention_kvcache(**given))


def test_cache_of_pages_that_are_shared() -> None:
    given = cache(1, 16, torch.float32)
    both = {
        "q": given["q"][[0, 0]],
        "key_lengths": torch.tensor([200, 100]),
        "block_table": given["block_table"][[0, 0]],
    }
    out = pyattn.attention_kvcache(**given | both)
    expected = pyattn.attention_kvcache(**given | both, backend="reference")
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("page_size", [None, 16])
def test_cache_compiles_as_one_graph_for_every_room(page_size: int | None) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def step(**given: Tensor) -> Tensor:
        return pyattn.attention_kvcache(**given, causal=True)

    step(**cache(5, page_size, torch.float32))
    with torch._dynamo.config.patch(error_on_recompile=True):
        given = cache(7, page_size, torch.float32, room=512)
        torch.testing.assert_close(step(**given), pyattn.attention_kvcache(**given, causal=True))


def test_cache_is_explained() -> None:
    assert "-> cpu" in pyattn.explain(**cache(1, 16, torch.float32), cached=True)
