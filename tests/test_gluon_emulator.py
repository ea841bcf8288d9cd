"""The emulator of Hopper on the CPU: right kernels give right numbers for every seed, and wrong ones are found out."""

import pytest
import torch

pytest.importorskip("triton")

from gluon_emulator import Deadlock, GluonError, launch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

PLACES = gl.constexpr(2)  # of the ring
BLOCK_M, BLOCK_N, BLOCK_K = 64, 32, 16
SEEDS = range(8)

FAULTS = (
    "arrive dropped",
    "arrive doubled",
    "phase of the reader inverted",
    "phase of the writer inverted",
    "full wait missing",
    "empty wait missing",
    "expected bytes of one load missing",
    "released before the product is done",
    "result used before its wait",
    "fence missing",
    "store wait missing",
    "mask missing",
)


@gluon.jit
def _load(a_desc, b_desc, a_ring, b_ring, full, empty, start_m, start_n, K, FAULT: gl.constexpr):
    """The loading warp."""
    BLOCK_K: gl.constexpr = a_desc.block_shape[1]
    NBYTES: gl.constexpr = a_desc.block_type.nbytes + (
        b_desc.block_type.nbytes if FAULT != "expected bytes of one load missing" else 0
    )
    FLIP: gl.constexpr = 0 if FAULT == "phase of the writer inverted" else 1
    for i in range(gl.cdiv(K, BLOCK_K)):
        place = i % PLACES
        if FAULT != "empty wait missing":
            mbarrier.wait(empty.index(place), (i // PLACES & 1) ^ FLIP)
        mbarrier.expect(full.index(place), NBYTES)
        tma.async_copy_global_to_shared(a_desc, [start_m, i * BLOCK_K], full.index(place), a_ring.index(place))
        tma.async_copy_global_to_shared(b_desc, [i * BLOCK_K, start_n], full.index(place), b_ring.index(place))


@gluon.jit
def _compute(a_ring, b_ring, full, empty, out_desc, bias_ptr, start_m, start_n, N, K, FAULT: gl.constexpr):
    """The computing warpgroup, one of whose products is in flight while it waits for the next tiles."""
    BLOCK_M: gl.constexpr = out_desc.block_shape[0]
    BLOCK_N: gl.constexpr = out_desc.block_shape[1]
    BLOCK_K: gl.constexpr = a_ring.shape[2]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    FLIP: gl.constexpr = 1 if FAULT == "phase of the reader inverted" else 0
    DONE: gl.constexpr = 0 if FAULT == "released before the product is done" else 1  # so many blocks ago
    ARRIVALS: gl.constexpr = 2 if FAULT == "arrive doubled" else 1
    acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, LAYOUT)
    for i in range(gl.cdiv(K, BLOCK_K)):
        place = i % PLACES
        if FAULT != "full wait missing":
            mbarrier.wait(full.index(place), (i // PLACES & 1) ^ FLIP)
        acc = warpgroup_mma(a_ring.index(place), b_ring.index(place), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        if FAULT != "arrive dropped" and i >= DONE:
            mbarrier.arrive(empty.index((i - DONE) % PLACES), count=ARRIVALS)
    if FAULT != "result used before its wait":
        acc = warpgroup_mma_wait(0, deps=(acc,))
    columns = start_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
    if FAULT == "mask missing":
        bias = gl.load(bias_ptr + columns)
    else:
        bias = gl.load(bias_ptr + columns, mask=columns < N, other=0.0)
    out = gl.allocate_shared_memory(out_desc.dtype, out_desc.block_shape, out_desc.layout)
    out.store((acc + gl.expand_dims(bias, 0)).to(out_desc.dtype))
    if FAULT != "fence missing":
        fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [start_m, start_n], out)
    if FAULT != "store wait missing":
        tma.store_wait(0)


@gluon.jit
def _linear(a_desc, b_desc, out_desc, bias_ptr, N, K, FAULT: gl.constexpr = None):
    """out = a @ b + bias, a tile of it per program."""
    # The compiler has no star in a list.
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [PLACES] + a_desc.block_shape, a_desc.layout)  # noqa: RUF005
    b_ring = gl.allocate_shared_memory(b_desc.dtype, [PLACES] + b_desc.block_shape, b_desc.layout)  # noqa: RUF005
    full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(PLACES):
        mbarrier.init(full.index(place), count=1)
        mbarrier.init(empty.index(place), count=1)
    fence_async_shared()
    start_m = gl.program_id(0) * out_desc.block_shape[0]
    start_n = gl.program_id(1) * out_desc.block_shape[1]
    gl.warp_specialize(
        [
            (_compute, (a_ring, b_ring, full, empty, out_desc, bias_ptr, start_m, start_n, N, K, FAULT)),
            (_load, (a_desc, b_desc, a_ring, b_ring, full, empty, start_m, start_n, K, FAULT)),
        ],
        [1],
        [24],
    )


def _descriptor(tensor, block):
    return TensorDescriptor.from_tensor(tensor, block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16))


def _worst_error(m, n, k, seed, fault=None):
    generator = torch.Generator().manual_seed(seed)
    # Rows of 16 bytes or multiples, as TMA wants them, of which the tensor may take less.
    a, b = (
        torch.randn(rows, -(-columns // 8) * 8, generator=generator).bfloat16()[:, :columns]
        for rows, columns in ((m, k), (k, n))
    )
    bias = torch.randn(n, generator=generator)
    out = torch.full((m, -(-n // 8) * 8), torch.nan, dtype=torch.bfloat16)[:, :n]
    grid = (-(-m // BLOCK_M), -(-n // BLOCK_N))
    descriptors = (
        _descriptor(tensor, block)
        for tensor, block in ((a, [BLOCK_M, BLOCK_K]), (b, [BLOCK_K, BLOCK_N]), (out, [BLOCK_M, BLOCK_N]))
    )
    launch(_linear, grid, *descriptors, bias, n, k, FAULT=fault, seed=seed)
    expected = a.float() @ b.float() + bias
    return ((out.float() - expected).abs() / (1 + expected.abs())).max().item()


@pytest.mark.parametrize("m, n, k", [(64, 32, 64), (100, 50, 70), (65, 33, 17), (1, 1, 1), (10, 70, 130)])
@pytest.mark.parametrize("seed", SEEDS)
def test_gluon_emulator_kernel_is_right(m, n, k, seed):
    assert _worst_error(m, n, k, seed) < 2**-8  # half a unit in the last place of bfloat16, and some of float32


@pytest.mark.parametrize("fault", FAULTS)
def test_gluon_emulator_finds_faults(fault):
    found = []
    for seed in SEEDS:
        try:
            if not _worst_error(70, 40, 100, seed, fault) < 2**-8:  # NaN counts
                found.append("numbers")
        except GluonError as error:
            found.append(type(error))
    assert found, "no seed shows the fault"
    if fault == "arrive dropped":
        assert set(found) == {Deadlock}


@gluon.jit
def _maxima(x_ptr, out_ptr, SIZE: gl.constexpr):
    x = gl.load(x_ptr + gl.arange(0, SIZE))
    gl.store(out_ptr, gl.max(x, 0))
    gl.store(out_ptr + 1, gl.min(x, 0))
    gl.store(out_ptr + 2, gl.max(gl.maximum(x, 2.0), 0))


def test_gluon_emulator_maxima_drop_nan():
    out = torch.empty(3)
    launch(_maxima, (1,), torch.tensor([1.0, torch.nan, -1.0, 0.0]), out, SIZE=4)
    assert out.tolist() == [1.0, -1.0, 2.0]
    launch(_maxima, (1,), torch.full((4,), torch.nan), out, SIZE=4)
    assert out.isnan().tolist() == [True, True, False]
