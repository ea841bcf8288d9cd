"""A Gluon kernel for Hopper, which the PTX machine runs rightly, and mistakes in its source, each of which it sees."""

import pytest
import torch
from ptx.launch import machine
from ptx.program import Fault, Schedule
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

# A missing fence before the store is none: the compiler adds it. test_ptx_faults.py takes that out of the PTX.
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
def _compute(a_ring, b_ring, full, empty, out_desc, c_ptr, start_m, start_n, M, N, K, FAULT: gl.constexpr):
    """The computing warpgroup, one of whose products is in flight while it waits for the next tiles."""
    BLOCK_M: gl.constexpr = out_desc.block_shape[0]
    BLOCK_N: gl.constexpr = out_desc.block_shape[1]
    BLOCK_K: gl.constexpr = a_ring.shape[2]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    FLIP: gl.constexpr = 1 if FAULT == "phase of the reader inverted" else 0
    DONE: gl.constexpr = 0 if FAULT == "released before the product is done" else 1  # so many blocks ago
    ARRIVALS: gl.constexpr = 2 if FAULT == "arrive doubled" else 1
    rows = gl.expand_dims(start_m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LAYOUT)), 1)
    columns = gl.expand_dims(start_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT)), 0)
    if FAULT == "mask missing":
        acc = gl.load(c_ptr + rows * N + columns)
    else:
        acc = gl.load(c_ptr + rows * N + columns, mask=(rows < M) & (columns < N), other=0.0)
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
    out = gl.allocate_shared_memory(out_desc.dtype, out_desc.block_shape, out_desc.layout)
    out.store(acc.to(out_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [start_m, start_n], out)
    if FAULT != "store wait missing":
        tma.store_wait(0)


@gluon.jit
def _product(a_desc, b_desc, out_desc, c_ptr, M, N, K, FAULT: gl.constexpr = None):
    """out = a @ b + c, a tile of it per program."""
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
            (_compute, (a_ring, b_ring, full, empty, out_desc, c_ptr, start_m, start_n, M, N, K, FAULT)),
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
    c = torch.randn(m, n, generator=generator)
    out = torch.full((m, -(-n // 8) * 8), torch.nan, dtype=torch.bfloat16)[:, :n]
    descriptors = (
        _descriptor(tensor, block)
        for tensor, block in ((a, [BLOCK_M, BLOCK_K]), (b, [BLOCK_K, BLOCK_N]), (out, [BLOCK_M, BLOCK_N]))
    )
    with machine("sm_90a", schedule=Schedule(seed=seed)):
        _product[-(-m // BLOCK_M), -(-n // BLOCK_N)](*descriptors, c, m, n, k, FAULT=fault, num_warps=4)
    expected = a.float() @ b.float() + c
    return ((out.float() - expected).abs() / (1 + expected.abs())).max().item()


@pytest.mark.parametrize("m, n, k", [(64, 32, 64), (100, 50, 70), (65, 33, 17), (1, 1, 1), (10, 70, 130)])
def test_gluon_kernel_is_right(m, n, k):
    for seed in SEEDS:
        assert _worst_error(m, n, k, seed) < 2**-8  # half a unit in the last place of bfloat16, and some of float32


@pytest.mark.parametrize("fault", FAULTS)
def test_mistake_in_its_source_is_seen(fault):
    found = []
    for seed in SEEDS:
        try:
            if not _worst_error(70, 40, 100, seed, fault) < 2**-8:  # NaN counts
                found.append("numbers")
        except Fault as error:
            found.append(str(error))
    assert found, "no seed shows the fault"
    if fault == "arrive dropped":
        assert all("wait" in words for words in found), found
