"""The `hopper` backend around its kernels, which run in the PTX machine: layouts, schedules, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from ptx.cases import ALL
from ptx.launch import Device, pyattn_on
from ptx.program import Schedule

import pyattn
from pyattn import core, registry, testing
from pyattn.backends import KernelError
from pyattn.backends import hopper as backend_module
from pyattn.backends.hopper import HopperBackend
from pyattn.backends.triton import TritonBackend
from pyattn.spec import AttentionSpec, empty_results
from pyattn.triton_kernels import hopper


@pytest.fixture
def device() -> Iterator[Device]:
    with pyattn_on("sm_90a") as device:
        yield device


@pytest.mark.parametrize("case", ["large-causal", "large-window"])
def test_bits_are_the_same_under_every_schedule(device: Device, case: str) -> None:
    call = testing.make_inputs(ALL[case], torch.bfloat16)
    first: list[torch.Tensor] = []
    for seed in range(4):
        device.schedule = Schedule(seed=seed)
        leaves = {name: t.detach().clone().requires_grad_() if name in "qkv" else t for name, t in call.tensors.items()}
        out, lse = core.attend(**leaves, **call.options, backend="hopper")
        found = [out, lse, *torch.autograd.grad(out.sum() + lse.sum(), [leaves[name] for name in "qkv"])]
        first = first or found
        assert all(map(torch.equal, found, first))


def test_packed_sequences_of_any_lengths(device: Device) -> None:
    starts_q, starts_k = torch.tensor([0, 70, 70, 77, 210]), torch.tensor([0, 40, 110, 110, 240])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows, 2, 64, generator=generator).bfloat16() for rows in (210, 240, 240))
    for options in ({}, {"causal": True}, {"window": (20, 70)}):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        wide = [t.double().requires_grad_() for t in (q, k, v)]
        outs = [
            core.attend(*t, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, **options, backend=backend)
            for t, backend in ((leaves, "hopper"), (wide, "reference"))
        ]
        grads = [torch.autograd.grad(out.square().sum(), t) for (out, _), t in zip(outs, (leaves, wide), strict=True)]
        torch.testing.assert_close(outs[0][1], outs[1][1].float())
        for got, want in zip((outs[0][0], *grads[0]), (outs[1][0], *grads[1]), strict=True):
            torch.testing.assert_close(got.double(), want, rtol=0.02, atol=0.02 * want.abs().max().item())


@pytest.mark.parametrize("shape", [(0, 2, 5, 7), (1, 2, 0, 7), (1, 2, 5, 0)], ids=str)
def test_call_without_work_launches_nothing(device: Device, shape: tuple[int, int, int, int]) -> None:
    b, h, m, n = shape
    q, k, v = (torch.ones(b, h, rows, 64, dtype=torch.bfloat16, requires_grad=True) for rows in (m, n, n))
    out, lse = core.attend(q, k, v, backend="hopper")
    out.sum().backward()
    assert not device.launches and not out.any() and (lse == -torch.inf).all()
    assert not any(t.grad.any() for t in (q, k, v))


@pytest.mark.parametrize(
    "layout", ["expanded heads", "odd offset", "of a longer cache", "shared gradient", "sequence first", "mixed"]
)
def test_rows_that_no_descriptor_can_say_are_copied(device: Device, layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 40, 64, generator=generator).bfloat16() for _ in range(3))
    weight = torch.randn(2, 2, 40, 64, generator=generator)
    if layout == "expanded heads":
        k = k[:, :1].expand(-1, 2, -1, -1)
    if layout == "odd offset":
        q = torch.randn(2 * 40 * 128 + 1, generator=generator).bfloat16()[1:].view(2, 2, 40, 64)
    if layout == "of a longer cache":  # which a descriptor can say: k alone has other rows from one batch to the next
        k = torch.randn(2, 2, 90, 64, generator=generator).bfloat16()[:, :, :40]
    if layout == "sequence first":
        q, k, v = (torch.randn(40, 2, 2, 64, generator=generator).bfloat16().permute(1, 2, 0, 3) for _ in range(3))
    if layout == "mixed":  # as is this
        v = torch.randn(2, 40, 2, 64, generator=generator).bfloat16().transpose(1, 2)
    if layout == "shared gradient":
        weight = weight[:, :1]
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    results = []
    for t, backend in ((leaves, "hopper"), (wide, "reference")):
        out, lse = core.attend(*t, backend=backend)
        results.append(
            (
                out,
                *torch.autograd.grad(
                    (out, lse), t, (weight.to(out.dtype).expand_as(out), torch.ones_like(lse[:1]).expand_as(lse))
                ),
            )
        )
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0.02, atol=0.02)


def test_packed_rows_between_those_of_other_projections_are_not_copied(device: Device) -> None:
    qkv = torch.randn(50, 3, 2, 64).bfloat16()
    starts = torch.tensor([0, 20, 50])
    with mock.patch.object(torch.Tensor, "clone", side_effect=AssertionError("a copy")):
        core.attend(*qkv.unbind(1), cu_seqlens_q=starts, cu_seqlens_k=starts, backend="hopper")


def test_sections_of_heads_change_no_bit(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(2, h, 150, 64).bfloat16() for h in (4, 2, 2))
    found = []
    for section in (hopper.SECTION_BYTES, 1, 240_000):
        monkeypatch.setattr(hopper, "SECTION_BYTES", section)
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out, _ = core.attend(*leaves, causal=True, backend="hopper")
        found.append((out, *torch.autograd.grad(out.sum(), leaves)))
    assert all(map(torch.equal, found[0] * 2, found[1] + found[2]))


def test_length_beyond_the_keys_reads_the_keys_alone(device: Device) -> None:
    """The values of a GPU's lengths are not checked."""
    q = torch.randn(1, 2, 40, 64).bfloat16()
    x, numbers = core.prepare(q, q, q, key_lengths=torch.tensor([40]))
    spec, backend = AttentionSpec.of(x, numbers), registry.BACKENDS["hopper"]
    beyond = x._replace(key_lengths=x.key_lengths + 50)
    for got, want in zip(backend.forward(spec, beyond), backend.forward(spec, x), strict=True):
        assert torch.equal(got, want)


