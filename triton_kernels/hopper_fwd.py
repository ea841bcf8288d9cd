"""Fused attention, forward, for Hopper: one warp loads, two warpgroups compute, each on 64 queries of a tile.

A warpgroup multiplies the next block's queries and keys, and the last block's weights and values, while it takes the
exponentials of the block between; and the two take turns in issuing products, so that one's exponentials run beside the
other's products. Source: arXiv:2407.08608 (FlashAttention-3), algorithm 2 and section 3.1. Programs stay, one to a
multiprocessor, and take tile after tile.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import config, hopper, launch
from .hopper import (
    WARPGROUPS,
    coordinates,
    hide,
    leave,
    load_rows,
    masked_blocks,
    new_ring,
    pass_turn,
    tile,
    tile_of_queries,
    unknown_zero,
    visited,
    wait_for_turn,
    wait_full,
)
from .softmax import LOG2_E


@gluon.jit
def _load(rings, descs, outers, problem, GROUP, TILES, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """The loading warp: queries, and keys and values block by block, values a block behind."""
    q_ring, k_ring, v_ring = rings
    q_desc, k_desc, v_desc = descs
    q_outer, k_outer, v_outer, _ = outers
    count = 0
    tiles = 0
    for t in range(gl.program_id(0), TILES, gl.num_programs(0)):
        i_b, i_h, first_m, start_m, n_queries, first_n, _, _, first, last, blocks = tile_of_queries(
            t, problem, BLOCK_M, BLOCK_N
        )
        i_kv = i_h // GROUP
        k_rows = i_b * k_outer + first_n
        v_rows = i_b * v_outer + first_n
        start_n = first + visited(0, blocks) * BLOCK_N
        load_rows(k_ring, count, k_desc, i_kv, k_rows, last, start_n)
        for w in gl.static_range(WARPGROUPS):
            row = start_m + w * (BLOCK_M // WARPGROUPS)
            load_rows(q_ring, tiles * WARPGROUPS + w, q_desc, i_h, i_b * q_outer + first_m, n_queries, row)
        for step in range(1, blocks[0]):
            next_n = first + visited(step, blocks) * BLOCK_N
            load_rows(k_ring, count + 1, k_desc, i_kv, k_rows, last, next_n)
            load_rows(v_ring, count, v_desc, i_kv, v_rows, last, start_n)
            start_n = next_n
            count += 1
        load_rows(v_ring, count, v_desc, i_kv, v_rows, last, start_n)
        count += 1
        tiles += 1


@gluon.jit
def _softmax_step(s, row_max, row_sum, unit, MASKED: gl.constexpr):
    """As `softmax.softmax_step`. MASKED: a row may have seen nothing yet."""
    new_max = gl.maximum(row_max, gl.max(s, 1))
    top = new_max
    if MASKED:
        top = gl.where(new_max == -float("inf"), 0.0, new_max)
    p = gl.exp2((s - gl.expand_dims(top, 1)) * unit)
    rescale = gl.exp2((row_max - top) * unit)
    return p, new_max, row_sum * rescale + gl.sum(p, 1), rescale


@gluon.jit
def _in_pairs(p):
    """The same numbers of 16 bits, two to a register.

    Where they are carried from block to block, LLVM would hold each by itself, and ptxas pack them for every product.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [p], dtype=p.dtype, is_pure=True, pack=2)


@gluon.jit
def _products(q_tile, ring, count, LAYOUT: gl.constexpr):
    """Begins q.k of a block."""
    k_tile = tile(ring, count)
    ROWS: gl.constexpr = q_tile.shape[0]
    BLOCK_N: gl.constexpr = k_tile.shape[0]
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT)
    return warpgroup_mma(q_tile, k_tile.permute([1, 0]), zero, use_acc=False, is_async=True)


