"""The CUDA kernels on the CPU (tests/cuda_host), through the whole backend: the contract, and mutants it must catch.

Warps run in an order that a seed draws, so that a barrier or a wait that is missing shows.
"""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from cuda_host import EmulatedCuda
from cuda_host.mutants import MUTANTS
from test_kvcache import OPTIONS, cache, held_against_definition

from pyattn import core, dropout, registry, testing
from pyattn.backends import cuda, cuda_config, sink_gradient
from pyattn.backends.cpu import CpuBackend
from pyattn.backends.cuda import Gpu
from pyattn.backends.reference import dropout_keep
from pyattn.spec import AttentionSpec, dtype_name
from pyattn.testing import Case

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        platform.machine() != "x86_64" or shutil.which("g++") is None, reason="the emulator needs g++ and an x86-64 CPU"
    ),
]

CSRC = Path(__file__).parent.parent / "csrc"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ADDED = (
    Case("unseen-before-the-band", window=(20, 5), m=40, n=170, unseen_nan=True),
    Case("unseen-behind-the-band", window=(20, 5), top_left=True, m=40, n=170, unseen_nan=True),
    Case("unseen-segments", segments=4, m=2, n=90, unseen_nan=True),
    Case("unseen-gqa-mask", mask="1h1n", h=4, hk=2, unseen_nan=True, n=90),
    Case("decode-scores", h=4, hk=2, m=2, n=150, mask="1hmn", bias="1h1n", alibi=True),
    Case("wide", b=1, m=20, n=40, d=300, dv=270, causal=True),
)
CASES = {case.id: case for case in (*testing.CASES, *ADDED)}
RUNS = [
    (case, dtype)
    for case in CASES.values()
    if not (case.additive or case.relative or case.ranks or case.row_windows is not None)
    for dtype in DTYPES
]


@pytest.fixture
def emulated() -> Iterator[dict[str, EmulatedCuda]]:
    """Backends by name, for as long as a test lasts."""
    before = dict(registry.BACKENDS)
    yield registry.BACKENDS
    registry.BACKENDS.clear()
    registry.BACKENDS.update(before)


def _id(value: object) -> str:
    return value.id if isinstance(value, Case) else str(value).removeprefix("torch.")


def _capability(case: Case, dtype: torch.dtype) -> int:
    """A GPU that copies asynchronously, or one that does not; on the latter bfloat16 has no matrix units."""
    return 75 if dtype is torch.float16 and len(case.id) % 2 else 80


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=_id)
def test_cuda_case_agrees_with_definition(case, dtype, emulated):
    emulated["emulated"] = EmulatedCuda(_capability(case, dtype), seed=len(case.id))
    assert [r for r in testing.check_case("emulated", case, dtype) if not r.excess <= 1] == []


