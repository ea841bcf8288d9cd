"""A kernel's text made ready for the core, the core's library, and runs of the one in the other."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ptx import arithmetic, atomics, control, conversions, copies, matrices, memory, tcgen05, wgmma
from ptx.assembler import PREDICATE, SPECIAL, assemble
from ptx.text import parse

FAMILIES = (
    arithmetic,
    atomics,
    control,
    conversions,
    copies,
    matrices,
    memory,
    tcgen05,
    wgmma,
)  # which register instructions

_CORE = Path(__file__).parent / "core"
# Contraction would round fewer times. A register is read as integers, floats and halves, which strict aliasing forbids.
_OPTIONS = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC"]
_ERROR_BYTES = 4096
_MAP_ALIGN = 128  # of parameters: tensor maps among them must lie on multiples of 64 bytes


class Fault(Exception):
    """What the kernel did wrong, and where."""


class Check(IntFlag):
    """What is checked besides bounds, alignment and barriers, which always are."""

    RACE = 1  # in shared memory, between warps
    INIT = 2  # reads of shared memory that was never written
    WGMMA = 4  # registers that a wgmma or tcgen05.ld in flight holds, and fences before accumulators
    CP_ASYNC_PROXY = 8  # a proxy fence between cp.async and wgmma: the ISA asks for it, Triton and CUTLASS leave it out
    GLOBAL = 16  # races between CTAs in global memory
    WGMMA_A = 32  # wgmma.fence before registers that are multiplied: LLVM moves their writes behind it; ptxas copes
    LANES = 64  # races between lanes of one warp in shared memory
    TENSOR_FENCES = 128  # tcgen05.fence around what orders threads: the ISA asks for it, Triton leaves it out


USUAL = Check.RACE | Check.INIT | Check.WGMMA | Check.GLOBAL | Check.LANES


class Landing(IntEnum):
    """When asynchronous work takes effect."""

    LATE = 0  # when it is waited for
    EARLY = 1  # when it is issued
    EITHER = 2  # as the seed has it


@dataclass
class Schedule:
    """How a kernel is run. Every choice that hardware would be free in is drawn by the seed."""

    seed: int = 0
    checks: Check = USUAL
    landing: Landing = Landing.EITHER
    quantum: int = 400  # instructions that a warp runs at most before another has its turn
    truncate: bool = False  # tensor cores' sums toward zero instead of to the nearest
    limit: int = 1 << 40  # instructions of a CTA; more are taken for an endless loop
    count: bool = False  # whether `Program.run` returns `Counts`


class Buffer(NamedTuple):
    """Memory that a kernel may touch: the elements of one view of one storage, or with no sizes all of it."""

    begin: int
    end: int
    first: int = 0  # the address of element [0, ..., 0]
    sizes: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()  # in bytes
    item: int = 1  # bytes of an element


@dataclass(frozen=True)
class Counts:
    """How often each instruction ran, and what its accesses took."""

    executed: np.ndarray  # warps that ran it
    transactions: np.ndarray  # of shared memory; of global memory, sectors
    ideal: np.ndarray  # that the same bytes would take without conflicts or waste


class Program:
    """One kernel."""

    def __init__(self, text: str) -> None:
        self.kernel, ops = parse(text), _ops()
        self.code = code = assemble(self.kernel, ops)
        self.parameters = tuple(self.kernel.parameters.values())
        self._rows = np.array(code.instructions, np.int32)
        self._arguments = np.array(code.arguments or [0], np.int32)
        self._special = np.array([code.special.get(name, -1) for name in SPECIAL], np.int32)
        self._constants = np.array(
            [(place, _width(bits), _signed(value)) for (value, bits), place in code.constants.items()] or [(0, 0, 0)],
            np.int64,
        )
        self._granule = memory.granule(code.instructions, ops["LD"], ops["ST"])
        self._asynchronous = any(s.opcode.startswith(("wgmma", "tcgen05")) for s in code.statements)

    def pack(self, values: Sequence[int | float | bytes]) -> bytes:
        """The parameters as a launch lays them out."""
        out = bytearray(self.kernel.parameter_bytes)
        for parameter, value in zip(self.parameters, values, strict=True):
            if isinstance(value, bytes):
                data = value
            elif parameter.kind == "f32":
                data = struct.pack("<f", value)
            else:
                data = (int(value) & (1 << 8 * parameter.size) - 1).to_bytes(parameter.size, "little")
            if len(data) != parameter.size:
                raise ValueError(f"parameter of {parameter.size} bytes, got {len(data)}")
            out[parameter.offset : parameter.offset + parameter.size] = data
        return bytes(out)

    def run(
        self,
        grid: tuple[int, int, int],
        parameters: bytes,
        buffers: Sequence[Buffer] = (),
        shared: int = 0,
        schedule: Schedule | None = None,
    ) -> Counts | None:
        """Runs every CTA, or raises Fault.

        Args:
            parameters: as `pack` lays them out.
            buffers: the memory that the kernel may touch.
            shared: bytes of shared memory, beyond what the text declares.
        """
        schedule = schedule or Schedule()
        core, pointer = _core(), _pointer
        given = _aligned(parameters)
        constants = self._constants_at(given.ctypes.data)
        handle = ctypes.c_void_p(
            core.ptx_new(
                pointer(self._rows), len(self._rows), pointer(self._arguments), len(self._arguments),
                pointer(constants), len(constants), self.code.words, max(self.code.predicates, 1), self._granule,
                pointer(self._special), int(self._asynchronous),
            )
        )  # fmt: skip
        try:
            core.ptx_local(handle, self.code.local_bytes)
            size, records = np.array(grid, np.int32), _records(buffers)
            s, registers = schedule, self.kernel.registers
            options = np.array([s.seed, s.checks, s.count, s.quantum, s.truncate, registers, s.landing, s.limit])
            error = ctypes.create_string_buffer(_ERROR_BYTES)
            failed = core.ptx_run(
                handle, pointer(size), self.kernel.threads, shared + self.code.shared_bytes, pointer(given),
                len(parameters), pointer(records), len(buffers), pointer(options), error, _ERROR_BYTES,
            )  # fmt: skip
            if failed:
                raise Fault(self._explain(error.value.decode()))
            return self._counts(core, handle) if schedule.count else None
        finally:
            core.ptx_free(handle)

    def _constants_at(self, parameters: int) -> np.ndarray:
        """Constants, with the addresses of parameters."""
        addresses = [(place, 8, parameters + offset) for offset, place in self.code.parameter_addresses.items()]
        return np.concatenate([self._constants, np.array(addresses, np.int64).reshape(-1, 3)])

    def _counts(self, core: ctypes.CDLL, handle: ctypes.c_void_p) -> Counts:
        executed, transactions, ideal = (np.zeros(len(self._rows), np.uint64) for _ in range(3))
        totals = np.zeros(2, np.uint64)
        core.ptx_stats(handle, *map(_pointer, (executed, transactions, ideal, totals)))
        return Counts(executed, transactions, ideal)

    def _explain(self, error: str) -> str:
        """The core's error with the lines of the text in the place of its numbers of instructions."""

        def place(match: re.Match[str]) -> str:
            number = int(match[1])
            if number < 0:
                return "the end of the kernel"
            s = self.code.statements[number]
            return f"line {s.line} [{s.location}] `{s.text[:100]}`"

        where, _, what = error.partition("|")
        return re.sub(r"@(-?\d+)", place, what) + "\n  at " + re.sub(r"@(-?\d+)", place, where)


