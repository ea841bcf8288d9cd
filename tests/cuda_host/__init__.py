"""Runs the CUDA kernels of csrc/cuda on the CPU: the unchanged text, with another hw.cuh, compiled by g++.

Each instantiation becomes a library of its own when it is first launched. Libraries are kept under build/, in a folder
for the hash of all sources, so that a second run compiles nothing.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pyattn import cuda_kernels
from pyattn.backends.cuda import CudaBackend, Gpu
from pyattn.backends.cuda_config import Row

HERE = Path(__file__).parent
BUILD = HERE.parent.parent / "build" / "cuda_host"
# Not contracted, so that products with either operand first round alike, as one instruction does on a GPU.
FLAGS = ("-O1", "-std=c++17", "-shared", "-fPIC", "-march=native", "-ffp-contract=off", "-w")
if "asan" in os.environ.get("LD_PRELOAD", ""):  # as `make sanitize` starts Python
    FLAGS += ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1")
ENTRY = """
#include "kernels.cuh"
using Kernel = {instantiation};
extern "C" const char* launch(const void* args, int bytes, int blocks, int threads, int shared_bytes, unsigned seed) {{
    if (bytes != sizeof(Args)) return "the arguments have another size than Args";
    if (threads != Kernel::THREADS) return "the kernel has another number of threads";
    const auto run = [](const void* a) {{ Kernel::run(*static_cast<const Args*>(a)); }};
    return machine_run(run, args, blocks, threads, shared_bytes, seed);
}}
"""


class Change(NamedTuple):
    """Another text in the place of one that occurs once, in one kernel's sources."""

    kernel: str
    file: str
    old: str
    new: str


class EmulatedCuda(CudaBackend):
    """The whole backend on CPU tensors: what it would launch, the emulator runs.

    Args:
        capability: of the GPU that is pretended.
        seed: draws the order in which warps run.
        change: a mistake to make in one kernel.
    """

    devices = frozenset({"cpu"})

    def __init__(self, capability: int = 80, seed: int = 0, change: Change | None = None) -> None:
        super().__init__()
        self.gpu = Gpu(0, capability, processors=16)
        self.seed = seed
        self.change = change
        self.launched: set[str] = set()

    def unavailable(self) -> None:
        return None

    def gpu_of(self, q: object) -> Gpu:
        return self.gpu

    def launch(self, gpu: Gpu, row: Row, blocks: int, arguments: bytes) -> None:
        self.launched.add(row.instantiation)
        change = self.change
        if change is not None and not row.instantiation.startswith(f"{change.kernel}<"):
            change = None
        kernel = _compiled(_prepared(change), row.instantiation)
        failure = kernel(arguments, len(arguments), blocks, row.threads, row.shared_bytes, self.seed)
        if failure is not None:
            raise AssertionError(f"{row.instantiation}: {failure.decode()}")


@cache
def _machine() -> Path:
    """The library that runs threads."""
    texts = {name: (HERE / name).read_text("utf-8") for name in ("machine.h", "machine.cpp")}
    folder = _folder(texts)
    if not (folder / "machine.so").exists():
        _compile(folder, "machine.so", folder / "machine.cpp")
    return folder / "machine.so"


@cache
def _prepared(change: Change | None) -> Path:
    """A folder with the kernels' sources."""
    sources = dict(cuda_kernels.sources())
    if change is not None:
        text = sources[change.file]
        assert text.count(change.old) == 1, f"{change.file} has {change.old!r} {text.count(change.old)} times"
        sources[change.file] = text.replace(change.old, change.new)
    return _folder(sources | {name: (HERE / name).read_text("utf-8") for name in ("hw.cuh", "machine.h")})


def _folder(texts: dict[str, str]) -> Path:
    """One that holds these files, and what is compiled of them."""
    digest = hashlib.sha256(repr((sorted(texts.items()), FLAGS, ENTRY)).encode()).hexdigest()[:16]
    folder = BUILD / digest
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        if not (folder / name).exists():
            _write(folder / name, text.encode())
    return folder


@cache
def _compiled(folder: Path, instantiation: str) -> ctypes._CFuncPtr:
    name = hashlib.sha256(instantiation.encode()).hexdigest()[:16]
    if not (folder / f"{name}.so").exists():
        _write(folder / f"{name}.cpp", ENTRY.format(instantiation=instantiation).encode())
        _compile(folder, f"{name}.so", folder / f"{name}.cpp", _machine())
    launch = ctypes.CDLL(str(folder / f"{name}.so")).launch
    launch.restype = ctypes.c_char_p
    launch.argtypes = [ctypes.c_char_p, *4 * [ctypes.c_int], ctypes.c_uint]
    return launch


def _compile(folder: Path, library: str, *inputs: Path) -> None:
    """In one step, because several processes may want the same."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        made = Path(own, library)
        command = ["g++", *FLAGS, f"-I{folder}", *map(str, inputs), "-o", str(made)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[:4000]
        os.replace(made, folder / library)


def _write(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)
