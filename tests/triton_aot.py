"""Compiles the Triton kernels ahead of time, without a GPU, exactly as a launch would, and reads what they use."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from pyattn.spec import band_distances
from pyattn.triton_kernels import config
from pyattn.triton_kernels.additive_bwd import additive_bwd
from pyattn.triton_kernels.additive_fwd import additive_fwd
from pyattn.triton_kernels.additive_step import additive_step_bwd
from pyattn.triton_kernels.decode import decode
from pyattn.triton_kernels.flash_bwd import flash_bwd
from pyattn.triton_kernels.flash_fwd import flash_fwd
from pyattn.triton_kernels.launch import Call
from pyattn.triton_kernels.relative import Relative


@dataclass(frozen=True)
class Chip:
    target: GPUTarget
    architecture: str  # as `config` names it
    shared: int  # bytes of shared memory that one block may have


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), "ampere", 163 * 1024),
    "sm_89": Chip(GPUTarget("cuda", 89, 32), "ada", 99 * 1024),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), "hopper", 227 * 1024),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), "hopper", 227 * 1024),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), "cdna", 64 * 1024),
}


@dataclass(frozen=True)
class Launch:
    """One kernel launch, caught before it reaches a device."""

    kernel: JITFunction
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def bind(self, target: GPUTarget) -> tuple[dict[str, Any], list[Any], dict[str, Any]]:
        """Bound arguments, specialization and options, by the code that Triton itself launches with."""
        backend = make_backend(target)
        binder = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        return binder(*self.args, **self.kwargs)

    def key(self, target: GPUTarget) -> str:
        """What decides whether a launch recompiles."""
        _, specialization, options = self.bind(target)
        return f"{self.kernel.__name__} {specialization} {options}"


@dataclass(frozen=True)
class Job:
    """One forward and backward to compile for one chip."""

    chip: str
    dtype: torch.dtype
    options: dict[str, Any]  # of attention_launches

    @property
    def id(self) -> str:
        options = (name if value is True else f"{name}{value}" for name, value in self.options.items())
        return "-".join([self.chip, str(self.dtype).removeprefix("torch."), *options])

    @property
    def reads_whole_rows(self) -> bool:
        """Whether all it reads of half-precision tensors is rows whose length is a multiple of 16 bytes.

        Steps of additive scores read queries and weights a row at a time, one number for each thread.
        """
        if self.options.keys() >= {"additive", "decoding"}:
            return False
        return self.dtype.itemsize == 2 and not {"dv", "bias"} & self.options.keys()


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes."""

    kernel: str
    block: int  # rows of its longer tile
    registers: int
    spilled: int  # bytes on NVIDIA, registers on AMD
    shared: int  # bytes
    narrow_loads: int  # instructions that read 2 bytes of global memory per thread
    wgmma: int  # instructions that multiply matrices from shared memory, a warpgroup at a time: Hopper's


def record(run: Callable[[], None], architecture: str) -> list[Launch]:
    """The launches that `run` makes, with the launch sizes of `architecture`."""
    caught: list[Launch] = []

    def catch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        caught.append(Launch(kernel, args, kwargs))

    chip = mock.patch.object(config, "architecture_of", lambda _: architecture)
    with chip, mock.patch.object(JITFunction, "run", catch):
        run()
    return caught


