"""pyattn.scaled_dot_product_attention held against torch's own, and against what torch gets wrong."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import pyattn
from pyattn import core
from pyattn.testing import assert_as_accurate


def torch_sdpa(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *, is_causal: bool = False, **options: Any
) -> Tensor:
    """torch's definition in plain operations, which knows every shape and option but a mask with is_causal."""
    if is_causal and attn_mask is not None:
        band = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
        attn_mask = attn_mask & band if attn_mask.dtype is torch.bool else torch.where(band, attn_mask, -torch.inf)
        is_causal = False
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, is_causal=is_causal, **options)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1000 * sum(shape)), dtype=torch.float64)


def with_gradients(attention, tensors: dict[str, Tensor], options: dict) -> dict[str, Tensor]:
    """The output and the gradient of every tensor."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    out = attention(**leaves, **options)
    d_out = normal(*out.shape, seed=9).to(out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), d_out, materialize_grads=True)
    return {"out": out.detach()} | {f"d_{name}": g for name, g in zip(leaves, grads, strict=True)}


def split(tensors: dict[str, Tensor | None], options: dict) -> tuple[dict[str, Tensor], dict]:
    """(what takes a gradient, every other argument)."""
    present = {name: t for name, t in tensors.items() if t is not None}
    floating = {name: t for name, t in present.items() if t.is_floating_point()}
    return floating, options | {name: t for name, t in present.items() if name not in floating}


def assert_agrees_with_torch(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> None:
    """In float64, where a rounding error cannot be taken for a wrong meaning: torch's own comparison."""
    call = split({"query": query, "key": key, "value": value, "attn_mask": attn_mask}, options)
    actual = with_gradients(pyattn.scaled_dot_product_attention, *call)
    for name, expected in with_gradients(torch_sdpa, *call).items():
        torch.testing.assert_close(actual[name], expected, msg=lambda text, name=name: f"{name}: {text}")


def assert_as_accurate_as_torch(tensors: dict[str, Tensor | None], options: dict) -> None:
    tensors, options = split(tensors, options)
    actual = with_gradients(pyattn.scaled_dot_product_attention, tensors, options)
    baseline = with_gradients(torch_sdpa, tensors, options)
    expected = with_gradients(torch_sdpa, {name: t.double() for name, t in tensors.items()}, options)
    for name in expected:
        assert actual[name].dtype is baseline[name].dtype, name
        assert_as_accurate(actual[name], expected[name], baseline[name], what=name)


