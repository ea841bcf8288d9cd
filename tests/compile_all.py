"""The Triton kernels compiled for what test_triton_compile.py leaves out: `make test-compile`."""

import pytest
import torch
from test_triton_compile import CACHED, FEATURES, FEW, OTHERS, PAGED, assert_fits, compiling
from triton_aot import Job

JOBS = [
    *(Job(chip, torch.bfloat16, {"d": 128} | f) for chip in OTHERS for f in FEATURES if f not in FEW),
    *(Job(chip, torch.bfloat16, {"d": d} | f) for chip in OTHERS for d in (64, 128, 256) for f in (CACHED, PAGED)),
]


@pytest.fixture(scope="module")
def compiled(request):
    yield from compiling(JOBS, request)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.id)
def test_kernels_fit_the_chip(job, compiled):
    assert_fits(job, compiled[job.id].result())
