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

# What may be visible, and what else the kernels do: each combination is a variant of every kernel. Beside what models
# use together (Gemma 2: softcap and window; GPT-OSS: sinks and window; T5: bias and mask), every feature once.
CAUSAL = {"right": 0}
WINDOW = {"left": 100, "right": 100, "key_lengths": True, "hk": 1}
MASK = {"mask": True}
DROPOUT = {"mask": True, "dropout_p": 0.1}
SEGMENTS = {"segments": True, "right": 0}
BIAS = {"bias": "bhmn", "right": 0}
SHARED_BIAS = {"bias": "1hmn", "mask": True}
SOFTCAP = {"softcap": 30.0, "right": 0, "left": 4095}
ALIBI = {"alibi": True, "right": 0}
SINKS = {"sinks": True, "right": 0, "left": 128, "hk": 1}
ROW_WINDOWS = {"row_windows": True}
PACKED = {"packed": 5, "b": 1, "right": 0}

DECODING = {"decoding": True, "m": 1, "h": 8, "hk": 1, "left": 4095, "right": 0, "key_lengths": True}
PAGED = DECODING | {"m": 512, "page_size": 16}
CACHED = DECODING | {"m": 512, "offset": None}
DECODING_ALL = DECODING | {"m": 2, "mask": True, "bias": "1hmn", "softcap": 30.0, "alibi": True, "sinks": True}

ADDITIVE = {"additive": True, "right": 0}
ADDITIVE_DECODING = {"additive": True, "decoding": True, "h": 1, "hk": 1, "m": 1, "key_lengths": True}
ADDITIVE_DECODING_ALL = ADDITIVE_DECODING | DECODING_ALL | {"h": 4}
ADDITIVE_DROPOUT = DROPOUT | {"additive": True, "bias": "1hmn"}
ADDITIVE_ALL = ADDITIVE | {"segments": True, "softcap": 30.0, "alibi": True, "sinks": True, "left": 100}

RELATIVE = {"relative": 64}
RELATIVE_RANKS = {"relative": 128, "ranks": True}  # of XLNet
RELATIVE_MEMORY = {"relative": 64, "right": 0, "left": 500, "n": 1500}  # of Transformer-XL
RELATIVE_DROPOUT = {"relative": 64, "ranks": True, "dropout_p": 0.1}
RELATIVE_BIAS = {"relative": 16, "bias": "1hmn", "segments": True, "hk": 1}
RELATIVE_LOGITS = {"relative": 16, "softcap": 30.0, "alibi": True, "sinks": True, "right": 0, "scale": -0.1}

FEATURES = (CAUSAL, WINDOW, MASK, DROPOUT, SEGMENTS, ROW_WINDOWS, BIAS, SHARED_BIAS, SOFTCAP, ALIBI, SINKS, PACKED)

# Of what is compiled for several chips, every run of the tests has all on the first two of these; the rest is in
# `compile_all.py`, for `make test-compile`.
MAIN, OTHERS = ("sm_80", "sm_90"), ("sm_100", "gfx942")
EACH = MAIN + OTHERS
FEW = (CAUSAL, DROPOUT, SEGMENTS, PACKED)