def bool_mask(*shape: int) -> Tensor:
    """About two thirds True, with one row that sees nothing where there are rows."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < 0.65
    if mask.dim() >= 2 and mask.shape[-2] > 1:
        mask[..., 1, :] = False
    return mask


# query, key and value shapes, then options
SHAPES = {
    "2d": ((7, 8), (9, 8), (9, 8)),
    "3d": ((3, 7, 8), (3, 9, 8), (3, 9, 8)),
    "4d": ((2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8)),
    "5d": ((2, 2, 3, 7, 8), (2, 2, 3, 9, 8), (2, 2, 3, 9, 8)),
    "6d": ((2, 1, 2, 3, 7, 8), (1, 3, 2, 3, 9, 8), (2, 3, 1, 1, 9, 8)),
    "other-value-size": ((2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 5)),
    "key-of-one-batch": ((2, 3, 7, 8), (1, 3, 9, 8), (1, 3, 9, 8)),
    "query-of-one-batch": ((1, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8)),
    "key-of-one-head": ((2, 3, 7, 8), (2, 1, 9, 8), (2, 1, 9, 8)),
    "query-of-one-head": ((2, 1, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8)),
    "value-of-one-head": ((2, 3, 7, 8), (2, 3, 9, 8), (2, 1, 9, 8)),
    "value-larger-than-scores": ((1, 1, 7, 8), (1, 1, 9, 8), (2, 3, 9, 8)),
    "key-of-fewer-dimensions": ((2, 3, 7, 8), (9, 8), (3, 9, 8)),
    "query-of-fewer-dimensions": ((7, 8), (2, 3, 9, 8), (2, 3, 9, 8)),
    "no-queries": ((2, 3, 0, 8), (2, 3, 9, 8), (2, 3, 9, 8)),
    "no-keys": ((2, 3, 7, 8), (2, 3, 0, 8), (2, 3, 0, 8)),
    "no-batch": ((0, 3, 7, 8), (0, 3, 9, 8), (0, 3, 9, 8)),
    "no-heads": ((2, 0, 7, 8), (2, 0, 9, 8), (2, 0, 9, 8)),
    "nothing-of-3d": ((0, 7, 8), (0, 9, 8), (0, 9, 8)),
    "no-head-size": ((2, 3, 7, 0), (2, 3, 9, 0), (2, 3, 9, 8)),
    "no-value-size": ((3, 7, 8), (3, 9, 8), (3, 9, 0)),
    "one-query": ((2, 3, 1, 8), (2, 3, 9, 8), (2, 3, 9, 8)),
}


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_sdpa_any_leading_dimensions_agrees_with_torch(shapes: tuple, is_causal: bool) -> None:
    assert_agrees_with_torch(*(normal(*shape, seed=i) for i, shape in enumerate(shapes)), is_causal=is_causal)


@pytest.mark.parametrize(
    ("shape", "kv_shape", "value_shape"),
    [
        ((2, 4, 7, 8), (2, 2, 9, 8), (2, 2, 9, 8)),
        ((2, 6, 7, 8), (2, 1, 9, 8), (2, 1, 9, 5)),
        ((4, 7, 8), (2, 9, 8), (2, 9, 8)),
        ((2, 2, 4, 7, 8), (2, 2, 2, 9, 8), (1, 2, 2, 9, 8)),
        ((2, 4, 7, 8), (1, 2, 9, 8), (1, 2, 9, 8)),
        ((2, 4, 7, 8), (2, 9, 8), (2, 9, 8)),
        ((2, 6, 7, 8), (2, 3, 9, 8), (2, 2, 9, 8)),
        ((2, 6, 7, 8), (2, 3, 9, 8), (2, 1, 9, 8)),
    ],
    ids=["4d", "one-kv-head", "3d", "5d", "one-batch", "mixed-dimensions", "key-and-value-differ", "one-value-head"],
)
def test_sdpa_enable_gqa_agrees_with_torch(shape: tuple, kv_shape: tuple, value_shape: tuple) -> None:
    q, k, v = normal(*shape), normal(*kv_shape, seed=1), normal(*value_shape, seed=2)
    assert_agrees_with_torch(q, k, v, enable_gqa=True)
    assert_agrees_with_torch(q, k, v, bool_mask(7, 9), enable_gqa=True)


def test_sdpa_enable_gqa_head_i_reads_kv_head_i_over_group() -> None:
    k, v = normal(1, 2, 5, 4), normal(1, 2, 5, 4, seed=1)
    q = normal(1, 1, 3, 4).expand(1, 6, 3, 4)
    out = pyattn.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert torch.equal(out[:, 0], out[:, 2]) and torch.equal(out[:, 3], out[:, 5])
    assert not torch.allclose(out[:, 2], out[:, 3])


MASK_SHAPES = [
    (7, 9), (1, 9), (7, 1), (1, 1), (3, 7, 9), (3, 1, 9), (1, 7, 9), (2, 3, 7, 9), (2, 1, 7, 9), (1, 3, 7, 9),
    (2, 1, 1, 9), (1, 3, 7, 1), (1, 1, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_sdpa_mask_of_any_broadcast_agrees_with_torch(shape: tuple, kind: str, is_causal: bool) -> None:
    q, k, v = normal(2, 3, 7, 8), normal(2, 3, 9, 8, seed=1), normal(2, 3, 9, 8, seed=2)
    mask = bool_mask(*shape) if kind == "bool" else normal(*shape, seed=3)
    assert_agrees_with_torch(q, k, v, mask, is_causal=is_causal)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_sdpa_mask_with_is_causal_is_both_in_one_mask(kind: str) -> None:
    q, k, v = normal(2, 3, 7, 8), normal(2, 3, 9, 8, seed=1), normal(2, 3, 9, 8, seed=2)
    mask, below = bool_mask(7, 9) if kind == "bool" else normal(7, 9), torch.ones(7, 9, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(
        q, k, v, mask.masked_fill(~below, False if kind == "bool" else -torch.inf)
    )
    torch.testing.assert_close(pyattn.scaled_dot_product_attention(q, k, v, mask, is_causal=True), expected)
    with sdpa_kernel(SDPBackend.MATH):
        for attention in (F.scaled_dot_product_attention, pyattn.scaled_dot_product_attention):
            with pytest.raises(RuntimeError, match="Explicit attn_mask should not be set"):
                attention(q, k, v, mask, is_causal=True)
        empty = pyattn.scaled_dot_product_attention(q[:0], k[:0], v[:0], mask, is_causal=True)
        assert empty.shape == (0, 3, 7, 8)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize(
    "shape", [(2, 1, 3, 7, 9), (2, 1, 1, 7, 9), (1, 2, 1, 1, 9), (2, 2, 3, 7, 9), (3, 7, 9)], ids=str
)
@pytest.mark.parametrize("kv_heads", [3, 1])
def test_sdpa_mask_over_five_dimensions_agrees_with_torch(shape: tuple, kind: str, kv_heads: int) -> None:
    q, k, v = normal(2, 2, 3, 7, 8), normal(2, 2, kv_heads, 9, 8, seed=1), normal(2, 2, kv_heads, 9, 8, seed=2)
    mask = bool_mask(*shape) if kind == "bool" else normal(*shape, seed=3)
    assert_agrees_with_torch(q, k, v, mask, enable_gqa=True)


@pytest.mark.parametrize("shape", [(9,), ()], ids=str)
def test_sdpa_mask_of_fewer_than_two_dimensions_agrees_with_torch(shape: tuple) -> None:
    q, k, v = normal(3, 7, 8), normal(3, 9, 8, seed=1), normal(3, 9, 8, seed=2)
    assert_agrees_with_torch(q, k, v, normal(*shape, seed=3))


@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 3), (2, 3), (2, 1, 3), (1, 2, 1), (2, 1, 1), (1, 2, 3)], ids=str)
def test_sdpa_mask_reaches_the_kernel_unexpanded(monkeypatch: pytest.MonkeyPatch, lead: tuple) -> None:
    passed: dict = {}

    def spy(q: Tensor, *rest: Tensor, **options: Any) -> tuple[Tensor, None]:
        passed.update(options)
        return q, None

    monkeypatch.setattr(core, "attend", spy)
    q = torch.randn(2, 2, 3, 4, 4)[(0,) * (3 - len(lead))]
    mask = torch.ones(*lead, 4, 4, dtype=torch.bool)
    pyattn.scaled_dot_product_attention(q, q, q, mask)
    assert passed["mask"].data_ptr() == mask.data_ptr()
    assert passed["mask"].numel() == mask.numel()


@pytest.mark.parametrize("scale", [None, 0.0, 0.3, -0.5, 1], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_sdpa_scale_agrees_with_torch(scale: float | None, is_causal: bool) -> None:
    q, k, v = normal(2, 3, 7, 8), normal(2, 3, 9, 8, seed=1), normal(2, 3, 9, 8, seed=2)
    assert_agrees_with_torch(q, k, v, scale=scale, is_causal=is_causal)


@pytest.mark.parametrize(
    "number", [np.float32(0.25), np.float64(0.25), torch.tensor(0.25), np.int64(1), torch.tensor(1), True], ids=repr
)
def test_sdpa_numbers_of_every_type_that_torch_takes(number: Any) -> None:
    q, k, v = normal(2, 3, 7, 8), normal(2, 3, 9, 8, seed=1), normal(2, 3, 9, 8, seed=2)
    assert_agrees_with_torch(q, k, v, scale=number)
    torch.manual_seed(0)
    out = pyattn.scaled_dot_product_attention(q, k, v, dropout_p=number)
    torch.manual_seed(0)
    assert torch.equal(out, pyattn.scaled_dot_product_attention(q, k, v, dropout_p=float(number)))


def test_sdpa_float_mask_is_added_after_scaling() -> None:
    q, k, v = normal(2, 3, 7, 8), normal(2, 3, 9, 8, seed=1), normal(2, 3, 9, 8, seed=2)
    assert_agrees_with_torch(q, k, v, normal(7, 9), scale=7.0)


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "same", "float32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_sdpa_dtype_is_as_accurate_as_torch(dtype: torch.dtype, kind: str) -> None:
    q, k, v = normal(2, 3, 65, 16), normal(2, 3, 80, 16, seed=1), normal(2, 3, 80, 24, seed=2)
    masks = {"bool": bool_mask(65, 80), "same": normal(65, 80).to(dtype), "float32": normal(2, 1, 65, 80).float()}
    tensors = {"query": q.to(dtype), "key": k.to(dtype), "value": v.to(dtype), "attn_mask": masks.get(kind)}
    assert_as_accurate_as_torch(tensors, {"is_causal": kind == "causal"})


def test_sdpa_float32_mask_with_float64_query_agrees_with_torch() -> None:
    q, k, v = normal(2, 3, 7, 8), normal(2, 3, 9, 8, seed=1), normal(2, 3, 9, 8, seed=2)
    assert_agrees_with_torch(q, k, v, normal(7, 9).float())


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Shapes that broadcast, with a mask that fits them."""
    lead = draw(st.lists(st.integers(1, 3), max_size=3))
    size = st.integers(1, 9)
    lengths = queries, keys = draw(size), draw(size)
    d, dv = draw(size), draw(size)

    def broadcast(sizes: list[int]) -> list[int]:
        kept = [draw(st.sampled_from([1, size])) for size in sizes]
        return kept[draw(st.integers(0, len(kept))) :]

    q_lead, k_lead, v_lead = broadcast(lead), broadcast(lead), broadcast(lead)
    call: dict[str, Any] = {
        "query": normal(*q_lead, queries, d),
        "key": normal(*k_lead, keys, d, seed=1),
        "value": normal(*v_lead, keys, dv, seed=2),
        "scale": draw(st.sampled_from([None, -0.4, 1.1])),
    }
    kind = draw(st.sampled_from(["none", "bool", "float"]))
    call["is_causal"] = draw(st.booleans())
    if kind != "none":
        scores = [*torch.broadcast_shapes(q_lead, k_lead), *lengths]
        shape = broadcast(scores)
        call["attn_mask"] = bool_mask(*shape) if kind == "bool" else normal(*shape, seed=3)
    return call


