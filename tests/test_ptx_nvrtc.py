"""The CUDA C++ kernels as NVRTC compiles them, in the PTX machine: each wrapper of instructions, and whole calls.

What tests/cuda_host puts in the place of csrc/cuda/hw.cuh is here what that file says: instructions, and the order of
their operands.
"""

from __future__ import annotations

import platform
import sys
import zlib

import numpy as np
import pytest
import torch
from ptx.cases import ALL, DTYPES
from ptx.nvrtc import MachineCuda, compiled
from ptx.program import Schedule
from ptx.small import buffer
from test_kvcache import OPTIONS, cache, held_against_definition
from test_ptx_matrices import a_place, b_place, c_place, fragments, integers

from pyattn import core, cuda_kernels, registry, testing
from pyattn.backends import cuda_config

if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip("NVRTC, a test dependency, is installed on Linux on x86-64 only", allow_module_level=True)

TYPES = {"uint16": "u16", "uint32": "u32", "float32": "float"}
HALVES = {"half_t": torch.float16, "bf16_t": torch.bfloat16}
LANES = np.arange(32, dtype=np.float32)
# For each lane a number: plain ones, ties between two halves, subnormal ones, zeros, and what is too large.
NUMBERS = np.concatenate(
    [
        LANES[:20] * np.float32(0.37) - 3,
        np.array([2049, 2051, 257, 259, 1e-7, -0.0, 0, 65519, 65520, 1e38, np.inf, -np.inf]),
    ]
).astype(np.float32)


def run(body: str, capability: int, *arrays: np.ndarray, shared: int = 0) -> None:
    """Runs one warp of a kernel with the arrays a0, a1, ... and the lane's number i."""
    parameters = ", ".join(f"{TYPES[array.dtype.name]}* a{k}" for k, array in enumerate(arrays))
    source = (
        f'#include "hw.cuh"\nextern "C" __global__ void small({parameters}) {{\nint i = thread_index();\n{body}\n}}'
    )
    program = compiled(source, cuda_kernels.sources(), capability, threads=32)
    given = program.pack([array.ctypes.data for array in arrays])
    program.run((1, 1, 1), given, [buffer(array) for array in arrays], shared)


