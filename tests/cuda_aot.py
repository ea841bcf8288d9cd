"""Compiles the CUDA kernels without a GPU, by the code that does it on a user's machine, and reads what they use."""

from __future__ import annotations

import json
import os
import re
import secrets
import struct
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pyattn import cuda_kernels
from pyattn.backends import kernel_cache, nvrtc, nvrtc_compiler
from pyattn.backends.cuda_config import Row

OLDER = "12.8"  # the CUDA release whose NVRTC still knows Volta
NEWER = "13.0"
# Of a cubin's attributes of a kernel, the one with the largest block: its format and number, and 12 bytes.
_MAX_THREADS = struct.pack("<BBH", 4, 5, 12)


class Job(NamedTuple):
    """One kernel to compile for one chip."""

    capability: int  # 86 for 8.6
    row: Row

    @property
    def id(self) -> str:
        return f"sm_{self.capability}-{self.row.instantiation}"


class Usage(NamedTuple):
    """What a compiled kernel takes."""

    registers: int
    spilled: int  # bytes per thread that are stored and loaded again
    stack: int  # bytes per thread, spilled ones and arrays that do not fit registers
    shared: int  # bytes that the kernel declares itself
    threads: int  # of a block


def compile_job(job: Job, folder: Path) -> Usage:
    """Compiles a job, or takes what was read of it from a file in `folder`."""
    compiler = compiler_for(job.capability)
    source, headers = nvrtc.entry(job.row.instantiation), cuda_kernels.sources()
    options = compiler.options(job.capability)
    parts = {"source": source, "headers": headers, "options": options, "version": compiler.version}
    file = folder / f"{kernel_cache.key(parts)}.json"
    if file.exists():
        return Usage(**json.loads(file.read_text("utf-8")))
    usage = read(compiler.compile(source, headers, job.capability))
    made = file.with_suffix(f".{secrets.token_hex(8)}")
    made.write_text(json.dumps(usage._asdict()), "utf-8")
    os.replace(made, file)
    return usage


def read(compiled: nvrtc_compiler.Compiled) -> Usage:
    """Out of ptxas's log; the block's size out of the machine code."""
    log = compiled.log
    stack, stores, loads = map(
        int, _of(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    )
    shared = re.search(r"(\d+) bytes smem", log)
    place = compiled.code.index(_MAX_THREADS) + len(_MAX_THREADS)
    threads, *rest = struct.unpack_from("<III", compiled.code, place)
    assert rest == [1, 1], "no attribute of a one-dimensional block"
    return Usage(
        int(_of(r"Used (\d+) registers", log)[0]), stores + loads, stack, int(shared[1]) if shared else 0, threads
    )


def _of(pattern: str, log: str) -> tuple[str, ...]:
    found = re.search(pattern, log)
    assert found, f"ptxas's log does not say {pattern!r}:\n{log}"
    return found.groups()


@cache
def compiler_for(capability: int) -> nvrtc_compiler.Compiler:
    return nvrtc_compiler.find(OLDER if capability < 75 else NEWER)
