"""What happens on the host before a Triton kernel starts, with the launch itself left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.runtime.jit import JITFunction

from pyattn import core
from pyattn.registry import BACKENDS
from pyattn.spec import AttentionSpec
from pyattn.triton_kernels import launch

BACKEND = BACKENDS["triton"]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that would have been launched. Tensors are on the CPU."""
    names: list[str] = []
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *given, grid, warmup, **named: names.append(kernel.__name__))
    return names


def test_sizes_on_the_host_are_those_that_triton_computes() -> None:
    sizes = [*range(1, 258), 2**20 - 1, 2**20, 2**20 + 1]
    assert [launch.power_of_2(size) for size in sizes] == [triton.next_power_of_2(size) for size in sizes]
    assert [launch.parts(size, 64) for size in sizes] == [triton.cdiv(size, 64) for size in sizes]


def test_no_launch_computes_its_sizes_by_tritons_slow_functions(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> int:
        raise AssertionError("a constexpr function takes microseconds on the host")

    monkeypatch.setattr(triton, "cdiv", fail)
    monkeypatch.setattr(triton, "next_power_of_2", fail)
    for m, options in ((100, {"bias": torch.zeros(4, 1, 90)}), (1, {})):
        q, k, v = (torch.zeros(1, 4, rows, 40) for rows in (m, 90, 90))
        x, numbers = core.prepare(q, k, v, **options)
        spec = AttentionSpec.of(x, numbers)
        y = BACKEND.forward(spec, x)
        BACKEND.backward(spec, x, y, y.out, None, True)
    of_backward = ["_flash_bwd_dq_kernel", "_flash_bwd_dkdv_kernel"]
    with_bias = ["_flash_fwd_kernel", *of_backward, "_flash_bwd_dbias_kernel"]
    assert launched == [*with_bias, "_decode_kernel", "_decode_join_kernel", *of_backward]
