"""NVRTC by ctypes: where its library is, and CUDA C++ to machine code with it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyattn.backends import KernelError

_BUILTINS = "nvrtc-builtins64_*.dll" if sys.platform == "win32" else "libnvrtc-builtins.so*"

_SIGNATURES: dict[str, list[Any]] = {
    "nvrtcVersion": [POINTER(c_int), POINTER(c_int)],
    "nvrtcGetNumSupportedArchs": [POINTER(c_int)],
    "nvrtcGetSupportedArchs": [POINTER(c_int)],
    "nvrtcGetErrorString": [c_int],
    # program; its source and name; the number of headers, their texts and names
    "nvrtcCreateProgram": [POINTER(c_void_p), c_char_p, c_char_p, c_int, POINTER(c_char_p), POINTER(c_char_p)],
    "nvrtcCompileProgram": [c_void_p, c_int, POINTER(c_char_p)],
    "nvrtcGetProgramLogSize": [c_void_p, POINTER(c_size_t)],
    "nvrtcGetProgramLog": [c_void_p, c_char_p],
    "nvrtcGetCUBINSize": [c_void_p, POINTER(c_size_t)],
    "nvrtcGetCUBIN": [c_void_p, c_char_p],
    "nvrtcDestroyProgram": [POINTER(c_void_p)],
}


class NvrtcError(KernelError):
    """A kernel cannot be compiled here; one sentence that says why."""


class Compiled(NamedTuple):
    code: bytes  # a cubin
    log: str  # what ptxas says about registers, spills and shared memory


class Compiler:
    """One NVRTC library."""

    def __init__(self, path: Path) -> None:
        """
        path: the library's, or a name that the system knows.

        Raises:
            OSError: it cannot be loaded.
        """
        self.path = path
        # Of its own accord NVRTC 13.0 looks for its other half only where the system looks.
        for builtins in path.parent.glob(_BUILTINS) if path.is_absolute() else ():
            ctypes.CDLL(str(builtins))
        self._library = ctypes.CDLL(str(path))
        for name, arguments in _SIGNATURES.items():
            getattr(self._library, name).argtypes = arguments
        self._library.nvrtcGetErrorString.restype = c_char_p
        self.version = self._version()
        self.targets = self._targets()

    @property
    def capabilities(self) -> str:
        """Those of the GPUs that it compiles for, for the user."""
        return ", ".join(f"{target // 10}.{target % 10}" for target in self.targets)

    def options(self, target: int) -> list[str]:
        options = [f"--gpu-architecture=sm_{target}", "-std=c++17", "--ptxas-options=-v"]
        if self.version >= (12, 9):
            options.append("--no-cache")  # NVRTC's own on the disk; what comes from there comes without a log
        return options

    def compile(self, source: str, headers: Mapping[str, str], target: int) -> Compiled:
        """Compiles for compute capability `target`, 75 for 7.5.

        In a thread of its own, because NVRTC before 12.6.2 leaves the thread that calls it with another locale.

        Raises:
            NvrtcError
        """
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(self._compile, source, headers, target).result()

    def _compile(self, source: str, headers: Mapping[str, str], target: int) -> Compiled:
        program, options = c_void_p(), self.options(target)
        given = len(headers), _strings(headers.values()), _strings(headers)
        self._check(self._library.nvrtcCreateProgram(byref(program), source.encode(), b"kernel.cu", *given))
        try:
            status = self._library.nvrtcCompileProgram(program, len(options), _strings(options))
            log = self._read("ProgramLog", program).rstrip(b"\0").decode("utf-8", "replace")
            self._check(status, log)
            return Compiled(self._read("CUBIN", program), log)
        finally:
            self._library.nvrtcDestroyProgram(byref(program))

    def _read(self, what: str, program: c_void_p) -> bytes:
        size = c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _check(self, status: int, log: str = "") -> None:
        """Raises NvrtcError with the log's first error, or with NVRTC's name for the failure."""
        if status != 0:
            lines = [line.strip() for line in log.splitlines() if line.strip()]
            errors = [line for line in lines if "error" in line] or lines
            reason = errors[0] if errors else self._library.nvrtcGetErrorString(status).decode()
            raise NvrtcError(f"NVRTC {dotted(self.version)} cannot compile its kernel: {reason}")

    def _version(self) -> tuple[int, int]:
        major, minor = c_int(), c_int()
        self._library.nvrtcVersion(byref(major), byref(minor))
        return major.value, minor.value

    def _targets(self) -> tuple[int, ...]:
        count = c_int()
        self._library.nvrtcGetNumSupportedArchs(byref(count))
        targets = (c_int * count.value)()
        self._library.nvrtcGetSupportedArchs(targets)
        return tuple(targets)


def find(release: str) -> Compiler:
    """NVRTC of a CUDA release, "12.8", or of another one with the same major version.

    Raises:
        NvrtcError
    """
    name, failures = library_name(release), []
    for path in [*filter(Path.exists, _places(release, name)), Path(name)]:
        try:
            return Compiler(path)
        except (OSError, AttributeError) as error:  # the latter is of a library that lacks a function
            failures.append(str(error))
    package = "nvidia-cuda-nvrtc" if _major(release) >= 13 else f"nvidia-cuda-nvrtc-cu{_major(release)}"
    raise NvrtcError(f"NVRTC cannot be loaded ({failures[0]}); pip install {package} brings it")


def library_name(release: str) -> str:
    """What NVRTC's library is called. It names a major version, or the first release with the same interface."""
    major = _major(release)
    if sys.platform == "win32":
        return "nvrtc64_112_0.dll" if major == 11 else f"nvrtc64_{major}0_0.dll"
    return "libnvrtc.so.11.2" if major == 11 else f"libnvrtc.so.{major}"


def _places(release: str, name: str) -> Iterator[Path]:
    """Where the library may be: in pip's packages, in torch's own folder, in conda's environment, in the toolkit."""
    packages = find_spec("nvidia")
    for packaged in (packages and packages.submodule_search_locations) or ():
        for folder in ("cuda_nvrtc", f"cu{_major(release)}"):
            for libraries in ("lib", "bin", "bin/x86_64"):
                yield Path(packaged, folder, libraries, name)
    yield Path(torch.__file__).parent / "lib" / name
    yield Path(sys.prefix, "lib", name)
    yield Path(sys.prefix, "Library", "bin", name)
    for toolkit in (f"cuda-{release}", "cuda"):
        yield Path("/usr/local", toolkit, "lib64", name)


def _major(release: str) -> int:
    return int(release.partition(".")[0])


def _strings(texts: Iterable[str]) -> ctypes.Array[c_char_p]:
    encoded = [text.encode() for text in texts]
    return (c_char_p * len(encoded))(*encoded)


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