@gluon.jit
def _step(state, start_n, rings, limits, unit, WARPGROUP: gl.constexpr, MASKED: gl.constexpr, S_LAYOUT: gl.constexpr):
    """One block: its scores and weights, while the weights of the block before are multiplied with its values."""
    count, p, acc, row_max, row_sum = state
    q_ring, k_ring, v_ring = rings
    q_tile = tile(q_ring, WARPGROUP + unknown_zero())
    wait_full(k_ring, count + 1)
    wait_for_turn(WARPGROUP)
    s = _products(q_tile, k_ring, count + 1, S_LAYOUT)
    wait_full(v_ring, count)
    acc = warpgroup_mma(p, tile(v_ring, count), acc, is_async=True)
    pass_turn(WARPGROUP)
    s = warpgroup_mma_wait(1, deps=(s,))
    leave(k_ring, count + 1)
    if MASKED:
        s = hide(s, start_n, limits)
    weights, row_max, row_sum, rescale = _softmax_step(s, row_max, row_sum, unit, MASKED)
    # Long since full, but the branch of this wait ends a basic block: without it ptxas moves the wait for the product
    # above the exponentials, which then do not run beside it. The values are still held, so the phase is the same.
    wait_full(v_ring, count)
    acc, p = warpgroup_mma_wait(0, deps=(acc, p))
    leave(v_ring, count)
    acc = acc * gl.expand_dims(gl.convert_layout(rescale, gl.SliceLayout(1, acc.type.layout)), 1)
    p = _in_pairs(gl.convert_layout(weights.to(p.dtype), p.type.layout))
    return count + 1, p, acc, row_max, row_sum


@gluon.jit
def _compute(
    WARPGROUP: gl.constexpr, rings, out_desc, statistics, outers, problem, scale, TILES, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """A warpgroup's part: 64 queries of every tile."""
    q_ring, k_ring, v_ring = rings
    H, M, left, right = problem[3], problem[4], problem[8], problem[9]
    lse_ptr, row_max_ptr, log_sum_ptr = statistics
    unit = scale * LOG2_E
    ROWS: gl.constexpr = BLOCK_M // WARPGROUPS
    SIZE: gl.constexpr = q_ring[0].type.shape[5]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, OUT_LAYOUT, 2)
    count = 0
    tiles = 0
    if WARPGROUP == 1:
        pass_turn(WARPGROUP)  # the other one begins
    for t in range(gl.program_id(0), TILES, gl.num_programs(0)):
        i_b, i_h, first_m, start_m, n_queries, _, n_keys, offset, first, _, blocks = tile_of_queries(
            t, problem, BLOCK_M, BLOCK_N
        )
        row = start_m + WARPGROUP * ROWS
        limits = (n_keys - first, row + offset - first, left, right)
        i_q = tiles * WARPGROUPS + WARPGROUP
        q_tile = tile(q_ring, i_q)
        wait_full(q_ring, i_q)
        wait_full(k_ring, count)
        wait_for_turn(WARPGROUP)
        s = _products(q_tile, k_ring, count, S_LAYOUT)
        pass_turn(WARPGROUP)
        s = warpgroup_mma_wait(0, deps=(s,))
        leave(k_ring, count)
        s = hide(s, visited(0, blocks) * BLOCK_N, limits)
        row_max = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
        row_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S_LAYOUT))
        weights, row_max, row_sum, _ = _softmax_step(s, row_max, row_sum, unit, True)
        p = gl.convert_layout(weights.to(q_tile.dtype), P_LAYOUT)
        acc = gl.zeros([ROWS, SIZE], gl.float32, OUT_LAYOUT)
        state = (count, p, acc, row_max, row_sum)
        masked = gl.maximum(masked_blocks(blocks), 1)
        if left is not None or right is not None:
            for step in range(1, masked):
                start_n = visited(step, blocks) * BLOCK_N
                state = _step(state, start_n, rings, limits, unit, WARPGROUP, True, S_LAYOUT)
        for _ in range(masked, blocks[0]):
            state = _step(state, 0, rings, limits, unit, WARPGROUP, False, S_LAYOUT)
        count, p, acc, row_max, row_sum = state
        wait_full(v_ring, count)
        acc = warpgroup_mma(p, tile(v_ring, count), acc, is_async=True)
        total = gl.where(row_sum == 0.0, 1.0, row_sum)
        top = gl.where(row_sum == 0.0, 0.0, row_max)
        rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
        at_rows = (i_b * H + i_h).to(gl.int64) * M + first_m + rows
        log_sum = gl.log2(total)
        lse = gl.where(row_sum == 0.0, -float("inf"), (top * unit + log_sum) / LOG2_E)
        gl.store(lse_ptr + at_rows, lse, mask=rows < n_queries)
        gl.store(row_max_ptr + at_rows, top, mask=rows < n_queries)
        gl.store(log_sum_ptr + at_rows, gl.where(row_sum == 0.0, float("inf"), log_sum), mask=rows < n_queries)
        acc, p = warpgroup_mma_wait(0, deps=(acc, p))
        leave(v_ring, count)
        acc = acc * gl.expand_dims(gl.convert_layout(1.0 / total, gl.SliceLayout(1, OUT_LAYOUT)), 1)
        # Out by way of the queries' own place, which nobody reads any more.
        q_tile.store(acc.to(q_tile.dtype))
        fence_async_shared()
        at = coordinates(i_h, i_b * outers[3] + first_m, n_queries, row)
        tma.async_copy_shared_to_global(out_desc, at, q_ring[0].index(WARPGROUP))
        tma.store_wait(0)
        leave(q_ring, i_q)
        count += 1
        tiles += 1
    if WARPGROUP == 0:
        wait_for_turn(WARPGROUP)  # takes the last pass, so that the barrier ends as it began


