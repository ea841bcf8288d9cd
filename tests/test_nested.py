"""pyattn.scaled_dot_product_attention of nested tensors, against torch's own and against each sequence alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyattn
from pyattn.testing import assert_as_accurate

H, D = 3, 8
LENGTHS = (4, 1, 6)
KEY_LENGTHS = (5, 2, 3)

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


@pytest.fixture(autouse=True, scope="module")
def fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def jagged(lengths: tuple[int, ...], size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A leaf [b, *, size]."""
    sequences = [normal(length, size, seed=seed + i, dtype=dtype) for i, length in enumerate(lengths)]
    return torch.nested.nested_tensor(sequences, layout=torch.jagged, requires_grad=True)


def heads(x: Tensor, h: int = H) -> Tensor:
    """[b, *, h * d] as [b, h, *, d]."""
    return x.unflatten(-1, (h, -1)).transpose(1, 2)


def leaves(h: int = H, dv: int = D, dtype: torch.dtype = torch.float64, cross: bool = True) -> tuple[Tensor, ...]:
    """query, key and value as leaves [b, *, heads * size], key and value of `h` heads; with one set of offsets."""
    query = jagged(LENGTHS, H * D, dtype=dtype)
    memory = jagged(KEY_LENGTHS if cross else LENGTHS, h * (D + dv), seed=5, dtype=dtype)
    offsets = memory.offsets() if cross else query.offsets()
    key, value = (
        torch.nested.nested_tensor_from_jagged(t.detach().clone(), offsets).requires_grad_()
        for t in memory.values().split((h * D, h * dv), -1)
    )
    return query, key, value


def padless(out: Tensor) -> Tensor:
    """[b, h, *, d] as [total, h, d]."""
    return out.transpose(1, 2).values()


def with_gradients(attention, tensors: tuple[Tensor, ...], h: int = H, **options: Any) -> list[Tensor]:
    """The output and the gradient of every leaf, without their structure."""
    query, key, value = tensors
    out = padless(attention(heads(query), heads(key, h), heads(value, h), **options))
    d_out = normal(*out.shape, seed=9).to(out.dtype)
    return [out.detach(), *(g.values() for g in torch.autograd.grad(out, tensors, d_out))]


def one_by_one(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """torch's dense attention of each sequence, nested again. Its fused kernel gives NaN for a negative scale."""
    with sdpa_kernel(SDPBackend.MATH):
        results = [
            F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in one), **options).transpose(0, 1)
            for one in zip(*(t.transpose(1, 2).unbind() for t in (query, key, value)), strict=True)
        ]
    return torch.nested.as_nested_tensor(results, layout=torch.jagged).transpose(1, 2)


def assert_agree(actual: list[Tensor], expected: list[Tensor]) -> None:
    for name, got, want in zip(("out", "d_query", "d_key", "d_value"), actual, expected, strict=True):
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}], ids=str)
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("dv", [D, 5])
def test_nested_agrees_with_torch(cross: bool, dv: int, options: dict) -> None:
    tensors = leaves(cross=cross, dv=dv)
    expected = with_gradients(F.scaled_dot_product_attention, tensors, **options)
    assert_agree(with_gradients(pyattn.scaled_dot_product_attention, tensors, **options), expected)