@settings(max_examples=120, deadline=None, derandomize=True)
@given(calls())
def test_sdpa_generated_call_agrees_with_torch(call: dict[str, Any]) -> None:
    assert_agrees_with_torch(**call)


def test_sdpa_signature_is_that_of_torch() -> None:
    parameters = inspect.signature(pyattn.scaled_dot_product_attention).parameters.values()
    described = [(p.name, p.default, p.kind is p.KEYWORD_ONLY) for p in parameters]
    empty = inspect.Parameter.empty
    assert described == [
        ("query", empty, False), ("key", empty, False), ("value", empty, False), ("attn_mask", None, False),
        ("dropout_p", 0.0, False), ("is_causal", False, False), ("scale", None, True), ("enable_gqa", False, True),
    ]  # fmt: skip


@pytest.mark.parametrize(("queries", "keys"), [(3, 6), (6, 3), (5, 5)])
def test_sdpa_causal_aligns_the_first_query_with_the_first_key(queries: int, keys: int) -> None:
    q, k, v = normal(1, 1, queries, 4), normal(1, 1, keys, 4, seed=1), normal(1, 1, keys, 4, seed=2)
    out = pyattn.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out[..., 0, :], v[..., 0, :])
    mask = torch.ones(queries, keys, dtype=torch.bool).tril()
    torch.testing.assert_close(out, pyattn.attention(q, k, v, mask=mask))
    if queries != keys:
        assert not torch.allclose(out, pyattn.attention(q, k, v, causal=True))


