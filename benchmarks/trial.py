"""Candidates for launch sizes on the GPU: compiled side by side, held against the definition, timed in turns."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.pool import Pool

import torch

import pyattn
from pyattn.triton_kernels import config
from pyattn.triton_kernels.config import Config

from .cases import make_inputs
from .gate import Gate
from .peers import Pyattn, bound
from .search import KERNELS, Cell
from .timing import interleaved

_DEVICE, _BACKEND = "cuda", "triton"
# That one chunk of candidates may take to compile, the start of the processes included.
_COMPILE_SECONDS = 90.0
_TIMING_SECONDS = 4.0


@contextmanager
def substituted(kernel: str, sizes: Config) -> Iterator[None]:
    """Within the `with` block every launch of `kernel` has these sizes."""
    choose = config.choose
    config.choose = lambda name, *rest: sizes if name == kernel else choose(name, *rest)
    try:
        yield
    finally:
        config.choose = choose


class GpuTrial:
    """`search.Trial` of one cell. The kernels beside the one that is sought run with their present sizes."""

    def __init__(self, cell: Cell, pool: Pool) -> None:
        """pool: of processes that compile."""
        self._cell, self._pool = cell, pool
        self._direction = KERNELS[cell.kernel]
        inputs = [(case, make_inputs(case, _DEVICE)) for case in cell.cases()]
        self._gates = [Gate(case, x) for case, x in inputs]
        with pyattn.use_backend(_BACKEND):
            self._calls = [bound(Pyattn(), case, self._direction, x) for case, x in inputs]

    def compile(self, chunk: Sequence[Config]) -> list[bool]:
        jobs = [self._pool.apply_async(_compile, (self._cell, sizes)) for sizes in chunk]
        end = time.monotonic() + _COMPILE_SECONDS
        for job in jobs:
            job.wait(max(0.0, end - time.monotonic()))
        return [job.ready() for job in jobs]

    def problem(self, sizes: Config) -> str | None:
        try:
            results = self._run(sizes)
        except Exception as error:  # whatever the compiler or the launch raises
            return type(error).__name__
        problems = (gate.problem(self._direction, of_one) for gate, of_one in zip(self._gates, results, strict=True))
        return "wrong" if any(problems) else None

    def time(self, chunk: Sequence[Config], rounds: int) -> dict[Config, float]:
        calls = {sizes: partial(self._run, sizes) for sizes in chunk}
        timings = interleaved(calls, _DEVICE, _TIMING_SECONDS, min_rounds=3, max_rounds=rounds)
        return {sizes: timing.p50_ms for sizes, timing in timings.items()}

    def _run(self, sizes: Config) -> list[tuple[torch.Tensor, ...]]:
        with pyattn.use_backend(_BACKEND), substituted(self._cell.kernel, sizes):
            return [call() for call in self._calls]


def _compile(cell: Cell, sizes: Config) -> None:
    """In a process of its own: a small call, which leaves the compiled kernels in Triton's cache on disk."""
    with suppress(Exception), pyattn.use_backend(_BACKEND), substituted(cell.kernel, sizes):
        for case in cell.cases(small=True):
            bound(Pyattn(), case, KERNELS[cell.kernel], make_inputs(case, _DEVICE))()
