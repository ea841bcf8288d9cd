"""Peak memory that one call takes beyond what is held before it: its results and its scratch.

On a GPU torch's allocator knows. On the CPU only the operating system knows what torch, a C++ extension and generated
code take together, so there it is the resident set before the call against its peak.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def weighed(call: Callable[[], Result], device: str) -> tuple[Result, int | None]:
    """What the call returns, and its peak in bytes: None where that cannot be had, on the CPU without Linux and glibc.

    A first call also counts what it leaves loaded, such as code and threads.
    """
    if device == "cuda":
        return _cuda_weighed(call)
    if not _CLEAR.exists() or platform.libc_ver()[0] != "glibc":
        return call(), None
    return _resident_weighed(call)


def _cuda_weighed(call: Callable[[], Result]) -> tuple[Result, int]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


def _resident_weighed(call: Callable[[], Result]) -> tuple[Result, int]:
    libc = ctypes.CDLL(None)
    gc.collect()
    # Every block gives its pages back when it is freed, and what earlier calls have freed goes back now: or it would
    # serve the call unseen, and blocks freed within the call would count on.
    _set_thresholds(libc, 1 << 16, 1 << 16)
    libc.malloc_trim(0)
    _CLEAR.write_text("5")  # resets VmHWM, the peak (proc(5))
    before = _resident("VmRSS")
    try:
        result = call()
        used = _resident("VmHWM") - before
    finally:
        # Where malloc's own, moving defaults end up once blocks this large have been freed.
        _set_thresholds(libc, 32 << 20, 64 << 20)
    return result, max(0, used)


def _set_thresholds(libc: ctypes.CDLL, mmap: int, trim: int) -> None:
    libc.mallopt(_M_MMAP_THRESHOLD, mmap)
    libc.mallopt(_M_TRIM_THRESHOLD, trim)


def _resident(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"{_STATUS} has no {field}")
    return int(match[1]) * 1024
