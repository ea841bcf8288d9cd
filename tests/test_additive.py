"""Additive attention beyond the cases of the contract: arguments of any size, steps of a decoder, words, memory."""

import pytest
import torch
from torch import Tensor

import pyattn
from pyattn import core, registry, testing
from pyattn.spec import AttentionSpec, dtype_name
from pyattn.testing import Case

BACKENDS = [
    name
    for name, backend in registry.BACKENDS.items()
    if name != "reference" and "additive" in backend.features and backend.unavailable() is None
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def assert_agrees(call: testing.Call, backend: str) -> None:
    for result in testing.reference(call).compare(testing.evaluate_backend(call, backend)):
        assert result.excess <= 1, result


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("m", [1, 2, 5, 70])
@pytest.mark.parametrize("size", [1e-3, 1.0, 10.0, 80.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_additive_of_any_size_and_of_pairs_that_cancel_agrees_with_definition(backend, size, m, dtype):
    call = testing.make_inputs(Case("sizes", additive=True, m=m, n=70, d=50), dtype)
    q, k = call.tensors["q"], call.tensors["k"]
    with torch.no_grad():
        q.mul_(size)
        k.mul_(size)
        k[:, :, 3:9] = -q[:, :, :1]  # sums of exactly 0
        k[:, :, 9] = size
        q[:, :, 0, ::2] = -size
    assert_agrees(call, backend)


@pytest.mark.parametrize("size", [8, 16, 17, 100, 130, 512, 1000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_additive_of_any_width_agrees_with_definition(backend, size):
    call = testing.make_inputs(Case("widths", additive=True, m=9, n=33, d=size, dv=7, h=3, hk=1), torch.float32)
    assert_agrees(call, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_additive_infinity_is_saturation_and_nan_stays_in_its_row(backend):
    q, k, v, weight = torch.zeros(1, 1, 3, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 4), torch.randn(1, 8)
    q[..., 0, :] = torch.inf
    q[..., 1, 2] = torch.nan
    out, lse = pyattn.additive_attention(q, k, v, weight, return_lse=True, backend=backend)
    assert torch.allclose(out[..., 0, :], v.mean(2), atol=1e-6)  # every score is the sum of the weight
    assert out[..., 1, :].isnan().all() and lse[..., 1].isnan().all()
    expected = pyattn.additive_attention(q[..., 2:, :], k, v, weight, backend="reference")
    assert torch.allclose(out[..., 2:, :], expected, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_additive_weight_in_float32_beside_half_precision_takes_its_own_gradient(backend):
    dtype = torch.float16
    q, k, v = (torch.randn(2, 2, 6, 16, dtype=dtype) for _ in range(3))
    weight = torch.randn(2, 16, requires_grad=True)
    out = pyattn.additive_attention(q, k, v, weight, backend=backend)
    out.sum().backward()
    assert out.dtype is dtype and weight.grad.dtype is torch.float32


def decoder(step: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randn(size, generator=generator) for size in ((4, 1, 3, 32), (4, 1, 20, 32), (4, 1, 20, 8)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_additive_steps_of_beams_are_the_rows_of_one_call(backend):
    q, k, v = decoder(0)
    weight, lengths = torch.randn(1, 32), torch.tensor([20, 7, 1, 0])
    whole = pyattn.additive_attention(q, k, v, weight, key_lengths=lengths, backend=backend)
    for i in range(3):
        step = pyattn.additive_attention(q[:, :, i : i + 1], k, v, weight, key_lengths=lengths, backend=backend)
        assert torch.allclose(step, whole[:, :, i : i + 1], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight": torch.randn(2, 7)}, pyattn.ShapeError, r"weight: expected \[h=2, a=8\].*got \[2, 7\]"),
        ({"weight": torch.randn(8)}, pyattn.ShapeError, r"weight: expected \[h=2, a=8\]"),
        ({"weight": torch.randn(2, 8).half()}, pyattn.DtypeError, "weight: expected float32, got float16"),
        ({"weight": None}, pyattn.DtypeError, "weight: expected a torch.Tensor, got NoneType"),
        ({"k": torch.randn(1, 2, 5, 9)}, pyattn.ShapeError, r"k: expected \[b=1, hk, n, a=8\].*a is 8 in q"),
        ({"dropout": 0.1}, TypeError, "additive_attention: expected no argument dropout"),
    ],
)
def test_additive_wrong_argument_is_named(change, error, words):
    given = {"q": torch.randn(1, 2, 3, 8), "k": torch.randn(1, 2, 5, 8), "v": torch.randn(1, 2, 5, 8)}
    with pytest.raises(error, match=words):
        pyattn.additive_attention(**{**given, "weight": torch.randn(2, 8), **change})


@pytest.mark.parametrize(
    "option",
    [
        {"mask": torch.ones(1, 1, 3, 5, dtype=torch.bool)},
        {"bias": torch.zeros(1, 1, 3, 5)},
        {"key_lengths": torch.tensor([5])},
        {"segment_ids": (torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 5, dtype=torch.long))},
    ],
    ids=lambda option: next(iter(option)),
)
def test_additive_of_packed_sequences_excludes_what_is_for_batches(option):
    q, k, weight = torch.randn(3, 2, 8), torch.randn(5, 2, 8), torch.randn(2, 8)
    starts = {"cu_seqlens_q": torch.tensor([0, 1, 3]), "cu_seqlens_k": torch.tensor([0, 4, 5])}
    for backend in ("auto", "reference"):
        with pytest.raises(pyattn.RangeError, match=f"{next(iter(option))}: expected None beside cu_seqlens_q"):
            pyattn.additive_attention(q, k, k, weight, **starts, **option, backend=backend)


def test_additive_weight_of_half_precision_is_cast_as_queries_are_under_autocast():
    q, weight = torch.randn(1, 2, 3, 8).half(), torch.randn(2, 8).half().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = pyattn.additive_attention(q, q, q, weight)
    out.sum().backward()
    assert out.dtype is torch.bfloat16 and weight.grad.dtype is torch.float16


def test_additive_backward_counts_the_sums_of_the_weights_gradient():
    q, k, weight = torch.empty(400, 8, 1, 256), torch.empty(400, 8, 2, 256), torch.empty(8, 256)
    call = core.prepare(q, k, k, weight=weight)
    _, backward = registry.BACKENDS["cpu"].workspace_bytes(AttentionSpec.of(*call))
    _, of_one = registry.BACKENDS["cpu"].workspace_bytes(AttentionSpec.of(*call)._replace(b=1))
    assert backward - of_one >= 399 * 8 * 256 * 4


def test_additive_is_refused_by_name_where_no_kernel_has_it(monkeypatch):
    monkeypatch.setattr(type(registry.BACKENDS["cpu"]), "features", frozenset())
    q, weight = torch.randn(1, 1, 2, 4), torch.randn(1, 4)
    with pytest.raises(pyattn.UnsupportedError, match="cpu: does not do additive scores"):
        pyattn.additive_attention(q, q, q, weight, backend="cpu")


def test_explain_knows_additive_scores_and_the_tensor_they_would_take():
    q, weight = torch.randn(1, 1, 100, 64), torch.randn(1, 64)
    text = pyattn.explain(q, q, q, weight=weight)
    assert "features: additive" in text
    assert "2.56 MB for the tensor [b, h, m, n, a] of sums" in text


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("size", [1e-3, 1.0, 10.0, 40.0, 80.0])
@pytest.mark.parametrize(("m", "a"), [(2, 64), (3, 64), (3, 17)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_additive_with_exponentials_of_the_keys_agrees_with_definition(backend, m, a, size, dtype):
    call = testing.make_inputs(Case("steps", additive=True, m=m, n=70, d=a, key_lengths=(70, 33)), dtype)
    with torch.no_grad():
        call.tensors["q"].mul_(min(size, 10))
        k = call.tensors["k"].mul_(size)
        k[:, :, :5] = -call.tensors["q"][:, :, :1]
    oracle = testing.reference(call)
    call.options["exp_keys"] = torch.exp(2 * k.to(torch.promote_types(dtype, torch.float32)))
    for result in oracle.compare(testing.evaluate_backend(call, backend)):
        assert result.excess <= 1, result


def test_additive_exponentials_that_do_not_fit_are_refused():
    q, weight = torch.randn(1, 1, 2, 4), torch.randn(1, 4)
    with pytest.raises(pyattn.ShapeError, match="exp_keys: expected the shape of k"):
        pyattn.additive_attention(q, q, q, weight, exp_keys=torch.ones(1, 1, 3, 4))
    with pytest.raises(pyattn.DtypeError, match="exp_keys: expected float32, got float16"):
        pyattn.additive_attention(q, q, q, weight, exp_keys=torch.ones(1, 1, 2, 4).half())
    packed, starts = q[0].transpose(0, 1), torch.tensor([0, 2])
    with pytest.raises(pyattn.ShapeError, match=r"exp_keys: expected the shape of k, \[2, 1, 4\], got \[1, 1, 2, 4\]"):
        pyattn.additive_attention(
            packed, packed, packed, weight, cu_seqlens_q=starts, cu_seqlens_k=starts, exp_keys=torch.ones(1, 1, 2, 4)
        )


def test_additive_exponentials_leave_the_gradient_to_the_keys():
    q, v, weight = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 5, 4), torch.randn(1, 16)
    k = torch.randn(1, 1, 5, 16, requires_grad=True)
    expected, found = (
        torch.autograd.grad(pyattn.additive_attention(q, k, v, weight, exp_keys=e).square().sum(), k)[0]
        for e in (None, torch.exp(2 * k))
    )
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("m", [1, 2, 4, 7, 17])
def test_additive_of_large_weights_is_finite(m, backend):
    q, k, v, weight = (
        torch.full((1, 1, m, 64), 20.0),
        torch.full((1, 1, 4, 64), 20.0),
        torch.randn(1, 1, 4, 2),
        torch.ones(1, 64),
    )
    weight[0, ::2] *= -1
    for size, shrink in ((1100.0, 1.0), (1e7, 0.25), (1e12, 0.39), (1e30, 0.01), (1e30, 0.39)):
        out = pyattn.additive_attention(q * shrink, k * shrink, v, weight * size, scale=1 / size, backend=backend)
        assert torch.allclose(out, v.mean(2, keepdim=True).expand_as(out), atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("m", [1, 3, 17])
@pytest.mark.parametrize("backend", BACKENDS)
def test_additive_reads_nothing_that_earlier_calls_left_in_memory(backend, m, dtype):
    case = Case("left", additive=True, b=1, h=4, hk=4, m=m, n=100, d=16, dv=16, bias="111n")
    call = testing.make_inputs(case, dtype)
    oracle = testing.reference(call)
    junk = [torch.full((size,), float("inf")) for size in range(64, 15000, 97)]
    del junk
    for result in oracle.compare(testing.evaluate_backend(call, backend)):
        assert result.excess <= 1, result
