"""xformers' memory_efficient_attention, held against plain torch with the mask that each class of bias means."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

import pyattn
from pyattn.compat import xformers as xops

Q, K, LONGER = (5, 1, 7), (5, 9, 4), (5, 9, 8)  # rows of each block
H, D, DV = 4, 8, 6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor | float = 0.0, scale: float | None = None):
    """[b, length, h, size]; a query that sees nothing gets 0."""
    s = torch.einsum("bmhd,bnhd->bhmn", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    s = s.masked_fill(~seen, -torch.inf)
    p = torch.where(seen.any(-1, keepdim=True), s.softmax(-1), 0.0)
    return torch.einsum("bhmn,bnhd->bmhd", torch.where(seen, p, 0.0), v)


def band(m: int, n: int, left: int | None, right: int | None, top_left: bool = False) -> Tensor:
    i, j = torch.arange(m)[:, None] + (0 if top_left else n - m), torch.arange(n)
    seen = torch.ones(m, n, dtype=torch.bool)
    if left is not None:
        seen &= j >= i - left
    return seen if right is None else seen & (j <= i + right)


def blocks(q: tuple[int, ...], k: tuple[int, ...], *sides: Any, room: int | None = None) -> Tensor:
    starts_q, starts_k = [0, *accumulate(q)], [0, *accumulate(k if room is None else [room] * len(k))]
    seen = torch.zeros(starts_q[-1], starts_k[-1], dtype=torch.bool)
    for b, (m, n) in enumerate(zip(q, k, strict=True)):
        seen[starts_q[b] : starts_q[b] + m, starts_k[b] : starts_k[b] + n] = band(m, n, *sides)
    return seen


def assert_same(bias: Any, seen: Tensor, b: int = 1, **options: Any) -> None:
    """Output and gradients, for a bias that means `seen` [m, n]."""
    m, n = seen.shape
    tensors = normal(b, m, H, D), normal(b, n, H, D, seed=1), normal(b, n, H, DV, seed=2)
    found, expected = xops.memory_efficient_attention(*tensors, bias, **options), plain(*tensors, seen, **options)
    torch.testing.assert_close(found, expected)
    weight = normal(*expected.shape, seed=3)
    grads = (torch.autograd.grad((out * weight).sum(), tensors) for out in (found, expected))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


DENSE: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "none": (None, (None, None)),
    "lower triangular": (xops.LowerTriangularMask(), (None, 0, True)),
    "from bottom right": (xops.LowerTriangularFromBottomRightMask(), (None, 0)),
    "from bottom right, local": (xops.LowerTriangularFromBottomRightMask().make_local_attention(3), (2, 0)),
    "local": (xops.LocalAttentionFromBottomRightMask(2, 1), (2, 1)),
}


@pytest.mark.parametrize(("m", "n"), [(6, 6), (4, 9), (9, 4)])
@pytest.mark.parametrize(("bias", "sides"), DENSE.values(), ids=DENSE)
def test_bias_of_a_batch(bias: Any, sides: tuple[Any, ...], m: int, n: int) -> None:
    assert_same(bias, band(m, n, *sides), b=2, scale=0.3)


PACKED: dict[str, tuple[Callable[[Any], Any], tuple[Any, ...]]] = {
    "block": (lambda made: made, (None, None)),
    "causal": (lambda made: made.make_causal(), (None, 0, True)),
    "from bottom right": (lambda made: made.make_causal_from_bottomright(), (None, 0)),
    "local": (lambda made: made.make_local_attention(3), (2, 0, True)),
    "local from bottom right": (lambda made: made.make_local_attention_from_bottomright(3), (2, 0)),
}


@pytest.mark.parametrize("k", [Q, K, (9, 1, 8)], ids=str)
@pytest.mark.parametrize(("make", "sides"), PACKED.values(), ids=PACKED)
def test_bias_of_blocks(make: Callable[[Any], Any], sides: tuple[Any, ...], k: tuple[int, ...]) -> None:
    assert_same(make(xops.BlockDiagonalMask.from_seqlens(Q, k)), blocks(Q, k, *sides))


@pytest.mark.parametrize("k", [K, (0, 3, 9)], ids=str)
@pytest.mark.parametrize(
    ("bias", "sides"),
    [
        (lambda k: xops.BlockDiagonalPaddedKeysMask.from_seqlens(Q, 9, k), (None, None)),
        (lambda k: xops.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(Q, 9, k), (None, 0)),
        (lambda k: xops.BlockDiagonalPaddedKeysMask.from_seqlens(Q, 9, k).make_local_attention(2, 1), (2, 1)),
        (lambda k: xops.BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local(Q, 9, k, 3), (2, 0)),
    ],
    ids=["block", "causal", "local", "causal local"],
)
def test_bias_of_blocks_with_padded_keys(bias: Callable[[Any], Any], sides: tuple[Any, ...], k: Any) -> None:
    assert_same(bias(k), blocks(Q, k, *sides, room=9))


@pytest.mark.parametrize("triangular", [False, True])
def test_bias_that_is_a_tensor_is_added_and_has_a_gradient(triangular: bool) -> None:
    tensors = normal(2, 5, H, D), normal(2, 7, H, D, seed=1), normal(2, 7, H, DV, seed=2)
    bias = normal(2, H, 5, 7, seed=3)
    found = xops.memory_efficient_attention(*tensors, xops.LowerTriangularMask().add_bias(bias) if triangular else bias)
    expected = plain(*tensors, band(5, 7, None, 0, True) if triangular else band(5, 7, None, None), bias)
    torch.testing.assert_close(found, expected)
    grads = (torch.autograd.grad(out.square().sum(), bias)[0] for out in (found, expected))
    torch.testing.assert_close(*grads)


def test_one_head_has_no_dimension_of_its_own() -> None:
    q, k, v, bias = normal(2, 5, D), normal(2, 7, D, seed=1), normal(2, 7, DV, seed=2), normal(2, 5, 7, seed=3)
    expected = plain(*(t.unsqueeze(2) for t in (q, k, v)), band(5, 7, None, None), bias.unsqueeze(1))
    torch.testing.assert_close(xops.memory_efficient_attention(q, k, v, bias), expected.squeeze(2))


@pytest.mark.parametrize(
    "heads",
    [lambda t: t.expand(-1, -1, -1, 3, -1), lambda t: t, lambda t: t.repeat(1, 1, 1, 3, 1)],
    ids=["expanded", "one", "copied"],
)
@pytest.mark.parametrize("of_values", [None, lambda t: t.repeat(1, 1, 1, 3, 1)], ids=["same", "values-copied"])
def test_groups_of_heads(heads: Callable[[Tensor], Tensor], of_values: Callable[[Tensor], Tensor] | None) -> None:
    q, k, v = normal(2, 5, 2, 3, D), normal(2, 7, 2, 1, D, seed=1), normal(2, 7, 2, 1, DV, seed=2)
    out = xops.memory_efficient_attention(q, heads(k), (of_values or heads)(v), xops.LowerTriangularMask())
    repeated = (t.expand(-1, -1, -1, 3, -1).flatten(2, 3) for t in (k, v))
    expected = plain(q.flatten(2, 3), *repeated, band(5, 7, None, 0, True))
    torch.testing.assert_close(out, expected.view(out.shape))


def test_lists_of_tensors_go_in_and_come_out() -> None:
    tensors = [torch.randn(2, 5, H, D), torch.randn(1, 3, H, D)]
    bias, row = xops.BlockDiagonalMask.from_tensor_list(tensors)
    assert row.shape == (1, 13, H, D)
    parts = bias.split(xops.memory_efficient_attention(row, row, row, bias))
    for part, t in zip(parts, tensors, strict=True):
        torch.testing.assert_close(part, xops.memory_efficient_attention(t, t, t))
    bias, q, k, v = xops.BlockDiagonalMask.from_tensor_lists_qkv(tensors[:1], [tensors[0][:, :4]], [tensors[0][:, :4]])
    (part,) = bias.split_queries(xops.memory_efficient_attention(q, k, v, bias))
    torch.testing.assert_close(part, xops.memory_efficient_attention(tensors[0], tensors[0][:, :4], tensors[0][:, :4]))


def test_dropout_is_always_applied() -> None:
    q, k = torch.zeros(1, 400, 1, 8), torch.zeros(1, 64, 1, 8)
    v = torch.eye(64)[None, :, None]
    kept = xops.memory_efficient_attention(q, k, v, p=0.3) > 0
    assert kept.double().mean().item() == pytest.approx(0.7, abs=0.02)


# Made of the classes of a module: ours, and those of xformers itself.
MASKS: dict[str, Callable[[Any], Any]] = {
    "lower triangular": lambda of: of.LowerTriangularMask(),
    "from bottom right": lambda of: of.LowerTriangularFromBottomRightMask(),
    "from bottom right, local": lambda of: of.LowerTriangularFromBottomRightMask().make_local_attention(3),
    "local": lambda of: of.LocalAttentionFromBottomRightMask(2, 1),
    "with tensor": lambda of: of.LowerTriangularMask().add_bias(normal(1, H, sum(Q), sum(K), seed=4)),
    "blocks": lambda of: of.BlockDiagonalMask.from_seqlens(Q, K),
    "causal blocks": lambda of: of.BlockDiagonalMask.from_seqlens(Q, K).make_causal(),
    "blocks from bottom right": lambda of: of.BlockDiagonalMask.from_seqlens(Q, LONGER).make_causal_from_bottomright(),
    "local blocks": lambda of: of.BlockDiagonalMask.from_seqlens(Q, LONGER).make_local_attention(3),
    "local blocks from bottom right": lambda of: of.BlockDiagonalMask.from_seqlens(
        Q, LONGER
    ).make_local_attention_from_bottomright(3),
    "padded keys": lambda of: of.BlockDiagonalPaddedKeysMask.from_seqlens(Q, 9, K),
    "causal padded keys": lambda of: of.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(Q, 9, K),
    "local padded keys": lambda of: of.BlockDiagonalPaddedKeysMask.from_seqlens(Q, 9, K).make_local_attention(2, 1),
    "causal local padded keys": lambda of: of.BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local(
        Q, 9, K, 3
    ),
}


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
def test_masks_mean_what_xformers_says_they_mean(make: Callable[[Any], Any]) -> None:
    """Its operators run on GPUs alone; its masks write themselves out as tensors anywhere."""
    theirs = make(pytest.importorskip("xformers.ops.fmha.attn_bias", reason="xformers has no wheel for this machine"))
    info = getattr(theirs, "k_seqinfo", None)
    n = sum(K) if info is None else info.seqstart_py[-1]
    tensors = normal(1, sum(Q), H, D), normal(1, n, H, D, seed=1), normal(1, n, H, DV, seed=2)
    added = theirs.materialize((1, H, sum(Q), n), dtype=torch.float64)
    expected = plain(*tensors, added.isfinite(), added.nan_to_num(neginf=0.0))
    grads = torch.autograd.grad(expected.square().sum(), tensors)
    for bias in (theirs, make(xops)):
        found = xops.memory_efficient_attention(*tensors, bias)
        torch.testing.assert_close(found, expected)
        for got, want in zip(torch.autograd.grad(found.square().sum(), tensors), grads, strict=True):
            torch.testing.assert_close(got, want)


def test_bias_moves_to_another_device() -> None:
    for made in (
        xops.BlockDiagonalMask.from_seqlens(Q, K).make_local_attention(3),
        xops.BlockDiagonalPaddedKeysMask.from_seqlens(Q, 9, K).make_local_attention(2, 1),
    ):
        moved = made.to("meta")
        assert type(moved) is type(made)
        assert moved.q_seqinfo.seqstart.is_meta and moved.k_seqinfo.seqstart.is_meta
        assert moved.k_seqinfo.lengths == list(K)


X = torch.ones(1, 13, H, D)
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "op": ((X, X, X), {"op": "cutlass"}, pyattn.UnsupportedError, "op: expected None"),
    "output_dtype": ((X, X, X), {"output_dtype": torch.float64}, pyattn.UnsupportedError, "output_dtype: expected"),
    "rank": ((X, X[0], X), {}, pyattn.ShapeError, r"key: expected \[b, length, k\]"),
    "unknown bias": (
        (X, X, X, type("PagedBlockDiagonalPaddedKeysMask", (), {})()),
        {},
        pyattn.UnsupportedError,
        r"attn_bias: expected a tensor or one of .*, got .*\.PagedBlockDiagonalPaddedKeysMask",
    ),
    "bias of a stranger": (
        (X, X, X, type("BlockDiagonalMask", (), {})()),
        {},
        pyattn.UnsupportedError,
        r"got .*\.BlockDiagonalMask",
    ),
    "boolean tensor": ((X, X, X, torch.ones(1, H, 13, 13) > 0), {}, pyattn.DtypeError, "attn_bias: expected float32"),
    "p": ((X, X, X), {"p": 2.0}, pyattn.RangeError, "^p: expected"),
    "heads": ((X, X[:, :, :3], X[:, :, :3]), {}, pyattn.ShapeError, "^key: expected a number of heads that divides"),
    "blocks of other rows": (
        (X, X, X, xops.BlockDiagonalMask.from_seqlens([5, 6])),
        {},
        pyattn.ShapeError,
        r"query: expected \[1, 11, ...\], the rows of attn_bias's blocks, got \[1, 13",
    ),
}


@pytest.mark.parametrize(("given", "options", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_argument_is_named(given: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        xops.memory_efficient_attention(*given, **options)


def test_wrong_blocks_and_windows_are_named() -> None:
    with pytest.raises(pyattn.ShapeError, match="kv_seqlen: expected 2 blocks"):
        xops.BlockDiagonalMask.from_seqlens([1, 2], [3])
    with pytest.raises(pyattn.RangeError, match="kv_seqlen: expected at most kv_padding=3, got 4"):
        xops.BlockDiagonalPaddedKeysMask.from_seqlens([1], 3, [4])
    with pytest.raises(pyattn.RangeError, match="window_size: expected at least 1, got 0"):
        xops.BlockDiagonalMask.from_seqlens([1]).make_local_attention(0)
    with pytest.raises(pyattn.RangeError, match="window_left: expected at least 0, got -1"):
        xops.LocalAttentionFromBottomRightMask(-1, 0)


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_as_one_graph_for_every_length(packed: bool) -> None:
    def attention(q: Tensor, bias: Any) -> Tensor:
        return xops.memory_efficient_attention(q, q, q, bias)

    def bias_of(m: int) -> Any:
        return xops.BlockDiagonalMask.from_seqlens([3, m - 3]).make_causal() if packed else xops.LowerTriangularMask()

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (5, 9):
        x = torch.randn(1, m, H, D)
        torch.testing.assert_close(compiled(x, bias_of(m)), attention(x, bias_of(m)))


def test_autocast_and_checkpointing() -> None:
    q, k, v = (torch.randn(2, 5, H, D, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert xops.memory_efficient_attention(q, k, v).dtype is torch.bfloat16
    found = torch.utils.checkpoint.checkpoint(xops.memory_efficient_attention, q, k, v, None, 0.3, use_reentrant=False)
    (got,) = torch.autograd.grad(found.sum(), v)
    assert got.isfinite().all()


def test_vmap_and_grad_of_torch_func() -> None:
    q, k, v = (torch.randn(3, 2, 5, H, D) for _ in range(3))
    mask = xops.LowerTriangularMask()
    gradient = torch.func.grad(lambda *x: xops.memory_efficient_attention(*x, mask).square().sum())
    found = torch.func.vmap(gradient)(q, k, v)
    torch.testing.assert_close(found[1], gradient(q[1], k[1], v[1]))