@gluon.jit(do_not_specialize=launch.RUNTIME_VALUES)
def _hopper_fwd_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    # [b, h, m]
    lse_ptr,
    row_max_ptr,
    log_sum_ptr,
    # Absent features are None.
    cu_q_ptr,  # [S + 1]
    cu_k_ptr,  # [S + 1]
    lengths_ptr,  # [b]
    # Rows from one batch element to the next.
    outer_q,
    outer_k,
    outer_v,
    outer_o,
    H,
    GROUP,
    M,
    N,
    S,
    offset,
    left,  # or None
    right,  # or None
    BLOCKS,
    SECTION,
    HEADS,
    scale,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    rings = (
        new_ring(q_desc, WARPGROUPS, 1), new_ring(k_desc, STAGES, WARPGROUPS), new_ring(v_desc, STAGES, WARPGROUPS)
    )  # fmt: skip
    fence_async_shared()
    problem = (cu_q_ptr, cu_k_ptr, lengths_ptr, H, M, N, S, offset, left, right, BLOCKS, SECTION, HEADS)
    outers = (outer_q, outer_k, outer_v, outer_o)
    statistics = (lse_ptr, row_max_ptr, log_sum_ptr)
    TILES = BLOCKS * HEADS
    ONE: gl.constexpr = 0
    OTHER: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_compute, (ONE, rings, out_desc, statistics, outers, problem, scale, TILES, BLOCK_M, BLOCK_N)),
            (_compute, (OTHER, rings, out_desc, statistics, outers, problem, scale, TILES, BLOCK_M, BLOCK_N)),
            (_load, (rings, (q_desc, k_desc, v_desc), outers, problem, GROUP, TILES, BLOCK_M, BLOCK_N)),
        ],
        [4, 1],
        [240, 24],
    )


# Padded head size: keys per block, and places in their rings. The most that 227 KB of shared memory hold.
SIZES = {64: (128, 3), 128: (128, 2), 256: (64, 2)}
BLOCK_M = 128


def hopper_fwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, row_max: Tensor, log_sum: Tensor, call: launch.Call
) -> None:
    """As `flash_fwd.flash_fwd`, for a positive scale, and tensors that have elements and that `hopper.fits`."""
    size = hopper.padded_size(q.shape[3], v.shape[3])
    block_n, stages = SIZES[size]
    given = hopper.arguments(q, k, call, q, BLOCK_M)
    rows = BLOCK_M // WARPGROUPS.value
    with launch.on_device_of(q):
        _hopper_fwd_kernel[(min(config.processors(q.device), given["BLOCKS"] * given["HEADS"]),)](
            hopper.descriptor(q, rows, size), hopper.descriptor(k, block_n, size), hopper.descriptor(v, block_n, size),
            hopper.descriptor(out, rows, size), lse, row_max, log_sum, **hopper.outers(q=q, k=k, v=v, o=out), **given,
            scale=call.scale, BLOCK_M=BLOCK_M, BLOCK_N=block_n, STAGES=stages, num_warps=4,
        )  # fmt: skip
