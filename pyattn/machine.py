"""What `pyattn info` says about the machine it runs on."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path

import torch

import pyattn
from pyattn import core, processor, registry
from pyattn.backends import KernelError, kernel_cache, nvrtc
from pyattn.backends.cpu import isas
from pyattn.backends.nvrtc_compiler import dotted
from pyattn.spec import AttentionSpec

# The vector instructions that CPU kernels are chosen by, as Linux names them.
_CPU_FLAGS = ("sse4_2", "f16c", "fma", "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve")


def describe() -> dict[str, str]:
    """Names and values, in the order to show them."""
    return {
        "pyattn": f"{pyattn.__version__} at {Path(pyattn.__file__).parent}",
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "Triton": triton_version(),
        "compiler": _compiler(),
        "CPU": _cpu(),
        "CPU kernels": ", ".join(isas()) or "none",
        "GPU": _gpu(),
        "NVRTC": _nvrtc(),
        "CUDA kernels": _kernel_cache(),
    }


def backends() -> dict[str, str]:
    """Every backend's name with "ready" or the reason why not, after a small attention on those that say they are."""
    states = registry.list_backends()
    for name in (name for name, state in states.items() if state == "ready"):
        backend = registry.BACKENDS[name]
        x, numbers = core.prepare(*torch.zeros(3, 1, 1, 16, 16, device="cpu" if "cpu" in backend.devices else "cuda"))
        spec = AttentionSpec.of(x, numbers)
        try:
            y = backend.forward(spec, x)
            backend.backward(spec, x, y, y.out, None, False)
        except KernelError as error:
            states[name] = str(error)
    return states


def triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _compiler() -> str:
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
            return f"{path}: {said.partition(chr(10))[0]}"
    return "no C++ compiler on PATH"


def _cpu() -> str:
    fields = processor.fields()
    model = fields.get("model name") or platform.processor() or platform.machine()
    flags = set((fields.get("flags") or fields.get("Features", "")).split())
    found = [flag for flag in _CPU_FLAGS if flag in flags] or [torch.backends.cpu.get_cpu_capability()]
    return f"{model}, {torch.get_num_threads()} threads; {' '.join(found)}"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        found.append(f"{device.name}, sm_{device.major}{device.minor}, {memory:.0f} GiB")
    return "; ".join(found)


def _nvrtc() -> str:
    try:
        found = nvrtc.compiler()
    except nvrtc.NvrtcError as error:
        return str(error)
    return f"{dotted(found.version)} at {found.path}, for compute capabilities {found.capabilities}"


def _kernel_cache() -> str:
    folder = kernel_cache.folder()
    if folder is None:
        return "not kept, the user's home folder is not known"
    try:
        return f"{kernel_cache.size()} in {folder}"
    except OSError as error:
        return f"{folder} cannot be read: {error.strerror}"