JOBS = [
    *(Job(chip, torch.bfloat16, {"d": 128} | f) for chip in MAIN for f in FEATURES),
    *(Job(chip, torch.bfloat16, {"d": 128} | f) for chip in OTHERS for f in FEW),
    *(Job("sm_89", torch.bfloat16, {"d": d} | CAUSAL) for d in (64, 128, 256)),
    *(Job("sm_90", torch.bfloat16, {"d": 64} | f) for f in FEATURES),
    *(Job(chip, torch.bfloat16, {"d": d} | CAUSAL) for chip in EACH for d in (64, 256) if (chip, d) != ("sm_90", 64)),
    *(Job(chip, torch.bfloat16, {"d": 80, "dv": 33}) for chip in EACH),
    *(Job(chip, torch.float16, {"d": 64} | CAUSAL) for chip in EACH),
    *(Job(chip, torch.float32, {"d": 64} | WINDOW) for chip in EACH),
    *(Job("sm_90", torch.float32, {"d": d} | CAUSAL) for d in (128, 256)),
    *(Job(chip, torch.bfloat16, {"d": d} | DECODING) for chip in EACH for d in (64, 128, 256)),
    *(Job(chip, torch.bfloat16, {"d": 128} | DECODING_ALL) for chip in EACH),
    *(Job(chip, torch.bfloat16, {"d": d} | f) for chip in MAIN for d in (64, 128, 256) for f in (CACHED, PAGED)),
    *(Job("sm_90", torch.float32, {"d": d} | DECODING) for d in (64, 256)),
    *(Job(chip, torch.bfloat16, {"d": d} | ADDITIVE) for chip in EACH for d in (64, 256)),
    *(Job(chip, torch.bfloat16, {"d": 64} | ADDITIVE_DROPOUT) for chip in EACH),
    *(Job("sm_90", torch.bfloat16, {"d": 128} | f) for f in (ADDITIVE_ALL, PACKED | ADDITIVE, ROW_WINDOWS | ADDITIVE)),
    *(Job(chip, torch.float32, {"d": 64} | ADDITIVE) for chip in ("sm_80", "sm_90")),
    *(Job(chip, torch.bfloat16, {"d": 256} | ADDITIVE_DECODING) for chip in EACH),
    *(Job(chip, torch.bfloat16, {"d": 128} | ADDITIVE_DECODING_ALL) for chip in ("sm_80", "sm_90")),
    Job("sm_90", torch.float32, {"d": 256} | ADDITIVE_DECODING),
    *(Job(chip, torch.bfloat16, {"d": 64} | f) for chip in EACH for f in (RELATIVE, RELATIVE_MEMORY)),
    *(Job(chip, torch.bfloat16, {"d": 128} | RELATIVE_RANKS) for chip in EACH),
    *(
        Job(chip, torch.bfloat16, {"d": 64} | f)
        for chip in MAIN
        for f in (RELATIVE_DROPOUT, RELATIVE_BIAS, RELATIVE_LOGITS)
    ),
    *(Job(chip, torch.bfloat16, {"d": 256, "relative": 256}) for chip in MAIN),
    *(Job(chip, torch.float32, {"d": 64} | RELATIVE) for chip in MAIN),
]

# Where a kernel takes all 255 registers, ptxas parks a few values in local memory: this many bytes per thread are let
# pass. A padded head size needs more, as a column mask lives beside the addresses.
SPILLED = 80
SPILLED_PADDED = 176


def compiling(jobs, request):
    """Job.id: the usage of each of its kernels, as soon as they are compiled."""
    cache = str(request.config.cache.mkdir("triton"))
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield {job.id: pool.submit(compile_job, job, cache) for job in jobs}


def assert_fits(job, usages):
    for usage in usages:
        print(usage)
        assert usage.shared <= CHIPS[job.chip].shared, usage
        assert usage.spilled <= (SPILLED_PADDED if "dv" in job.options else SPILLED), usage


@pytest.fixture(scope="module")
def compiled(request):
    yield from compiling(JOBS, request)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.id)
def test_kernels_fit_the_chip(job, compiled):
    assert_fits(job, compiled[job.id].result())


@pytest.mark.parametrize("job", [job for job in JOBS if job.reads_whole_rows], ids=lambda job: job.id)
def test_rows_are_read_16_bytes_at_a_time_and_multiplied_as_the_chip_does_it_best(job, compiled):
    for usage in compiled[job.id].result():
        assert usage.narrow_loads == 0, usage
        # A warpgroup multiplies 64 rows; some sums leave room for 32.
        if job.chip == "sm_90" and usage.kernel.startswith("_flash") and usage.block >= 64:
            assert usage.wgmma > 0, usage


def _jit_functions() -> dict[str, JITFunction]:
    package = pyattn.triton_kernels
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    functions = {name: f for m in modules for name, f in vars(m).items() if isinstance(f, JITFunction)}
    return {name: f for name, f in functions.items() if not f.is_gluon()}


