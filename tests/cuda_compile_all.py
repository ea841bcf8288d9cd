"""Every CUDA kernel that any call on any chip may launch, compiled: `pytest tests/cuda_compile_all.py`. Not among what
pytest finds itself, because it takes long."""

from pathlib import Path

import pytest
from cuda_aot import Job
from test_cuda_compile import check, every_job, folder  # noqa: F401 (a fixture)


@pytest.mark.parametrize("job", list(every_job()), ids=lambda job: job.id)
def test_kernel_fits_the_chip(job: Job, folder: Path) -> None:  # noqa: F811
    check(job, folder)