@pytest.mark.parametrize(
    ("h", "options"),
    [
        (H, {"is_causal": True}),
        (H, {"is_causal": True, "scale": -0.2}),
        (1, {"enable_gqa": True}),
        (1, {"enable_gqa": True, "is_causal": True}),
    ],
    ids=["causal", "causal-scale", "gqa", "gqa-causal"],
)
def test_nested_agrees_with_each_sequence_alone(h: int, options: dict) -> None:
    """What torch has no nested kernel for on the CPU."""
    tensors = leaves(h, cross=not options.get("is_causal", False))
    expected = with_gradients(one_by_one, tensors, h, **options)
    assert_agree(with_gradients(pyattn.scaled_dot_product_attention, tensors, h, **options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nested_dtype_is_as_accurate_as_torch(dtype: torch.dtype) -> None:
    tensors = leaves(dtype=dtype)
    wide = tuple(t.detach().double().requires_grad_() for t in tensors)
    actual = with_gradients(pyattn.scaled_dot_product_attention, tensors)
    baseline = with_gradients(one_by_one, tensors)
    for got, plain, want in zip(actual, baseline, with_gradients(one_by_one, wide), strict=True):
        assert got.dtype is dtype
        assert_as_accurate(got, want, plain)


def test_nested_result_has_the_structure_of_query() -> None:
    query, key, value = (heads(t) for t in leaves())
    out = pyattn.scaled_dot_product_attention(query, key, value)
    assert out.layout is torch.jagged and out.shape == query.shape
    assert out.offsets() is query.offsets() and out._maybe_max_seqlen == max(LENGTHS)
    assert (out + query).shape == query.shape


def test_nested_views_of_one_projection_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    x = jagged(LENGTHS, 3 * H * D)
    given: list[Tensor] = []
    attention = pyattn.core.attend
    monkeypatch.setattr(pyattn.core, "attend", lambda *t, **o: given.extend(t) or attention(*t, **o))
    query, key, value = (heads(t) for t in x.chunk(3, -1))
    out = pyattn.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(padless(out), padless(one_by_one(query, key, value, is_causal=True)))
    storage = x.values().untyped_storage().data_ptr()
    assert [t.untyped_storage().data_ptr() for t in given] == [storage] * 3


def test_nested_dropout_is_that_of_packed_sequences() -> None:
    tensors = leaves()
    query, key, value = (padless(heads(t)) for t in tensors)
    torch.manual_seed(3)
    out = pyattn.scaled_dot_product_attention(*(heads(t) for t in tensors), dropout_p=0.4)
    torch.manual_seed(3)
    offsets = (tensors[0].offsets(), tensors[1].offsets())
    torch.testing.assert_close(padless(out), pyattn.attention_varlen(query, key, value, *offsets, dropout_p=0.4))
    out, *grads = with_gradients(pyattn.scaled_dot_product_attention, tensors, dropout_p=1.0)
    assert all((t == 0).all() for t in (out, *grads))


@pytest.mark.parametrize("causal", [False, True])
def test_nested_sequences_without_tokens_take_no_part(causal: bool) -> None:
    x = jagged((4, 0, 6), H * D)
    without = torch.nested.nested_tensor_from_jagged(x.values(), torch.tensor([0, 4, 10]))
    with_it, expected = (
        pyattn.scaled_dot_product_attention(*(heads(t) for _ in range(3)), is_causal=causal) for t in (x, without)
    )
    torch.testing.assert_close(padless(with_it), padless(expected))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
def test_nested_lengths_that_agree_by_chance_agree_with_torch(options: dict) -> None:
    """torch.nested takes the heads for the ragged dimension then."""
    x, y = (
        torch.nested.nested_tensor([normal(H, n, D, seed=i) for i in range(2)], layout=torch.jagged) for n in (5, 7)
    )
    assert x._ragged_idx == 1
    for key in (x, torch.nested.nested_tensor_from_jagged(y.values(), x.offsets())):
        tensors = [t.detach().requires_grad_() for t in (x, key, key)]
        results = []
        for attention in (pyattn.scaled_dot_product_attention, F.scaled_dot_product_attention):
            out = attention(*tensors, **options)
            assert out.shape == x.shape
            grads = torch.autograd.grad(out.values().square().sum(), tensors)
            results.append([t.values() for t in (out, *grads)])
        assert_agree(*results)


def test_nested_under_autocast_has_its_dtype() -> None:
    query, key, value = (heads(t) for t in leaves(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        out = pyattn.scaled_dot_product_attention(query, key.to(torch.bfloat16), value)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(padless(out).float(), padless(one_by_one(query, key, value)), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=str)
def test_nested_compiles_and_does_not_recompile_for_new_lengths(options: dict) -> None:
    def function(x: Tensor) -> Tensor:
        return pyattn.scaled_dot_product_attention(*(heads(t) for t in x.chunk(3, -1)), **options)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for i, lengths in enumerate(((4, 2, 6), KEY_LENGTHS)):
        x = jagged(lengths, 3 * H * D)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            out = compiled(x)
        want = function(x)
        torch.testing.assert_close(padless(out), padless(want))
        got, expected = (torch.autograd.grad(padless(t).square().sum(), x)[0].values() for t in (out, want))
        torch.testing.assert_close(got, expected)


def strided() -> Tensor:
    return torch.nested.nested_tensor([normal(H, length, D) for length in LENGTHS])


def narrowed() -> Tensor:
    return torch.nested.narrow(normal(3, 7, H * D), 1, 1, torch.tensor(KEY_LENGTHS), layout=torch.jagged)


q, k, v = (heads(t).detach() for t in leaves())
other_k = heads(jagged((3, 2, 5), H * D)).detach()
one_head = heads(jagged(KEY_LENGTHS, D), 1).detach()
two_heads = heads(jagged(KEY_LENGTHS, 2 * D), 2).detach()
REFUSED: dict[str, tuple[tuple, dict, type[Exception], str]] = {
    "mask": ((q, k, v, torch.ones(1, 1, 1, 1).bool()), {}, pyattn.UnsupportedError, "attn_mask"),
    "causal-of-other-lengths": ((q, k, v), {"is_causal": True}, pyattn.UnsupportedError, "is_causal"),
    "dense-key": ((q, normal(3, H, 5, D), v), {}, pyattn.UnsupportedError, "key"),
    "dense-query": ((normal(3, H, 5, D), k, v), {}, pyattn.UnsupportedError, "query"),
    "strided": ((strided(),) * 3, {}, pyattn.UnsupportedError, "query.*jagged"),
    "gaps": ((q, k, heads(narrowed())), {}, pyattn.UnsupportedError, "value.*contiguous"),
    "three-dimensions": ((jagged(LENGTHS, D),) * 3, {}, pyattn.ShapeError, "query"),
    "other-batch": ((q, heads(jagged((2, 3), H * D)), v), {}, pyattn.ShapeError, "key"),
    "value-of-other-lengths": ((q, other_k, v), {}, pyattn.ShapeError, "value"),
    "ragged-heads-of-key": ((q, k.transpose(1, 2), v), {}, pyattn.ShapeError, "key"),
    "heads": ((q, one_head, one_head), {}, pyattn.ShapeError, "key"),
    "heads-that-do-not-divide": ((q, two_heads, two_heads), {"enable_gqa": True}, pyattn.ShapeError, "key"),
    "heads-of-value": ((q, one_head, v), {"enable_gqa": True}, pyattn.ShapeError, "value"),
    "dtype": ((q, k.float(), v), {}, pyattn.DtypeError, "key"),
    "not-a-tensor": ((q, [1.0], v), {}, pyattn.DtypeError, "key"),
    "dropout": ((q, k, v), {"dropout_p": 1.5}, pyattn.RangeError, "dropout_p"),
}


@pytest.mark.parametrize(("tensors", "options", "error", "named"), REFUSED.values(), ids=REFUSED)
def test_nested_bad_call_raises_and_names_it(tensors: tuple, options: dict, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        pyattn.scaled_dot_product_attention(*tensors, **options)