def _width(bits: int) -> int:
    """Of a constant, as the core is told: 0 of a predicate, else bytes of its place."""
    return 0 if bits == PREDICATE else 8 if bits == 64 else 4


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _aligned(parameters: bytes) -> np.ndarray:
    store = np.zeros(len(parameters) + 2 * _MAP_ALIGN, np.uint8)
    start = -store.ctypes.data % _MAP_ALIGN
    store[start : start + len(parameters)] = np.frombuffer(parameters, np.uint8)
    return store[start : start + len(parameters) + 1]


def _records(buffers: Sequence[Buffer]) -> np.ndarray:
    """As the core takes them: begin, end, first, rank, 5 sizes, 5 strides, bytes of an element."""
    records = np.zeros((max(len(buffers), 1), 15), np.int64)
    for record, buffer in zip(records, buffers, strict=False):
        rank = len(buffer.sizes)
        record[:4] = buffer.begin, buffer.end, buffer.first, rank
        record[4 : 4 + rank], record[9 : 9 + rank], record[14] = buffer.sizes, buffer.strides, buffer.item
    return records


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def cache_folder(name: str) -> Path:
    """A folder that outlives a run of the tests."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "pyattn-tests" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@cache
def _core() -> ctypes.CDLL:
    """The machine's library, built where no other process has built it from the same sources."""
    files = sorted([*_CORE.glob("*.h"), *_CORE.glob("*.cpp")])
    digest = hashlib.sha256(" ".join(_OPTIONS).encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    library = cache_folder("core") / f"{digest.hexdigest()[:20]}.so"
    if not library.exists():
        _build(library, [file for file in files if file.suffix == ".cpp"])
    core = ctypes.CDLL(str(library))
    core.ptx_ops.restype = ctypes.c_char_p
    core.ptx_new.restype = ctypes.c_void_p
    core.ptx_free.argtypes = [ctypes.c_void_p]
    return core


def _build(library: Path, sources: list[Path]) -> None:
    """One process builds while the others wait; made elsewhere and renamed, so that nobody finds a part of it."""
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                made = Path(folder) / library.name
                subprocess.run(["g++", *_OPTIONS, "-o", made, *sources], check=True)
                made.rename(library)


@cache
def _ops() -> dict[str, int]:
    """The core's instructions, by name."""
    return {name: number for number, name in enumerate(_core().ptx_ops().decode().split())}
