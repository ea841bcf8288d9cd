"""CUDA C++ kernels, compiled when they are first needed: by NVRTC, which every CUDA build of torch brings.

`kernel` is what the `cuda` backend calls. A kernel comes from memory, from the disk (kernel_cache.py), or from the
compiler (nvrtc_compiler.py), and is loaded and launched by the driver (cuda_driver.py). No nvcc, no C++ compiler and no
CUDA headers are needed. It is compiled to machine code for the very GPU and not to PTX, of which a driver loads none
that is newer than itself, and compiles what it loads.
"""

from __future__ import annotations

import threading
from functools import cache

import torch

from pyattn.backends import kernel_cache
from pyattn.backends.cuda_driver import ENTRY, LIBRARY, CaptureError, Driver, Kernel
from pyattn.backends.nvrtc_compiler import Compiler, NvrtcError, dotted, find

__all__ = ["Kernel", "NvrtcError", "kernel", "unavailable"]

OLDEST = (7, 0)  # compute capability that the kernels are written for
# Jetsons and their like, whose code runs on no other GPU, and who run no other GPU's.
_EMBEDDED = (72, 87, 101, 110)

_loaded: dict[tuple[int, str, int], Kernel] = {}
_loading = threading.Lock()


@cache
def unavailable() -> str | None:
    """Why no kernel can be compiled for, and launched on, any GPU of this machine; None when one can."""
    if torch.version.hip is not None:
        return f"is for NVIDIA GPUs, torch {torch.__version__} is built for AMD's (ROCm {torch.version.hip})"
    try:
        nvrtc = compiler()
        if not torch.cuda.is_available():
            return "no CUDA device"
        driver()
    except NvrtcError as error:
        return str(error)
    reasons = [_unsuited(index, nvrtc) for index in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]


def kernel(device_index: int, instantiation: str, shared_bytes: int) -> Kernel:
    """A kernel of `pyattn.cuda_kernels` on a device: from memory, from the disk, or compiled now.

    instantiation: a kernel's struct template with its arguments, "forward<half_t, 64, 64>".
    shared_bytes: of dynamic shared memory, with which it will be launched.

    Raises:
        KernelError: it cannot be compiled (NvrtcError), or the device does not take it.
        CaptureError: it would have to be compiled, or cannot be loaded, while a CUDA graph is captured.
    """
    wanted = device_index, instantiation, shared_bytes
    found = _loaded.get(wanted)
    if found is None:
        with _loading:  # two threads compile no faster than one, and both may want the same kernel
            found = _loaded.get(wanted)
            if found is None:
                code = machine_code(instantiation, torch.cuda.get_device_capability(device_index))
                found = _loaded[wanted] = driver().load(device_index, code, shared_bytes)
    return found


def machine_code(instantiation: str, capability: tuple[int, int]) -> bytes:
    """A kernel's cubin, from the disk or compiled now."""
    from pyattn import cuda_kernels

    nvrtc, source, headers = compiler(), entry(instantiation), cuda_kernels.sources()
    target = target_for(capability, nvrtc)
    parts = {"source": source, "headers": headers, "options": nvrtc.options(target), "version": nvrtc.version}
    name = kernel_cache.key(parts)
    code = kernel_cache.load(name)
    if code is None:
        if torch.cuda.is_current_stream_capturing():
            raise CaptureError
        code = nvrtc.compile(source, headers, target).code
        kernel_cache.store(name, code)
    return code


def entry(instantiation: str) -> str:
    """The translation unit that makes one kernel of one instantiation."""
    # One block of it is to fit a multiprocessor. Unless told so, ptxas spills registers in order that several do.
    return (
        '#include "kernels.cuh"\n'
        f"using Instance = {instantiation};\n"
        f'extern "C" __global__ void __launch_bounds__(Instance::THREADS, 1) {ENTRY.decode()}'
        "(const __grid_constant__ Args a) { Instance::run(a); }\n"
    )


def target_for(capability: tuple[int, int], nvrtc: Compiler) -> int:
    """What to compile for: the GPU's own compute capability, 75 for 7.5, or the nearest before it whose code it runs.

    Raises:
        NvrtcError: there is none.
    """
    if capability < OLDEST:
        raise NvrtcError(f"needs compute capability {dotted(OLDEST)} or newer, this GPU has {dotted(capability)}")
    own = 10 * capability[0] + capability[1]
    if own in nvrtc.targets:
        return own
    older = [x for x in nvrtc.targets if x // 10 == own // 10 and x < own and x not in _EMBEDDED]
    if not older or own in _EMBEDDED:
        raise NvrtcError(
            f"NVRTC {dotted(nvrtc.version)} knows no GPU of compute capability {dotted(capability)}, only "
            f"{nvrtc.capabilities}; another build of torch brings another NVRTC"
        )
    return max(older)


def _unsuited(device_index: int, nvrtc: Compiler) -> str | None:
    """Why nothing can be compiled for a device."""
    try:
        target_for(torch.cuda.get_device_capability(device_index), nvrtc)
    except NvrtcError as error:
        return str(error)
    return None


@cache
def compiler() -> Compiler:
    """The NVRTC that belongs to torch's CUDA.

    Raises:
        NvrtcError: there is none.
    """
    if torch.version.cuda is None:
        raise NvrtcError(f"torch {torch.__version__} is built without CUDA")
    return find(torch.version.cuda)


@cache
def driver() -> Driver:
    """
    Raises:
        NvrtcError: there is none, or one that is too old.
    """
    try:
        found = Driver(LIBRARY)
    except OSError as error:
        raise NvrtcError(f"NVIDIA's driver, {LIBRARY}, cannot be loaded: {error}") from None
    if found.version[0] < compiler().version[0]:
        raise NvrtcError(
            f"the GPU's driver runs CUDA up to {dotted(found.version)}, and NVRTC {dotted(compiler().version)} compiles"
            " for newer ones: update the driver, or install a torch for an older CUDA"
        )
    return found
