"""Every Triton kernel compiles for every chip, without spilling registers, within the chip's shared memory."""

import importlib
import multiprocessing
import pkgutil
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction
from triton_aot import CHIPS, Job, attention_launches, compile_job

import pyattn.triton_kernels

# What may be visible, and what else the kernels do: each combination is a variant of every kernel.
CAUSAL = {"right": 0}
WINDOW = {"left": 100, "right": 100, "key_lengths": True, "hk": 1}
MASK = {"mask": True}
DROPOUT = {"mask": True, "dropout_p": 0.1}

FEATURES = (CAUSAL, WINDOW, MASK, DROPOUT)

JOBS = [
    *(Job(chip, torch.bfloat16, {"d": d} | f) for chip in CHIPS for d in (64, 128) for f in FEATURES),
    *(Job(chip, torch.bfloat16, {"d": 256} | CAUSAL) for chip in CHIPS),
    *(Job(chip, torch.bfloat16, {"d": 80, "dv": 33}) for chip in CHIPS),
    *(Job(chip, torch.float16, {"d": 64} | CAUSAL) for chip in CHIPS),
    *(Job(chip, torch.float32, {"d": 64} | WINDOW) for chip in CHIPS),
    *(Job("sm_90", torch.float32, {"d": d} | CAUSAL) for d in (128, 256)),
]

# Where a kernel takes all 255 registers, ptxas parks a few values in local memory: this many bytes per thread are let
# pass (the most there is: 72 by Triton 3.6, 56 by 3.7). A padded head size needs more, as a column mask lives beside
# the addresses (168).
SPILLED = 80
SPILLED_PADDED = 176


@pytest.fixture(scope="module")
def compiled(request):
    """Job.id: the usage of each of its kernels."""
    cache = str(request.config.cache.mkdir("triton"))
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield {job.id: pool.submit(compile_job, job, cache) for job in JOBS}


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.id)
def test_kernels_fit_the_chip(job, compiled):
    for usage in compiled[job.id].result():
        print(usage)
        assert usage.shared <= CHIPS[job.chip].shared, usage
        assert usage.spilled <= (SPILLED_PADDED if "dv" in job.options else SPILLED), usage


def _jit_functions() -> dict[str, JITFunction]:
    package = pyattn.triton_kernels
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    return {name: f for m in modules for name, f in vars(m).items() if isinstance(f, JITFunction)}


def test_every_kernel_is_among_those_compiled():
    launched = {launch.kernel.__name__ for launch in attention_launches("hopper")}
    assert launched == {name for name in _jit_functions() if name.endswith("_kernel")}


def test_every_device_function_is_used():
    functions = _jit_functions()
    for name in functions:
        if not name.endswith("_kernel"):
            assert any(f"{name}(" in f.src for other, f in functions.items() if other != name), name


def _keys(**options) -> set[str]:
    return {launch.key(CHIPS["sm_90"].target) for launch in attention_launches("hopper", **options)}


@pytest.mark.parametrize("heads_inside", [False, True], ids=["bhmd", "bmhd"])
@pytest.mark.parametrize("features", [CAUSAL, WINDOW, MASK], ids=["causal", "window", "mask"])
@pytest.mark.parametrize("d", [17, 64, 72])
def test_new_lengths_and_batch_sizes_do_not_recompile(d, features, heads_inside):
    options = {"d": d, "heads_inside": heads_inside} | features
    shapes = [(2, 1024, 1024), (1, 1024, 1024), (3, 1, 1), (2, 1, 513), (2, 16, 16), (2, 100, 37), (2, 1000, 70000)]
    keys = [_keys(b=b, m=m, n=n, **options) for b, m, n in shapes]
    assert len(keys[0]) == 3
    assert all(key == keys[0] for key in keys)


def test_new_scale_window_and_dropout_do_not_recompile():
    assert _keys(scale=0.1, left=1, right=16, dropout_p=0.1) == _keys(scale=1.0, left=7, right=1, dropout_p=0.6)


def test_new_head_size_and_dtype_do_recompile():
    assert not _keys(d=64) & _keys(d=128)
    assert not _keys(d=64) & _keys(d=64, dtype=torch.bfloat16)