def test_nan_in_keys_that_no_query_sees_reaches_no_gradient(device: Device) -> None:
    """Those keys would be seen by the queries past the end that their block has."""
    q, k, v = torch.randn(1, 2, 40, 64).bfloat16(), *torch.randn(2, 1, 2, 90, 64).bfloat16()
    k[:, :, 40:], v[:, :, 40:] = torch.nan, torch.nan
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, _ = core.attend(*leaves, causal=True, top_left=True, backend="hopper")
    dq, dk, dv = torch.autograd.grad(out.sum(), leaves)
    assert not dq.isnan().any()
    assert not dk[:, :, 40:].any() and not dv[:, :, 40:].any()


def test_wide_heads_have_the_backward_of_triton(device: Device) -> None:
    q, v = torch.ones(1, 1, 5, 64).bfloat16(), torch.ones(1, 1, 5, 136).bfloat16()
    x, numbers = core.prepare(q, q, v)
    with mock.patch.object(TritonBackend, "backward") as backward:
        y = empty_results(q, 136)
        registry.BACKENDS["hopper"].backward(AttentionSpec.of(x, numbers), x, y, y.out, None, False)
    assert backward.called and not device.launches


def test_kernel_that_does_not_compile_is_refused_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = HopperBackend()
    monkeypatch.setattr(HopperBackend, "unavailable", lambda self: None)
    monkeypatch.setattr(HopperBackend, "devices", frozenset({"cpu"}))
    q = torch.ones(1, 1, 5, 64).bfloat16()
    x, numbers = core.prepare(q, q, q)
    spec = AttentionSpec.of(x, numbers)
    with pytest.raises(KernelError, match="cannot be compiled here: ValueError: no"), backend.compiling(spec):
        raise ValueError("no")
    assert "cannot be compiled here" in (backend.refusal(spec) or "")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "odd head size": ({"d": 20}, "head sizes are multiples of 8, got d=20"),
    "odd value size": ({"dv": 20}, "head sizes are multiples of 8, got d=64, dv=20"),
    "scale": ({"scale": -1.0}, "scale is positive, from 1e-30 to 1e.30, got -1.0"),
    "large scale": ({"scale": 2e38}, "scale is positive, from 1e-30 to 1e.30"),
    "dtype": ({"dtype": torch.float32}, "accepts bfloat16, float16, got float32"),
    "head size": ({"d": 264}, "head size is at most 256"),
    "packed head size": ({"d": 136, "starts": True}, "packed sequences have head sizes to 128, got d=136, dv=136"),
    "mask": ({"mask": torch.ones(5, 5, dtype=torch.bool)}, "does not do boolean mask"),
}


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
def test_call_it_does_not_do_is_refused_by_name(device: Device, options: dict[str, Any], words: str) -> None:
    options = dict(options)
    q = torch.ones(1, 1, 5, options.pop("d", 64), dtype=options.pop("dtype", torch.bfloat16))
    v = q.new_ones(*q.shape[:-1], options.pop("dv", q.shape[-1]))
    if options.pop("starts", False):
        q, v = (t[0].transpose(0, 1) for t in (q, v))
        options |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor([0, 5]))
    with pytest.raises(pyattn.UnsupportedError, match=words):
        core.attend(q, q, v, backend="hopper", **options)


def test_gpu_that_is_no_hopper_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.__version__", "3.8.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "B200")
    assert backend_module._shortcoming.__wrapped__() == (
        "needs an NVIDIA GPU of compute capability 9.0 (Hopper), this is B200"
    )


def test_reason_is_that_of_hopper_before_that_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "_shortcoming", lambda: "because")
    assert HopperBackend().unavailable() == "because"


def test_auto_waits_for_a_run_on_a_gpu() -> None:
    assert registry.HOPPER_ALLOWED_BY is None and "hopper" not in registry.AUTOMATIC
