"""torch.func's transforms over attention, each held against a loop over the samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vjp, vmap

import pyattn

S, B, H, HK, M, N, D = 3, 2, 4, 2, 5, 7, 8  # S samples


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


QKV = normal(S, B, H, M, D), normal(S, B, HK, N, D), normal(S, B, HK, N, D)
# Keyword arguments, those of the samples stacked, and where their samples lie; None where they share it.
OPTIONS: dict[str, dict[str, tuple[Any, int | None]]] = {
    "plain": {},
    "mask of each": {"mask": (normal(S, B, 1, M, N) > -1, 0)},
    "mask that is shared": {"mask": (normal(M, N) > -1, None)},
    "mask of each without batch": {"mask": (normal(M, S, N) > -1, 1)},
    "bias of each": {"bias": (normal(S, B, H, M, N), 0)},
    "bias that is shared": {"bias": (normal(1, H, M, N), None)},
    "bias of each without batch": {"bias": (normal(S, 1, H, M, N), 0)},
    "lengths": {"key_lengths": (torch.tensor([[7, 2], [0, 4], [5, 5]]), 0)},
    "slopes and lengths that are shared": {
        "alibi_slopes": (torch.linspace(1, 0.1, H), None),
        "key_lengths": (torch.tensor([3, 6]), None),
    },
    "sinks": {"sinks": (normal(S, H), 0)},
    "weight of each": {"weight": (normal(S, H, D), 0)},
    "weight that is shared": {"weight": (normal(H, D), None), "bias": (normal(S, B, H, M, N), 0)},
    "relative term of each": {"relative_q": (normal(S, B, H, M, 3), 0), "relative_k": (normal(S, 1, H, 40, 3), 0)},
    "relative term that is shared": {
        "relative_q": (normal(S, B, H, M, 3), 0),
        "relative_k": (normal(B, H, 40, 3), None),
    },
    "dropout": {"dropout_p": (0.4, None), "seed": (torch.tensor(5), None)},
    "dropout of each": {"dropout_p": (0.4, None), "seed": (torch.tensor([5, 6, 7]), 0)},
}
LEARNED = ("bias", "sinks", "weight", "relative_q", "relative_k")


def attend(*qkv: Tensor, **given: Any) -> Any:
    if "relative_k" in given:
        return pyattn.relative_attention(*qkv, first=-20, return_lse=True, **given)
    return (pyattn.additive_attention if "weight" in given else pyattn.attention)(*qkv, return_lse=True, **given)


def run_both(options: dict[str, tuple[Any, int | None]], function: Any) -> tuple[Any, Any]:
    """`function(q, k, v, **options)` by vmap, and by a loop."""
    names = list(options)
    values, dims = [value for value, _ in options.values()], [dim for _, dim in options.values()]

    def call(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> Any:
        return function(q, k, v, **dict(zip(names, given, strict=True)))

    found = vmap(call, in_dims=(0, 0, 0, *dims))(*QKV, *values)
    samples = [
        call(
            *(t[i] for t in QKV), *(v if dim is None else v.select(dim, i) for v, dim in zip(values, dims, strict=True))
        )
        for i in range(S)
    ]
    if isinstance(samples[0], Tensor):
        return (found,), (torch.stack(samples),)
    return found, tuple(torch.stack(of_one) for of_one in zip(*samples, strict=True))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_vmap_gives_what_a_loop_gives(options: dict[str, tuple[Any, int | None]]) -> None:
    for got, want in zip(*run_both(options, attend), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_vmap_of_grad_gives_each_sample_its_gradients(options: dict[str, tuple[Any, int | None]]) -> None:
    learned = tuple(name for name in LEARNED if name in options)

    def gradients(*qkv: Tensor, **given: Any) -> Any:
        def loss(q: Tensor, k: Tensor, v: Tensor, *extra: Tensor) -> Tensor:
            out, lse = attend(q, k, v, **given | dict(zip(learned, extra, strict=True)))
            return out.square().sum() + torch.where(lse.isfinite(), lse, 0.0).sum()

        return grad(loss, argnums=tuple(range(3 + len(learned))))(*qkv, *(given[name] for name in learned))

    for got, want in zip(*run_both(options, gradients), strict=True):
        torch.testing.assert_close(got, want)


def assert_batched_gradients_are_those_of_a_loop(outs: tuple[Tensor, ...], leaves: list[Tensor]) -> None:
    """By torch.autograd.grad's own vmap, which is not that of torch.func."""
    cotangents = tuple(normal(S, *out.shape) for out in outs)
    many = torch.autograd.grad(outs, leaves, cotangents, retain_graph=True, is_grads_batched=True)
    for i in range(S):
        of_one = torch.autograd.grad(outs, leaves, tuple(t[i] for t in cotangents), retain_graph=True)
        for found, expected in zip(many, of_one, strict=True):
            torch.testing.assert_close(found[i], expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_batched_gradients_are_those_of_a_loop(options: dict[str, tuple[Any, int | None]]) -> None:
    given = {name: value if dim is None else value.select(dim, 0) for name, (value, dim) in options.items()}
    learned = {
        name: given[name].clone().requires_grad_()
        for name in ("bias", "sinks", "weight", "relative_q", "relative_k")
        if name in given
    }
    qkv = [t[0].clone().requires_grad_() for t in QKV]
    out, lse = attend(*qkv, **given | learned)
    seen = torch.where(lse.isfinite(), lse, 0.0)
    for outs in ((out,), (seen,), (out, seen)):
        assert_batched_gradients_are_those_of_a_loop(outs, [*qkv[:2], *learned.values()])


def test_batched_gradients_of_packed_sequences() -> None:
    q, k, v = (normal(rows, heads, D).requires_grad_() for rows, heads in ((5, H), (7, HK), (7, HK)))
    out = pyattn.attention_varlen(q, k, v, torch.tensor([0, 2, 5]), torch.tensor([0, 0, 7]), causal=True)
    assert_batched_gradients_are_those_of_a_loop((out,), [q, k, v])


def test_grad_is_that_of_autograd() -> None:
    q, k, v = (t[0].clone().requires_grad_() for t in QKV)
    expected = torch.autograd.grad(pyattn.attention(q, k, v, causal=True).square().sum(), (q, k, v))
    found = grad(lambda *x: pyattn.attention(*x, causal=True).square().sum(), argnums=(0, 1, 2))(q, k, v)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_jacrev_and_vjp() -> None:
    q, k, v = (t[0] for t in QKV)
    out, pull_back = vjp(lambda q: pyattn.attention(q, k, v), q)
    jacobian = jacrev(lambda q: pyattn.attention(q, k, v))(q)
    torch.testing.assert_close(pull_back(torch.ones_like(out))[0], jacobian.sum(tuple(range(out.dim()))))


def test_samples_that_share_keys_and_values() -> None:
    q, k, v = QKV[0], QKV[1][0], QKV[2][0]
    found = vmap(pyattn.attention, in_dims=(0, None, None))(q, k, v)
    torch.testing.assert_close(found, torch.stack([pyattn.attention(one, k, v) for one in q]))


def test_vmap_of_vmap() -> None:
    q, k, v = (t[None].expand(2, *t.shape) for t in QKV)
    found = vmap(vmap(lambda *x: pyattn.attention(*x, causal=True)))(q, k, v)
    torch.testing.assert_close(
        found[1], pyattn.attention(*(t.flatten(0, 1) for t in QKV), causal=True).view_as(found[1])
    )


def test_per_sample_gradients_of_a_module() -> None:
    torch.manual_seed(0)
    module = pyattn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, parameters, (x, x, x), {"need_weights": False})[0].square().sum()

    x = normal(3, 1, 5, 8)
    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        expected = grad(loss)(parameters, x[i])
        for name in parameters:
            torch.testing.assert_close(found[name][i], expected[name])


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_draws_dropout_as_it_is_told(randomness: str) -> None:
    q, k, v = (t[:1].expand(4, *t.shape[1:]) for t in QKV)
    out = vmap(lambda *x: pyattn.attention(*x, dropout_p=0.5), randomness=randomness)(q, k, v)
    assert torch.equal(out[0], out[1]) == (randomness == "same")


def test_second_derivative_is_refused_by_name() -> None:
    q, k, v = (t[0] for t in QKV)
    with pytest.raises(pyattn.UnsupportedError, match="no second derivative"):
        grad(lambda q: grad(lambda q: pyattn.attention(q, k, v).square().sum())(q).square().sum())(q)
    found = grad(
        lambda q: grad(lambda q: pyattn.attention(q, k, v, backend="reference").square().sum())(q).square().sum()
    )(q)
    assert found.isfinite().all()