def attention_launches(
    architecture: str,
    dtype: torch.dtype = torch.float16,
    b: int = 2,
    h: int = 4,
    hk: int = 4,
    m: int = 1024,
    n: int = 1024,
    d: int = 64,
    dv: int | None = None,
    heads_inside: bool = False,
    mask: bool = False,
    bias: str | None = None,
    key_lengths: bool = False,
    segments: bool = False,
    alibi: bool = False,
    sinks: bool = False,
    packed: int | None = None,
    decoding: bool = False,
    additive: bool = False,
    relative: int | None = None,
    ranks: bool = False,
    row_windows: bool = False,
    page_size: int | None = None,
    **call: Any,
) -> list[Launch]:
    """The launches of one forward and backward, or of one decoding step, with a backward where scores are additive.

    Tensors are on the meta device: they have strides but no memory.

    bias: its shape's pattern, as in `pyattn.testing.Case`. packed: how many sequences lie in the one batch entry.
    relative: the size e of a relative term. page_size: of a paged cache, which is a decoding step's.
    """
    empty = partial(torch.empty, device="meta")

    def tensor(heads: int, rows: int, size: int) -> torch.Tensor:
        if heads_inside:
            return empty(b, rows, heads, size, dtype=dtype).transpose(1, 2)
        return empty(b, heads, rows, size, dtype=dtype)

    dv = dv or d
    q, k, v, out = tensor(h, m, d), tensor(hk, n, d), tensor(hk, n, dv), tensor(h, m, dv)
    lse = empty(b, h, m)
    if mask:
        call["mask"] = empty(b, 1, m, n, dtype=torch.bool)
    if bias:
        call["bias"] = empty([{"b": b, "h": h, "m": m, "n": n, "1": 1}[name] for name in bias], dtype=dtype)
    if key_lengths:
        call["key_lengths"] = empty(b, dtype=torch.int32)
    if segments:
        call |= {"q_segments": empty(b, m, dtype=torch.int32), "k_segments": empty(b, n, dtype=torch.int32)}
    if ranks:
        call |= {"q_ranks": empty(b, m, dtype=torch.int32), "k_ranks": empty(b, n, dtype=torch.int32)}
    if row_windows:
        call |= {"row_first": empty(b, m, dtype=torch.int32), "row_stop": empty(b, m, dtype=torch.int32)}
    if relative is not None:
        operands = tensor(h, m, relative), empty(1, h, m + n - 1, relative, dtype=dtype)
        band = band_distances(m, n, n - m, call.get("left"), call.get("right"))
        call["relative"] = Relative.of(*operands, 1 - m, *band)
    if alibi:
        call["alibi_slopes"] = empty(b if packed is None else packed, h)
    if sinks:
        call["sinks"] = empty(h)
    if packed is not None:
        call |= {name: empty(packed + 1, dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    if page_size is not None:
        pages = triton.cdiv(n, page_size)
        k, v = (empty(b * pages, page_size, hk, size, dtype=dtype).transpose(1, 2) for size in (d, dv))
        call |= {"block_table": empty(b, pages, dtype=torch.int32), "offset": None}
    if "dropout_p" in call:
        call["seed"] = empty((), dtype=torch.int64)
    arguments = Call(**({"scale": d**-0.5, "offset": n - m} | call))

    def run() -> None:
        weights = (empty(h, d, dtype=dtype),) if additive else ()
        forward, backward = (additive_fwd, additive_bwd) if additive else (flash_fwd, flash_bwd)
        if decoding:
            decode(q, k, v, out, lse, lse, lse, arguments, *weights)
            if not additive:
                return
            backward = additive_step_bwd
        else:
            forward(q, k, v, *weights, out, lse, lse, lse, arguments)
        d_out, d_lse = torch.empty_like(out), torch.empty_like(lse)
        gradients = [None if t is None else torch.empty_like(t) for t in (q, k, v, *weights, arguments.bias)]
        if not additive:
            gradients.append(arguments.relative)
        backward(q, k, v, *weights, out, lse, lse, d_out, d_lse, *gradients, arguments)

    return record(run, architecture)


def compile_job(job: Job, cache: str) -> list[Usage]:
    """Compiles every kernel of a job, or takes it from the folder `cache`."""
    triton.knobs.cache.dir = cache
    chip = CHIPS[job.chip]
    return [compile_launch(x, chip.target) for x in attention_launches(chip.architecture, job.dtype, **job.options)]


def compile_launch(launch: Launch, target: GPUTarget) -> Usage:
    """Compiles for `target` and reads registers, spills and shared memory from the machine code."""
    bound, specialization, options = launch.bind(target)
    backend = make_backend(target)
    options, signature, constants, attributes = launch.kernel._pack_args(
        backend, launch.kwargs, bound, specialization, options
    )
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    read = _nvidia_usage if target.backend == "cuda" else _amd_usage
    registers, spilled, narrow_loads, wgmma = read(compiled.asm)
    block = max(launch.kwargs.get(name, 0) for name in ("BLOCK_M", "BLOCK_N"))
    return Usage(launch.kernel.__name__, block, registers, spilled, compiled.metadata.shared, narrow_loads, wgmma)


def _nvidia_usage(assembly: dict[str, Any]) -> tuple[int, int, int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    text = report.stdout + report.stderr
    stack, local = (int(re.search(rf"{word}:(\d+)", text)[1]) for word in ("STACK", "LOCAL"))
    narrow = len(re.findall(r"ld\.global\S*\.[bu]16 ", assembly["ptx"]))
    return int(re.search(r"REG:(\d+)", text)[1]), stack + local, narrow, assembly["ptx"].count("wgmma.mma_async")


def _amd_usage(assembly: dict[str, Any]) -> tuple[int, int, int, int]:
    text = assembly["amdgcn"]
    spilled = sum(int(re.search(rf"\.{kind}gpr_spill_count: +(\d+)", text)[1]) for kind in "v")
    narrow = len(re.findall(r"(?:global|buffer)_load_(?:u?short|short_d16)", text))
    return int(re.search(r"\.vgpr_count: +(\d+)", text)[1]), spilled, narrow, 0