@pytest.mark.filterwarnings("ignore:Lower right causal bias")
@pytest.mark.parametrize(("queries", "keys"), [(3, 6), (6, 3), (5, 5)])
@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
def test_sdpa_causal_bias_object_agrees_with_torch(bias, queries: int, keys: int) -> None:
    q, k, v = normal(2, 2, queries, 4), normal(2, 2, keys, 4, seed=1), normal(2, 2, keys, 4, seed=2)
    mask = bias(queries, keys)
    expected = torch_sdpa(q, k, v, mask._materialize())
    torch.testing.assert_close(pyattn.scaled_dot_product_attention(q, k, v, mask), expected)


def test_sdpa_bool_mask_true_means_attend() -> None:
    q, k, v = normal(1, 1, 3, 4), normal(1, 1, 5, 4, seed=1), normal(1, 1, 5, 4, seed=2)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[:, 2] = True
    out = pyattn.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(out, v[..., 2:3, :].expand(1, 1, 3, 4))


@pytest.mark.parametrize("nothing", [False, -math.inf], ids=["bool", "minus-infinity"])
def test_sdpa_row_that_sees_nothing_is_zero_with_zero_gradients(nothing: float) -> None:
    q, k, v = (normal(1, 1, 4, 4, seed=i).requires_grad_() for i in range(3))
    mask = torch.full((4, 4), nothing)
    mask[2:] = 1
    out = pyattn.scaled_dot_product_attention(q, k, v, mask)
    assert (out[..., :2, :] == 0).all() and (out[..., 2:, :] != 0).all()
    grads = torch.autograd.grad(out[..., :2, :].sum(), (q, k, v))
    assert all((g == 0).all() for g in grads)


