"""Why the Triton backend does not run a call: a sentence in `list_backends()`, in `explain` and in the error."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton

import pyattn
from pyattn import machine
from pyattn.backends import hopper
from pyattn.backends import triton as backend_module
from pyattn.backends.triton import TritonBackend
from pyattn.registry import AUTOMATIC, BACKENDS
from pyattn.spec import AttentionSpec


@pytest.mark.parametrize("version", ["2.3.1", "3.5.1", "3.10.0", "4.0.0"])
def test_triton_that_was_not_tested_is_refused_with_the_torch_that_brings_one(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    assert backend_module._shortcoming.__wrapped__() == (
        f"needs Triton 3.6 to 3.9, which torch 2.10 to 2.15 bring; Triton {version} and torch 2.9.1 are installed"
    )
    assert hopper._shortcoming.__wrapped__() == (
        f"needs Triton 3.6 to 3.8, which torch 2.10 to 2.14 bring; Triton {version} and torch 2.9.1 are installed"
    )


def test_triton_of_torch_2_8_is_refused_and_not_asked_for_what_it_does_not_have(monkeypatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.4.0")
    monkeypatch.delattr(triton, "knobs")
    for backend in (backend_module, hopper):
        assert "Triton 3.4.0" in backend._shortcoming.__wrapped__()


def test_triton_that_is_missing_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    assert backend_module._shortcoming.__wrapped__().startswith("triton cannot be imported")


def test_old_gpu_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    reason = backend_module._shortcoming.__wrapped__()
    assert reason == "needs compute capability 8.0 or newer, Tesla T4 has 7.5"


@pytest.mark.parametrize(
    ("sizes", "fits"),
    [
        ({"m": 2**30 - 129, "n": 1}, True),
        ({"m": 2**30, "n": 1}, False),
        ({"m": 1, "n": 2**30}, False),
        ({"h": 8, "hk": 1, "m": 2**27, "n": 1}, False),
        ({"h": 8, "hk": 8, "m": 2**27, "n": 1}, True),
    ],
    ids=str,
)
def test_rows_beyond_32_bits_are_refused_before_a_kernel_counts_them(
    monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], fits: bool
) -> None:
    monkeypatch.setattr(backend_module, "_shortcoming", lambda: None)
    sizes = {"b": 1, "h": 1, "hk": 1, "d": 1, "dv": 1} | sizes
    spec = AttentionSpec(
        **sizes, dtype=torch.float16, device="cuda", scale=1.0, offset=0, left=None, right=None, softcap=None,
        dropout_p=0.0,
    )  # fmt: skip
    reason = TritonBackend().refusal(spec)
    assert (reason is None) == fits, reason
    assert fits or reason.startswith("counts the queries of a group of heads and their keys to 2^30, got 1,07")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> TritonBackend:
    """A Triton backend that takes CPU tensors, and whose forward does not compile."""
    import pyattn.triton_kernels.flash_fwd as flash_fwd

    def fail(*given: Any) -> None:
        raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")

    backend = TritonBackend()
    monkeypatch.setattr(backend_module, "_shortcoming", lambda: None)
    monkeypatch.setattr(TritonBackend, "devices", frozenset({"cpu"}))
    monkeypatch.setattr(flash_fwd, "flash_fwd", fail)
    monkeypatch.setitem(BACKENDS, "triton", backend)
    return backend


REASON = "its kernel cannot be compiled here: OutOfResources: out of resource: shared memory"


@pytest.mark.parametrize("requires_grad", [False, True])
def test_kernel_that_does_not_compile_is_passed_over_by_auto_alone(broken: TritonBackend, requires_grad: bool) -> None:
    assert (AUTOMATIC[0], AUTOMATIC[-1]) == ("triton", "cpu")
    q, k, v = (torch.randn(1, 2, 40, 16, requires_grad=requires_grad) for _ in range(3))
    out = pyattn.attention(q, k, v)
    assert torch.equal(out, pyattn.attention(q, k, v, backend="cpu"))
    with pytest.raises(pyattn.UnsupportedError, match=f"triton: {REASON}"):
        pyattn.attention(q, k, v, backend="triton")


def test_kernel_that_does_not_compile_is_explained(broken: TritonBackend) -> None:
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    pyattn.attention(q, k, v)
    text = pyattn.explain(q, k, v)
    assert f"triton     {REASON}" in text
    assert "-> cpu" in text
    assert "-> triton" in pyattn.explain(q, k, v, causal=True), "what was not tried is not refused"


def test_kernel_that_does_not_compile_is_the_machines_state(broken: TritonBackend) -> None:
    assert machine.backends()["triton"].startswith(REASON)


def test_errors_of_the_device_are_not_taken_for_the_compilers(broken: TritonBackend, monkeypatch) -> None:
    import pyattn.triton_kernels.flash_fwd as flash_fwd

    def fail(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(flash_fwd, "flash_fwd", fail)
    with pytest.raises(torch.OutOfMemoryError):
        pyattn.attention(*(torch.randn(1, 2, 40, 16) for _ in range(3)))
