"""Triton and Gluon launches, compiled for a GPU that is not there and run in the machine.

    with machine("sm_80") as device:
        device.schedule.seed = 3
        kernel[grid](...)                       # with tensors on the CPU

    with pyattn_on("sm_90"):                    # and pyattn's "triton" and "hopper" take tensors on the CPU
        pyattn.attention(q, k, v, backend="hopper")

Kernels are compiled once: Triton keeps what it compiles on disk, here in a folder of its own, because the last step,
ptxas, is left out, and a GPU that found its work would find no machine code in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from ptx.program import Buffer, Counts, Fault, Program, Schedule, cache_folder
from ptx.tensor_map import encode

# That one CTA may have, by compute capability.
SHARED_BYTES = {75: 64 * 1024, 80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class Launch:
    """One launch that was run."""

    kernel: str
    program: Program
    counts: Counts | None


@dataclass
class Device:
    """How launches are run; may be changed between them."""

    capability: int
    schedule: Schedule = field(default_factory=Schedule)
    change: Callable[[str, str], str] | None = None  # (kernel's name, its PTX) -> the PTX that is run
    launches: list[Launch] = field(default_factory=list)

    def launch(self, kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any], grid: Any) -> None:
        """What Triton does for `kernel[grid](*args, **kwargs)`."""
        compiled, bound, signature = _compile(kernel, args, kwargs, self.capability)
        text = compiled.asm["ptx"]
        program = _program(self.change(kernel.__name__, text) if self.change else text)
        shared = compiled.metadata.shared
        if shared > SHARED_BYTES[self.capability] or compiled.metadata.global_scratch_size:
            raise Fault(f"{kernel.__name__} takes {shared} bytes of shared memory")
        x, y, z = (*map(int, grid(bound) if callable(grid) else grid), 1, 1)[:3]
        values, buffers = _given(compiled, bound, signature)
        values += [0] * (len(program.parameters) - len(values))  # Triton's scratch memories, which nobody uses
        counts = program.run((x, y, z), program.pack(values), buffers, shared, schedule=self.schedule)
        self.launches.append(Launch(kernel.__name__, program, counts))


_compiled: dict[Any, tuple[Any, dict[str, Any]]] = {}


def _compile(
    kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any], capability: int
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(what Triton compiled, bound arguments, signature), by the code that Triton itself launches with."""
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    key = kernel.cache_key, str(specialization), str(options), capability
    if key not in _compiled:
        parsed, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
        kind = GluonASTSource if kernel.is_gluon() else ASTSource
        source = kind(kernel, signature, constants, attributes)
        with mock.patch.object(type(backend), "make_cubin", lambda *_: b""):
            compiled = triton.compile(source, target=target, options=parsed.__dict__)
        _compiled[key] = compiled, signature
    compiled, signature = _compiled[key]
    return compiled, bound, signature


@cache
def _program(text: str) -> Program:
    return Program(text)


def _given(compiled: Any, bound: dict[str, Any], signature: dict[str, Any]) -> tuple[list[Any], list[Buffer]]:
    """Parameters of the compiled kernel, and the memory that it may touch: the elements of its tensors."""
    values: list[Any] = []
    buffers: list[Buffer] = []
    maps = iter(compiled.metadata.tensordesc_meta or [])
    for name, kind in signature.items():
        value = bound[name]
        if kind == "constexpr":
            continue
        if isinstance(kind, str) and kind.startswith("tensordesc"):
            values += [_tensor_map(value, next(maps)), *value.shape, *value.strides]
            buffers += tensor_buffers(value.base)
        elif isinstance(value, torch.Tensor):
            values.append(value.data_ptr())
            buffers += tensor_buffers(value)
        else:
            values.append(value)
    return values, buffers


def tensor_buffers(t: torch.Tensor) -> list[Buffer]:
    storage = t.untyped_storage()
    if not storage.nbytes():
        return []
    begin, item = storage.data_ptr(), t.element_size()
    sizes, strides = (t.shape, t.stride()) if t.dim() else ((1,), (1,))
    return [Buffer(begin, begin + storage.nbytes(), t.data_ptr(), tuple(sizes), tuple(item * s for s in strides), item)]


def _tensor_map(descriptor: Any, meta: dict[str, Any]) -> bytes:
    if descriptor.padding != "zero":
        raise Fault("what lies outside of a tensor is not zero")
    given = descriptor.shape, descriptor.strides, meta["block_size"]
    shape, strides, box = ([int(n) for n in reversed(sizes)] for sizes in given)
    swizzle = (0, 32, 64, 128)[meta["swizzle"]]
    return encode(descriptor.base.data_ptr(), shape, strides, box, descriptor.base.element_size(), swizzle)


@contextmanager
def machine(chip: str, **options: Any) -> Iterator[Device]:
    """Every Triton launch inside is compiled for `chip`, "sm_80", and run in the machine. options: fields of Device."""
    device = Device(int(chip.removeprefix("sm_").removesuffix("a")), **options)

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        device.launch(self, args, kwargs, grid)

    with (
        mock.patch.object(triton.knobs.cache, "dir", str(cache_folder("triton"))),
        mock.patch.object(JITFunction, "run", run),
    ):
        yield device


@contextmanager
def pyattn_on(chip: str, processors: int = 3, **options: Any) -> Iterator[Device]:
    """`machine`, with pyattn's GPU backends taking tensors on the CPU as if they lay on the chip.

    processors: that the chip is said to have, which is how many programs of a persistent kernel there are.
    """
    from pyattn import backends
    from pyattn.backends import hopper, triton
    from pyattn.triton_kernels import config

    with ExitStack() as stack:
        put = stack.enter_context
        device = put(machine(chip, **options))
        architecture = "ampere" if device.capability < 90 else "hopper"
        # What it remembers of the backends is of other devices.
        put(mock.patch.object(backends, "_undeclared", backends._undeclared.__wrapped__))
        for module in (triton, hopper):
            put(mock.patch.object(module, "_shortcoming", lambda: None))
        for backend in (triton.TritonBackend, hopper.HopperBackend):
            put(mock.patch.object(backend, "unavailable", lambda self: None))
            put(mock.patch.object(backend, "devices", frozenset({"cpu"})))
            # A fault is the machine's to tell, not a kernel that does not compile.
            put(mock.patch.object(backend, "compiling", lambda self, spec: nullcontext()))
        put(mock.patch.object(config, "processors", lambda device: processors))
        put(mock.patch.object(config, "architecture_of", lambda device: architecture))
        yield device
