"""Every CUDA kernel compiles for every chip, without spilling registers, within the chip's shared memory.

Here are the kernels that take the most registers; what was read of them is kept until the sources change.
`pytest tests/cuda_compile_all.py` compiles every row of the table for every chip.
"""

from __future__ import annotations

import platform
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cuda_aot import Job, compile_job

from pyattn import cuda_kernels
from pyattn.backends import cuda_config

if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip("NVRTC, a test dependency, is installed on Linux on x86-64 only", allow_module_level=True)

# By compute capability, the head sizes that are compiled here: those that fill the registers, and above 128 have other
# tiles. A chip that has the tiles of another one has one of them.
SIZES = {70: (), 75: (128, 256), 80: (128, 256), 86: (256,), 90: (128, 256), 100: (128,), 120: (128, 256)}
PLAIN = {70: torch.float32, 120: torch.float64}  # of the kernels without matrix units, the dtype


def every_job() -> Iterator[Job]:
    for capability in SIZES:
        yield from (Job(capability, row) for row in dict.fromkeys(cuda_config.all_rows(capability)))


def chosen_jobs() -> Iterator[Job]:
    """With every feature, which takes the most registers; float16 and bfloat16 differ in single instructions."""
    for capability, sizes in SIZES.items():
        half = torch.bfloat16 if capability >= 80 else torch.float16
        calls = [(half, size) for size in sizes]
        if capability in PLAIN:
            calls.append((PLAIN[capability], 64))
        for kernel in cuda_config.KERNELS:
            flags = cuda_config.RICH | (cuda_config.DROPOUT if kernel != "decode" else 0)
            for dtype, size in calls:
                rows = cuda_config.rows(kernel, capability, dtype, size, size, flags)
                yield from (Job(capability, row) for row in rows)
        yield Job(capability, cuda_config.join_row(half))


JOBS = list(chosen_jobs())


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    """Where what was read of compiled kernels is kept between runs."""
    return request.config.cache.mkdir("nvrtc")


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.id)
def test_kernel_fits_the_chip(job: Job, folder: Path) -> None:
    check(job, folder)


def check(job: Job, folder: Path) -> None:
    usage = compile_job(job, folder)
    print(usage)
    assert usage.spilled == usage.stack == 0
    assert usage.shared + job.row.shared_bytes <= cuda_config.shared_limit(job.capability)
    assert usage.threads == job.row.threads, "the launch and the compiled bound differ"


def test_every_kernel_of_the_sources_is_among_those_compiled() -> None:
    text = "\n".join(cuda_kernels.sources().values())
    structs = re.findall(r"^template <[^\n]*> struct (\w+) \{$(.*?)^\};", text, re.M | re.S)
    kernels = {name for name, body in structs if "void run(const Args&" in body}
    assert {job.row.instantiation.partition("<")[0] for job in every_job()} == kernels


@pytest.mark.parametrize("capability", SIZES)
def test_kernels_of_one_dtype_and_size_are_few(capability: int) -> None:
    """A program waits for the compiler with each of them."""
    names = {row.instantiation for row in cuda_config.all_rows(capability)}
    variants = Counter(re.sub(r"(?<=>, )\d", "flags", name, count=1) for name in names)
    assert max(variants.values()) <= 4