def test_sdpa_row_masked_with_the_least_number_averages_the_values() -> None:
    q, k, v = (normal(1, 1, 4, 4, seed=i).float() for i in range(3))
    mask = torch.full((4, 4), torch.finfo(torch.float32).min)
    out = pyattn.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(out, v.mean(-2, keepdim=True).expand_as(v))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_sdpa_nan_in_masked_key_or_value_does_not_leak(poison: float) -> None:
    q, k, v = (normal(2, 3, 5, 4, seed=i).requires_grad_() for i in range(3))
    seen = torch.tensor([True, True, False, True, False])
    expected = pyattn.scaled_dot_product_attention(q, k, v, seen.expand(5, 5))
    bad_k, bad_v = (torch.where(seen[:, None], t, poison).detach().requires_grad_() for t in (k, v))
    out = pyattn.scaled_dot_product_attention(q, bad_k, bad_v, seen.expand(5, 5))
    torch.testing.assert_close(out, expected)
    for g, want in zip(
        torch.autograd.grad(out.sum(), (q, bad_k, bad_v)), torch.autograd.grad(expected.sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(g, want)


def kept_weights(dropout_p: float, seed: int, keys: int = 64) -> Tensor:
    """The weights [queries, keys] after dropout of queries that see all keys equally, by values that are one-hot."""
    torch.manual_seed(seed)
    q, k = torch.zeros(1, 1, 50, 8), torch.zeros(1, 1, keys, 8)
    with torch.no_grad():
        return pyattn.scaled_dot_product_attention(q, k, torch.eye(keys)[None, None], dropout_p=dropout_p)[0, 0]


def test_sdpa_dropout_is_applied_without_a_training_flag_and_scaled() -> None:
    weights = kept_weights(0.25, seed=0) * 64
    kept = weights != 0
    torch.testing.assert_close(weights, kept / 0.75)
    deviation = math.sqrt(0.25 * 0.75 / kept.numel())
    assert abs(kept.float().mean() - 0.75) < 5 * deviation


def test_sdpa_dropout_follows_torch_manual_seed() -> None:
    assert torch.equal(kept_weights(0.25, seed=1), kept_weights(0.25, seed=1))
    assert not torch.equal(kept_weights(0.25, seed=1), kept_weights(0.25, seed=2))


def test_sdpa_dropout_gradient_uses_the_mask_of_the_forward() -> None:
    weights = torch.zeros(4, 4, dtype=torch.float64)
    q, k = torch.zeros(2, 1, 1, 4, 8, dtype=torch.float64)
    v = torch.eye(4, dtype=torch.float64)[None, None].requires_grad_()
    out = pyattn.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    weights = out[0, 0].detach()
    d_out = normal(4, 4)
    (d_v,) = torch.autograd.grad(out[0, 0], v, d_out)
    torch.testing.assert_close(d_v[0, 0], weights.T @ d_out)


def test_sdpa_dropout_of_everything_gives_zero_with_zero_gradients() -> None:
    q, k, v, mask = (normal(2, 3, 5, 5, seed=i).requires_grad_() for i in range(4))
    out = pyattn.scaled_dot_product_attention(q, k, v, mask, dropout_p=1.0)
    assert (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), (q, k, v, mask)))


def test_sdpa_under_autocast_agrees_with_torch() -> None:
    q, k, v, mask = (normal(2, 3, 5, 5, seed=i).float() for i in range(4))
    with torch.autocast("cpu", torch.bfloat16):
        out = pyattn.scaled_dot_product_attention(q, k.bfloat16(), v, mask)
        baseline = F.scaled_dot_product_attention(q, k.bfloat16(), v, mask)
    assert out.dtype is baseline.dtype is torch.bfloat16
    expected = torch_sdpa(*(t.bfloat16().double() for t in (q, k, v)), mask.double())
    assert_as_accurate(out, expected, torch_sdpa(*(t.bfloat16() for t in (q, k, v)), mask))


def test_sdpa_inputs_of_any_strides_agree_with_torch() -> None:
    packed = normal(2, 7, 3 * 3 * 8)
    q, k, v = (t.unflatten(-1, (3, 8)).transpose(1, 2) for t in packed.chunk(3, -1))
    assert_agrees_with_torch(q, k, v)
    assert_agrees_with_torch(q, k.transpose(-1, -2).contiguous().transpose(-1, -2), v, normal(9, 7).T[:, :7])