@pytest.mark.parametrize("case", ["everything", "packed-gqa-window", "one-query", "large-head-size", "bias-per-query"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_cuda_half_precision_without_matrix_units_agrees_with_definition(case, dtype, emulated):
    emulated["emulated"] = EmulatedCuda(70)
    assert [r for r in testing.check_case("emulated", CASES[case], dtype) if not r.excess <= 1] == []
    assert all("Plain" in name or "join" in name for name in emulated["emulated"].launched)


@pytest.mark.parametrize("case", ["everything", "dropout-gqa-causal", "scores-huge-one-query", "bias-per-key", "sinks"])
@pytest.mark.parametrize(("dtype", "capability"), [(torch.float16, 80), (torch.float16, 75), (torch.float32, 80)])
def test_cuda_order_of_warps_changes_no_bit(case, dtype, capability, emulated):
    call = testing.make_inputs(CASES[case], dtype)
    found = []
    for seed in range(4):
        emulated["emulated"] = EmulatedCuda(capability, seed)
        found.append(testing.evaluate_backend(call, "emulated"))
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(value.nan_to_num(7.0), other[name].nan_to_num(7.0)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("page_size", [None, 7, 64])
@pytest.mark.parametrize("m", [0, 1, 5, 70])
def test_cuda_cache_agrees_with_definition(m, page_size, dtype):
    for seed, (name, options) in enumerate(OPTIONS.items()):
        runner = EmulatedCuda(75 if seed % 2 else 80, seed)
        x, numbers = core.prepare(**cache(m, page_size, dtype), **options, cached=True)
        results = held_against_definition(runner, x, numbers)
        assert [r for r in results if not r.excess <= 1] == [], name
        by_decoding = any(name.startswith("decode<") for name in runner.launched)
        assert by_decoding == (m > 0 and (page_size is not None or m <= 5)), runner.launched


@pytest.mark.parametrize(("dtype", "family"), [(torch.float16, "Tensor"), (torch.float32, "Plain")])
def test_cuda_cases_launch_every_kernel_with_every_flag(dtype, family, emulated, monkeypatch):
    backend = emulated["emulated"] = EmulatedCuda(80)
    launched = set()
    monkeypatch.setattr(backend, "launch", lambda gpu, row, *_: launched.add(_kernel_and_flags(row.instantiation)))
    for case, _ in RUNS[:: len(DTYPES)]:
        testing.evaluate_backend(testing.make_inputs(case, dtype), "emulated")
    rows = [row.instantiation for row in cuda_config.all_rows(80) if f"<{family}<" in row.instantiation]
    assert launched >= {_kernel_and_flags(name) for name in rows}


def _kernel_and_flags(instantiation: str) -> tuple[str, int]:
    kernel, _, rest = instantiation.partition("<")
    flags = re.search(r">, (\d)", rest)  # behind the family's arguments
    return kernel, int(flags[1]) if flags else 0


def test_cuda_dropped_weights_are_the_definitions_bit_for_bit(emulated):
    """With v the identity, out holds the weights themselves: a dropped one is exactly 0. The `cpu` backend's, too."""
    call = testing.make_inputs(Case("probe", b=2, h=3, hk=3, m=37, n=64, d=16, dv=64, dropout_p=0.4), torch.float32)
    call.tensors["v"] = torch.eye(64).expand(2, 3, 64, 64)
    x, numbers = core.prepare(**call.tensors, **call.options)
    spec = AttentionSpec.of(x, numbers)
    kept = dropout_keep(spec, x)
    for backend in (EmulatedCuda(80), CpuBackend("generic")):
        assert torch.equal(backend.forward(spec, x).out != 0, kept)


def test_cuda_philox_is_the_definitions(tmp_path):
    source = tmp_path / "philox.cpp"
    source.write_text(
        '#include "philox.h"\nextern "C" void draw(unsigned long long seed, unsigned (&c)[4]) { philox(seed, c); }\n'
    )
    library = tmp_path / "philox.so"
    command = ["g++", "-O1", "-shared", "-fPIC", f"-I{CSRC}", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    draw = ctypes.CDLL(str(library)).draw
    draw.argtypes = [ctypes.c_uint64, ctypes.c_uint32 * 4]
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        seed = torch.randint(-(2**63), 2**63 - 1, (), generator=generator)
        counter = torch.randint(0, 2**32, (4,), generator=generator)
        words = (ctypes.c_uint32 * 4)(*counter.tolist())
        draw(int(seed) % 2**64, words)
        assert list(words) == [int(word) for word in dropout.philox(seed, *counter)]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_cuda_mutant_is_caught(mutant, emulated):
    change, case, dtype = MUTANTS[mutant]
    call = testing.make_inputs(CASES[case], dtype)
    oracle = testing.reference(call)
    for seed in range(4):
        emulated["emulated"] = EmulatedCuda(80, seed, change)
        try:
            results = oracle.compare(testing.evaluate_backend(call, "emulated"))
        except AssertionError as error:
            assert change.kernel in str(error), error
            return
        if any(not r.excess <= 1 for r in results):
            return
    pytest.fail("nothing shows it")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"additive": True}, "does not do additive scores with gradient"),
        ({"dv": 513}, "head size is at most 512, got d=32, dv=513"),
        ({"m": 2**28, "n": 2**28 + 1}, "counts queries, or those of a group of heads, and keys to 2^29"),
        ({"b": 2**20, "h": 2**10, "m": 2**10}, "launches at most 2,147,483,647 blocks"),
        ({"h": 2**16, "hk": 1, "m": 2**14}, "counts queries, or those of a group of heads,"),
        ({"offset": -(2**40)}, "counts queries"),
        ({"page_size": 16, "b": 2**10, "h": 8, "m": 2**19}, "launches at most 2,147,483,647 blocks"),
        ({"page_size": 16, "dropout_p": 0.5}, "has no dropout over a paged cache"),
        ({"dtype": torch.int32}, "accepts bfloat16, float16, float32, float64, got int32"),
    ],
)
def test_cuda_refusal_says_why(change, reason):
    call = testing.make_inputs(CASES["plain"], torch.float16)
    spec = AttentionSpec.of(*core.prepare(**call.tensors, **call.options))._replace(**change)
    assert EmulatedCuda(80).refusal(spec).startswith(reason)


