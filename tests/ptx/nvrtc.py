"""CUDA C++, compiled by NVRTC to PTX and run in the machine: single kernels, and pyattn's "cuda" on tensors of the CPU.

registry.BACKENDS["machine"] = MachineCuda(80)
pyattn.attention(q, k, v, backend="machine")
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any
from unittest import mock

import torch

from ptx.launch import SHARED_BYTES, tensor_buffers
from ptx.program import Fault, Program, Schedule
from pyattn import cuda_kernels
from pyattn.backends import cuda, nvrtc, nvrtc_compiler
from pyattn.backends.cuda import CudaBackend, Gpu
from pyattn.backends.cuda_config import Row
from pyattn.spec import AttentionSpec, Grads, Inputs, Results

RELEASE = "13.0"  # of CUDA, whose NVRTC compiles


class PtxCompiler(nvrtc_compiler.Compiler):
    """NVRTC without its last step, ptxas: what it compiles is PTX."""

    def options(self, target: int) -> list[str]:
        return [f"--gpu-architecture=compute_{target}", "-std=c++17"]

    def _read(self, what: str, program: Any) -> bytes:
        return super()._read("PTX" if what == "CUBIN" else what, program)


@cache
def compiler() -> PtxCompiler:
    return PtxCompiler(nvrtc_compiler.find(RELEASE).path)


def compiled(source: str, headers: Mapping[str, str], capability: int, threads: int) -> Program:
    """The program of a source's one kernel, for blocks of so many threads."""
    text = compiler().compile(source, headers, capability).code
    program = Program(text.rstrip(b"\0").decode())
    program.kernel.threads = threads  # a launch bound only limits them
    return program


class MachineCuda(CudaBackend):
    """The whole backend on CPU tensors: what it would launch, the machine runs.

    Args:
        capability: of the GPU that is pretended.
    """

    devices = frozenset({"cpu"})

    def __init__(self, capability: int, schedule: Schedule | None = None) -> None:
        super().__init__()
        self.gpu = Gpu(0, capability, processors=3)
        self.schedule = schedule
        self.launched: set[str] = set()
        self._tensors: list[torch.Tensor] = []

    def unavailable(self) -> None:
        return None

    def gpu_of(self, q: torch.Tensor) -> Gpu:
        return self.gpu

    def forward(self, spec: AttentionSpec, x: Inputs) -> Results:
        with mock.patch.object(cuda, "pack", self._pack):
            return super().forward(spec, x)

    def backward(self, *given: Any) -> Grads:
        with mock.patch.object(cuda, "pack", self._pack):
            return super().backward(*given)

    def launch(self, gpu: Gpu, row: Row, blocks: int, arguments: bytes) -> None:
        self.launched.add(row.instantiation)
        if row.shared_bytes > SHARED_BYTES[gpu.capability]:
            raise Fault(f"{row.instantiation} takes {row.shared_bytes} bytes of shared memory")
        program = _kernel(row, gpu.capability)
        buffers = [buffer for t in self._tensors for buffer in tensor_buffers(t)]
        program.run((blocks, 1, 1), program.pack([arguments]), buffers, row.shared_bytes, schedule=self.schedule)

    def _pack(self, *given: Any, **named: Any) -> bytes:
        """`cuda.pack`, and with it the tensors whose addresses a launch is given: all that it may touch."""
        self._tensors = list(_tensors([*given, *named.values()]))
        return _pack(*given, **named)


_pack = cuda.pack


@cache
def _kernel(row: Row, capability: int) -> Program:
    return compiled(nvrtc.entry(row.instantiation), cuda_kernels.sources(), capability, row.threads)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