BAD_CALLS = {
    "1d-query": (lambda q, k, v: ((q[0, 0, 0], k, v), {}), pyattn.ShapeError, "query"),
    "not-a-tensor": (lambda q, k, v: ((q, 3, v), {}), pyattn.DtypeError, "key"),
    "other-key-size": (lambda q, k, v: ((q, k[..., :5], v), {}), pyattn.ShapeError, "key"),
    "other-value-length": (lambda q, k, v: ((q, k, v[..., :5, :]), {}), pyattn.ShapeError, "value"),
    "heads-without-gqa": (lambda q, k, v: ((q, k[:, :2], v[:, :2]), {}), pyattn.ShapeError, "leading"),
    "heads-not-divisible": (lambda q, k, v: ((q, k[:, :3], v), {"enable_gqa": True}), pyattn.ShapeError, "key"),
    "gqa-of-2d": (lambda q, k, v: ((q[0, 0], k[0, 0], v[0, 0]), {"enable_gqa": True}), pyattn.ShapeError, "query"),
    "batches-differ": (lambda q, k, v: ((q, k.repeat(2, 1, 1, 1)[:3], v), {}), pyattn.ShapeError, "leading"),
    "mixed-dtypes": (lambda q, k, v: ((q, k.double(), v), {}), pyattn.DtypeError, "key"),
    "integers": (lambda q, k, v: ((q.long(), k.long(), v.long()), {}), pyattn.DtypeError, "int64"),
    "integer-mask": (lambda q, k, v: ((q, k, v, torch.ones(7, 9).int()), {}), pyattn.DtypeError, "attn_mask"),
    "double-mask": (lambda q, k, v: ((q, k, v, torch.ones(7, 9).double()), {}), pyattn.DtypeError, "attn_mask"),
    "half-mask": (lambda q, k, v: ((q, k, v, torch.ones(7, 9).half()), {}), pyattn.DtypeError, "attn_mask"),
    "mask-too-long": (lambda q, k, v: ((q, k, v, torch.ones(7, 10)), {}), pyattn.ShapeError, "attn_mask"),
    "mask-too-many-dims": (lambda q, k, v: ((q, k, v, torch.ones(1, 1, 1, 7, 9)), {}), pyattn.ShapeError, "attn_mask"),
    "mask-enlarges": (
        lambda q, k, v: ((q[:1], k[:1], v[:1], torch.ones(2, 1, 7, 9)), {}), pyattn.ShapeError, "attn_mask",
    ),
    "causal-bias-and-causal": (
        lambda q, k, v: ((q, k, v, causal_upper_left(7, 9)), {"is_causal": True}), pyattn.RangeError, "is_causal",
    ),
    "causal-bias-of-other-size": (
        lambda q, k, v: ((q, k, v, causal_upper_left(7, 8)), {}), pyattn.ShapeError, "attn_mask",
    ),
    "dropout-above-one": (lambda q, k, v: ((q, k, v), {"dropout_p": 1.5}), pyattn.RangeError, "dropout_p"),
    "dropout-negative": (lambda q, k, v: ((q, k, v), {"dropout_p": -0.1}), pyattn.RangeError, "dropout_p"),
    "causal-as-a-number": (lambda q, k, v: ((q, k, v), {"is_causal": 1}), pyattn.DtypeError, "^is_causal: "),
    "integers-alone": (lambda q, k, v: ((q.long(), k.long(), v.long()), {}), pyattn.DtypeError, "^query: "),
    "scale-with-gradient": (
        lambda q, k, v: ((q, k, v), {"scale": torch.ones((), requires_grad=True)}), pyattn.DtypeError, "^scale: ",
    ),
    "scale-of-one-dimension": (lambda q, k, v: ((q, k, v), {"scale": torch.ones(1)}), pyattn.DtypeError, "^scale: "),
    "scale-not-finite": (lambda q, k, v: ((q, k, v), {"scale": math.nan}), pyattn.RangeError, "scale"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "named"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_sdpa_bad_argument_raises_and_names_it(arguments, error: type[Exception], named: str) -> None:
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
    args, options = arguments(q, k, v)
    with pytest.raises(error, match=named) as caught:
        pyattn.scaled_dot_product_attention(*args, **options)
    assert isinstance(caught.value, RuntimeError)  # which is what code written for torch catches


def test_sdpa_nested_tensor_raises() -> None:
    x = torch.nested.nested_tensor([torch.randn(2, 3, 4), torch.randn(2, 5, 4)])
    with pytest.raises(pyattn.UnsupportedError, match="nested"):
        pyattn.scaled_dot_product_attention(x, x, x)