def test_cuda_kernel_that_failed_is_refused_from_then_on(emulated, monkeypatch):
    backend = emulated["emulated"] = EmulatedCuda(80)

    def launch(*arguments: object) -> None:
        raise cuda.KernelError("NVRTC 13.0 cannot compile its kernel: no reason")

    monkeypatch.setattr(backend, "launch", launch)
    with pytest.raises(core.check.UnsupportedError, match=r"\n  emulated: NVRTC 13\.0 cannot compile"):
        testing.evaluate_backend(testing.make_inputs(CASES["plain"], torch.float16), "emulated")


def test_cuda_kernel_that_failed_on_one_gpu_is_launched_on_another(emulated, monkeypatch):
    """Only for the first does the next backend have to do."""
    old, new = (Gpu(index, capability, processors=3) for index, capability in ((0, 70), (1, 80)))
    backend = emulated["emulated"] = EmulatedCuda()
    launch = backend.launch

    def launch_on_new(gpu: Gpu, *rest: object) -> None:
        if gpu == old:
            raise cuda.KernelError("the driver does not take its kernel")
        launch(gpu, *rest)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cuda, "_gpu", [old, new].__getitem__)
    monkeypatch.setattr(backend, "launch", launch_on_new)
    call = testing.make_inputs(CASES["plain"], torch.float16)
    for backend.gpu in (old, new, old):
        with nullcontext() if backend.gpu == new else pytest.raises(core.check.UnsupportedError, match="does not take"):
            testing.evaluate_backend(call, "emulated")


def test_cuda_row_that_sees_nothing_has_no_part_in_the_gradient_of_a_sink_of_minus_infinity():
    lse, d_lse = torch.tensor([[[0.0, -torch.inf]]]), torch.tensor([[[0.5, torch.nan]]])
    found = sink_gradient(torch.tensor([-torch.inf]), lse, torch.tensor([[[2.0, 1.0]]]), d_lse)
    assert found.tolist() == [0.0]


@pytest.mark.parametrize("wide", [(False, True), (True, False)])
def test_cuda_segment_ids_may_have_two_widths(wide, emulated):
    emulated["emulated"] = EmulatedCuda(80)
    call = testing.make_inputs(CASES["segments"], torch.float32)
    ids = call.options["segment_ids"]
    call.options["segment_ids"] = tuple(t.long() if is_wide else t.int() for t, is_wide in zip(ids, wide, strict=True))
    results = testing.reference(call).compare(testing.evaluate_backend(call, "emulated"))
    assert [r for r in results if not r.excess <= 1] == []


@pytest.mark.parametrize("capability", [70, 75, 80, 86, 87, 90, 100, 120])
def test_cuda_every_row_fits_its_gpu(capability):
    rows = list(cuda_config.all_rows(capability))
    assert all(row.shared_bytes <= cuda_config.shared_limit(capability) for row in rows)
    dtypes = {torch.float16: 75, torch.bfloat16: 80}
    for dtype, first in dtypes.items():
        found = cuda_config.rows("forward", capability, dtype, 192, 8, 0)
        assert found[0].instantiation.startswith("forward<Tensor<" if capability >= first else "forward<Plain<")