def test_every_kernel_is_among_those_compiled():
    each = ({"bias": "1hmn", "relative": 64}, DECODING, ADDITIVE, ADDITIVE_DECODING)
    launches = [launch for options in each for launch in attention_launches("hopper", **options)]
    launched = {launch.kernel.__name__ for launch in launches}
    assert launched == {name for name in _jit_functions() if name.endswith("_kernel")}


def test_every_device_function_is_used():
    functions = _jit_functions()
    for name in functions:
        if not name.endswith("_kernel"):
            assert any(f"{name}(" in f.src for other, f in functions.items() if other != name), name


def _keys(**options) -> set[str]:
    return {launch.key(CHIPS["sm_90"].target) for launch in attention_launches("hopper", **options)}


@pytest.mark.parametrize("heads_inside", [False, True], ids=["bhmd", "bmhd"])
@pytest.mark.parametrize(
    "features", [CAUSAL, WINDOW, MASK, SEGMENTS, ADDITIVE], ids=["causal", "window", "mask", "segments", "additive"]
)
@pytest.mark.parametrize("d", [17, 64, 72])
def test_new_lengths_and_batch_sizes_do_not_recompile(d, features, heads_inside):
    options = {"d": d, "heads_inside": heads_inside} | features
    shapes = [(2, 1024, 1024), (1, 1024, 1024), (3, 1, 1), (2, 1, 513), (2, 16, 16), (2, 100, 37), (2, 1000, 70000)]
    keys = [_keys(b=b, m=m, n=n, **options) for b, m, n in shapes]
    assert len(keys[0]) == 3
    assert all(key == keys[0] for key in keys)


@pytest.mark.parametrize("bias", ["1hmn", "1111"])
def test_new_lengths_and_batch_sizes_do_not_recompile_the_gradient_of_a_bias(bias):
    keys = [_keys(b=b, m=m, n=n, bias=bias, alibi=True) for b, m, n in [(2, 1024, 1024), (3, 513, 16), (4, 100, 37)]]
    assert len(keys[0]) == 4
    assert all(key == keys[0] for key in keys)


def test_new_lengths_and_batch_sizes_do_not_recompile_decoding():
    keys = [_keys(b=b, n=n, **DECODING) for b, n in [(1, 1), (16, 1024), (3, 70001)]]
    assert len(keys[0]) == 2
    assert all(key == keys[0] for key in keys)


def test_new_lengths_and_batch_sizes_do_not_recompile_steps_of_additive_scores():
    keys = [
        _keys(b=b, **ADDITIVE_DECODING | {"m": m, "n": n}) for b, m, n in [(1, 1, 1), (32, 5, 1024), (3, 16, 70001)]
    ]
    assert len(keys[0]) == 3
    assert all(key == keys[0] for key in keys)


def test_new_lengths_batch_and_page_sizes_do_not_recompile_a_paged_cache():
    given = [(1, 8, 1, 16), (16, 33, 1024, 256), (3, 99, 70001, 1)]
    keys = [_keys(b=b, **PAGED | {"m": m, "n": n, "page_size": page_size}) for b, m, n, page_size in given]
    assert len(keys[0]) == 2
    assert all(key == keys[0] for key in keys)


def test_new_packed_sequences_do_not_recompile():
    keys = [_keys(b=1, m=m, n=n, packed=packed) for packed, m, n in [(1, 1, 1), (16, 1024, 1000), (300, 7777, 70000)]]
    assert len(keys[0]) == 3
    assert all(key == keys[0] for key in keys)


def test_new_scale_window_and_dropout_do_not_recompile():
    one, other = {"left": 1, "right": 16, "softcap": 1.0}, {"left": 7, "right": 1, "softcap": 50.0}
    assert _keys(scale=0.1, dropout_p=0.1, **one) == _keys(scale=1.0, dropout_p=0.6, **other)


def test_new_head_size_and_dtype_do_recompile():
    assert not _keys(d=64) & _keys(d=128)
    assert not _keys(d=64) & _keys(d=64, dtype=torch.bfloat16)