def bits(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("capability", [75, 80])
@pytest.mark.parametrize("name", HALVES)
def test_number_formats(name: str, capability: int) -> None:
    rounded = torch.from_numpy(NUMBERS).to(HALVES[name])
    narrow, pairs, wide = np.zeros(32, np.uint16), np.zeros(32, np.uint32), np.zeros(32, np.float32)
    body = f"""
        {name} x;
        round_to(x, a0[i]);
        a1[i] = x.bits;
        a2[i] = pack<{name}>(a0[i], a0[31 - i]);
        a3[i] = widen(x);
    """
    run(body, capability, NUMBERS, narrow, pairs, wide)
    np.testing.assert_array_equal(narrow, bits(rounded))
    np.testing.assert_array_equal(pairs.view(np.uint16).reshape(32, 2), np.stack([narrow, narrow[::-1]], 1))
    np.testing.assert_array_equal(wide, rounded.float().numpy())


def test_powers_of_two() -> None:
    out, given = np.zeros(32, np.float32), NUMBERS.clip(-200, 127)
    run("a0[i] = exp_2(a1[i]);", 80, out, given)
    np.testing.assert_allclose(out, np.exp2(given.astype(np.float64)), rtol=2.0**-22, atol=2.0**-126)


@pytest.mark.parametrize("capability", [75, 80])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_from_shared_memory(transposed: bool, capability: int) -> None:
    """Lane 8 i + r says where row r of matrix i lies; of it lane 4 g + t gets columns 2 t and 2 t + 1 of row g."""
    matrices = np.arange(4 * 8 * 8, dtype=np.uint16).reshape(4, 8, 8)
    out = np.zeros((32, 4), np.uint32)
    load = "load_transposed" if transposed else "load_matrices"
    body = f"""
        u16* rows = reinterpret_cast<u16*>(shared_memory());
        for (int k = 0; k < 8; ++k) rows[24 * i + k] = a1[8 * i + k];
        barrier();
        u32 x[4];
        {load}(x, rows + 24 * i);
        for (int k = 0; k < 4; ++k) a0[4 * i + k] = x[k];
    """
    run(body, capability, out, matrices, shared=32 * 48)
    given = matrices.transpose(0, 2, 1) if transposed else matrices
    expected = given.reshape(4, 32, 2).transpose(1, 0, 2)  # [lane, matrix, column]
    np.testing.assert_array_equal(out.view(np.uint16).reshape(32, 4, 2), expected)


@pytest.mark.parametrize(("name", "capability"), [("half_t", 75), ("half_t", 80), ("bf16_t", 80)])
def test_product_of_matrices(name: str, capability: int) -> None:
    a, b, c = integers(16, 16, seed=0), integers(16, 8, seed=1), integers(16, 8, seed=2)

    def halves(matrix: np.ndarray, place, number: int) -> np.ndarray:
        return bits(torch.from_numpy(fragments(matrix, place, number)).to(HALVES[name])).view(np.uint32).copy()

    out = fragments(c, c_place, 4)
    body = f"""
        u32 a[4];
        float c[4];
        for (int k = 0; k < 4; ++k) a[k] = a1[4 * i + k], c[k] = a0[4 * i + k];
        multiply<{name}>(c, a, a2[2 * i], a2[2 * i + 1]);
        for (int k = 0; k < 4; ++k) a0[4 * i + k] = c[k];
    """
    run(body, capability, out, halves(a, a_place, 8), halves(b, b_place, 4))
    np.testing.assert_array_equal(out, fragments(a @ b + c, c_place, 4))


@pytest.mark.parametrize("capability", [75, 80])
def test_copies_to_shared_memory(capability: int) -> None:
    """Every other lane copies zeros, and from nowhere. The last group but one may still be on its way."""
    given, out = np.arange(32 * 8, dtype=np.uint32), np.zeros((32, 8), np.uint32)
    body = """
        u32* to = reinterpret_cast<u32*>(shared_memory()) + 8 * i;
        for (int half = 0; half < 2; ++half) {
            copy16(to + 4 * half, i % 2 ? a1 + 8 * i + 4 * half : nullptr, i % 2);
            copies_end();
        }
        copies_wait<1>();
        for (int k = 0; k < 4; ++k) a0[8 * i + k] = to[k];
        copies_wait<0>();
        for (int k = 4; k < 8; ++k) a0[8 * i + k] = to[k];
    """
    run(body, capability, out, given, shared=32 * 32)
    np.testing.assert_array_equal(out, np.where(np.arange(32)[:, None] % 2, given.reshape(32, 8), 0))


@pytest.mark.parametrize("capability", [75, 80])
def test_exchange_between_lanes(capability: int) -> None:
    out, given = np.zeros((2, 32), np.uint32), np.arange(100, 132, dtype=np.uint32)
    run("a0[i] = shuffle(a1[i], 31 - i); a0[32 + i] = shuffle_xor(a1[i], 2);", capability, out, given)
    np.testing.assert_array_equal(out, [given[::-1], given[np.arange(32) ^ 2]])


# Whole calls, forward and backward: each kernel, with matrix units of both chips and without.
CALLS = (
    (80, "plain", "f16"), (80, "everything", "bf16"), (80, "packed-causal", "f16"), (80, "large-head-size", "bf16"),
    (80, "bias-shared", "f16"), (80, "decode-everything", "bf16"), (80, "plain", "f32"), (80, "bias-shared", "f32"),
    (80, "everything", "f64"), (75, "everything", "f16"), (75, "decode-everything", "f16"),
)  # fmt: skip


@pytest.fixture(scope="module")
def launched() -> set[str]:
    """The instantiations that ran."""
    return set()


@pytest.mark.parametrize(("capability", "case", "dtype"), CALLS)
def test_call_is_as_accurate_as_plain_pytorch(
    capability: int, case: str, dtype: str, launched: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = zlib.crc32(f"{capability}{case}{dtype}".encode())
    backend = MachineCuda(capability, Schedule(seed=seed))
    monkeypatch.setitem(registry.BACKENDS, "machine", backend)
    results = testing.check_case("machine", ALL[case], (DTYPES | {"f64": torch.float64})[dtype])
    assert len(results) >= 5  # out, lse and gradients
    assert [result for result in results if not result.excess <= 1] == []
    launched |= backend.launched


def test_paged_cache_is_as_accurate_as_plain_pytorch() -> None:
    x, numbers = core.prepare(**cache(24, 7, torch.bfloat16), **OPTIONS["alibi-softcap-sinks"], cached=True)
    results = held_against_definition(MachineCuda(80), x, numbers)
    assert [result for result in results if not result.excess <= 1] == []


def test_every_kernel_ran(launched: set[str]) -> None:
    ran = {(name.partition("<")[0], "Tensor" in name) for name in launched}
    if {name for name, _ in ran} >= {"forward", "decode", "backward_bias"}:  # not of a part of the tests
        wanted = {(kernel, tensor) for kernel in cuda_config.KERNELS for tensor in (True, False)}
        assert wanted - ran == {("decode", False)}  # whose product is the forward's
