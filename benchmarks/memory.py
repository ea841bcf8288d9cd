"""Peak memory that one call takes beyond its inputs, its results included.

On a GPU torch's allocator knows. On the CPU only the kernel knows what torch, a C++ extension and generated code take
together, so the resident set is read before the call and at its peak: in a process of its own, where malloc gives
every freed block back at once and nothing is left from earlier calls for the next one to hide in. Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from pyattn import registry

from .cases import Case, Direction, make_inputs
from .peers import CPU_PEERS, bound

Job = tuple[Case, Direction, str]  # the last is the peer's name
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def cuda_peak(call: Callable[[], object]) -> int:
    """Bytes that `call` takes on the GPU beyond what is held before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cpu_peaks(jobs: Sequence[Job], seconds: float) -> dict[Job, int]:
    """Bytes per job, measured in a fresh process that stops after `seconds`; jobs it did not reach are missing."""
    if not _CLEAR.exists():
        return {}
    package = __package__ or ""
    root = Path(str(sys.modules[package.partition(".")[0]].__file__)).parents[1]
    order = {
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "backend": registry.requested("auto"),
        "jobs": [[asdict(case) | {"dtype": case.dtype_name}, direction, peer] for case, direction, peer in jobs],
    }
    done = subprocess.run(
        [sys.executable, "-m", f"{package}.memory"],
        cwd=root, input=json.dumps(order), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"the memory measurement ended with status {done.returncode}:\n{done.stderr}")
    return dict(zip(jobs, map(int, done.stdout.split()), strict=False))


def _peak(call: Callable[[], object]) -> int:
    """Bytes that `call` adds to the resident set at most. Its code must have run before, or loading it counts."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")  # resets VmHWM, the peak (proc(5))
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"{_STATUS} has no {field}")
    return int(match[1]) * 1024


def _measure(case: Case, direction: Direction, peer_name: str) -> int:
    peer = next(peer for peer in CPU_PEERS if peer.name == peer_name)
    # A few rows are enough to load the code and start the threads, except where code is made for the exact shape.
    first = case if peer.setup_seconds else replace(case, b=1, h=1, m=64, n=64)
    bound(peer, first, direction, make_inputs(first, "cpu"))()
    return _peak(bound(peer, case, direction, make_inputs(case, "cpu")))


def _main() -> None:
    """Reads the order of `cpu_peaks` and prints one number per job, in their order."""
    order = json.load(sys.stdin)
    end = time.monotonic() + order["seconds"]
    for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
        ctypes.CDLL(None).mallopt(option, 1 << 16)
    torch.set_num_threads(order["threads"])
    with registry.use_backend(order["backend"]):
        for case, direction, peer_name in order["jobs"]:
            if time.monotonic() > end:
                break
            dtype = getattr(torch, case.pop("dtype"))
            print(_measure(Case(**case, dtype=dtype), direction, peer_name), flush=True)


if __name__ == "__main__":
    _main()
