"""Fused attention, backward, for Hopper, in two kernels without atomics, so that its bits are always the same.

The first gives dq, tile by tile of queries, and delta on the way; the second dk and dv, tile by tile of keys. In both
one warp loads and two warpgroups compute, each on 64 rows of a tile. Source: arXiv:2407.08608 (FlashAttention-3),
section 3.1 for the roles, and arXiv:2307.08691, algorithm 2, for the mathematics.

With s the products q.k: p as `softmax.exp_scores`, and ds = p * (dp - delta). -delta is what the accumulators of dp
begin with, so that it takes no registers of its own.
"""

from __future__ import annotations

import torch
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
    new_numbers,
    new_ring,
    place_of,
    run_of,
    settled,
    tile,
    tile_of_keys,
    tile_of_queries,
    unknown_zero,
    visited,
    wait_empty,
    wait_full,
)
from .softmax import LOG2_E, exp_scores

MAX_HEAD_DIM = 128  # dk and dv of 256 columns would not fit a warpgroup's registers


# --- dq


@gluon.jit
def _dq_load(rings, descs, outers, problem, GROUP, TILES, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """The loading warp: the rows of a tile of queries, then keys and values block by block."""
    q_ring, do_ring, o_ring, k_ring, v_ring = rings
    q_desc, do_desc, o_desc, k_desc, v_desc = descs
    outer_q, outer_do, outer_o, outer_k, outer_v, _ = outers
    count = 0
    tiles = 0
    for t in range(gl.program_id(0), TILES, gl.num_programs(0)):
        i_b, i_h, first_m, start_m, n_queries, first_n, _, _, first, last, blocks = tile_of_queries(
            t, problem, BLOCK_M, BLOCK_N
        )
        i_kv = i_h // GROUP
        for w in gl.static_range(WARPGROUPS):
            row = start_m + w * (BLOCK_M // WARPGROUPS)
            place = tiles * WARPGROUPS + w
            load_rows(q_ring, place, q_desc, i_h, i_b * outer_q + first_m, n_queries, row)
            load_rows(do_ring, place, do_desc, i_h, i_b * outer_do + first_m, n_queries, row)
            load_rows(o_ring, place, o_desc, i_h, i_b * outer_o + first_m, n_queries, row)
        for step in range(blocks[0]):
            start_n = first + visited(step, blocks) * BLOCK_N
            load_rows(k_ring, count, k_desc, i_kv, i_b * outer_k + first_n, last, start_n)
            load_rows(v_ring, count, v_desc, i_kv, i_b * outer_v + first_n, last, start_n)
            count += 1
        tiles += 1


@gluon.jit
def _dq_begin(count, tiles, rings, delta, S_LAYOUT: gl.constexpr):
    """Begins the products of a block of keys: s, and dp - delta."""
    k_ring, v_ring = rings
    ROWS: gl.constexpr = delta.shape[0]
    BLOCK_N: gl.constexpr = k_ring[0].type.shape[4]
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    dp = settled(zero - gl.expand_dims(delta, 1))
    wait_full(k_ring, count)
    s = warpgroup_mma(tiles[0], tile(k_ring, count).permute([1, 0]), zero, use_acc=False, is_async=True)
    wait_full(v_ring, count)
    dp = warpgroup_mma(tiles[1], tile(v_ring, count).permute([1, 0]), dp, is_async=True)
    return s, dp


@gluon.jit
def _dq_step(state, start_n, tiles, rings, rows, limits, unit, MASKED: gl.constexpr, S_LAYOUT: gl.constexpr):
    """One block of keys: its ds, while that of the block before is multiplied with its keys."""
    count, ds, dq = state
    k_ring, v_ring = rings
    top, log_sum, delta = rows
    s, dp = _dq_begin(count + 1, tiles, rings, delta, S_LAYOUT)
    dq = warpgroup_mma(ds, tile(k_ring, count), dq, is_async=True)
    s = warpgroup_mma_wait(2, deps=(s,))
    if MASKED:
        s = hide(s, start_n, limits)
    p = exp_scores(s, gl.expand_dims(top, 1), unit, gl.expand_dims(log_sum, 1))
    # As in the forward: this wait has long been over, but keeps the next above from moving over the exponentials.
    wait_full(v_ring, count + 1)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    leave(v_ring, count + 1)
    next_ds = p * dp
    dq, ds = warpgroup_mma_wait(0, deps=(dq, ds))
    leave(k_ring, count)
    return count + 1, gl.convert_layout(next_ds.to(ds.dtype), ds.type.layout), dq


@gluon.jit
def _delta(do_tile, o_tile):
    """The sum of do * o over each row."""
    SIZE: gl.constexpr = do_tile.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // SIZE, SIZE // 8], [4, 1], [1, 0])
    return gl.sum(do_tile.load(LAYOUT).to(gl.float32) * o_tile.load(LAYOUT).to(gl.float32), 1)


@gluon.jit
def _dq_compute(
    WARPGROUP: gl.constexpr, rings, dq_desc, statistics, outers, problem, scale, TILES, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """A warpgroup's part: 64 queries of every tile."""
    q_ring, do_ring, o_ring, k_ring, v_ring = rings
    row_max_ptr, log_sum_ptr, dlse_ptr, delta_ptr = statistics
    unit = scale * LOG2_E
    H, M, left, right = problem[3], problem[4], problem[8], problem[9]
    ROWS: gl.constexpr = BLOCK_M // WARPGROUPS
    SIZE: gl.constexpr = q_ring[0].type.shape[5]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    DS_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, DQ_LAYOUT, 2)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    count = 0
    n_tiles = 0
    for t in range(gl.program_id(0), TILES, gl.num_programs(0)):
        i_b, i_h, first_m, start_m, n_queries, _, n_keys, offset, first, _, blocks = tile_of_queries(
            t, problem, BLOCK_M, BLOCK_N
        )
        row = start_m + WARPGROUP * ROWS
        i_q = n_tiles * WARPGROUPS + WARPGROUP
        at_rows = (i_b * H + i_h).to(gl.int64) * M + first_m + row + gl.arange(0, ROWS, layout=ROW_LAYOUT)
        inside = row + gl.arange(0, ROWS, layout=ROW_LAYOUT) < n_queries
        top = gl.load(row_max_ptr + at_rows, mask=inside, other=0.0)
        log_sum = gl.load(log_sum_ptr + at_rows, mask=inside, other=float("inf"))
        wait_full(do_ring, i_q)
        wait_full(o_ring, i_q)
        delta = gl.convert_layout(_delta(tile(do_ring, i_q), tile(o_ring, i_q)), ROW_LAYOUT)
        leave(o_ring, i_q)
        if dlse_ptr is not None:
            delta = delta - gl.load(dlse_ptr + at_rows, mask=inside, other=0.0)
        gl.store(delta_ptr + at_rows, delta, mask=inside)
        limits = (n_keys - first, row + offset - first, left, right)
        wait_full(q_ring, i_q)
        q_tile = tile(q_ring, i_q)
        tiles = (q_tile, tile(do_ring, i_q))
        s, dp = _dq_begin(count, tiles, (k_ring, v_ring), delta, S_LAYOUT)
        s = hide(warpgroup_mma_wait(1, deps=(s,)), visited(0, blocks) * BLOCK_N, limits)
        p = exp_scores(s, gl.expand_dims(top, 1), unit, gl.expand_dims(log_sum, 1))
        dp = warpgroup_mma_wait(0, deps=(dp,))
        leave(v_ring, count)
        ds = gl.convert_layout((p * dp).to(q_tile.dtype), DS_LAYOUT)
        state = (count, ds, gl.zeros([ROWS, SIZE], gl.float32, DQ_LAYOUT))
        of_rows = (top, log_sum, delta)
        masked = gl.maximum(masked_blocks(blocks), 1)
        if left is not None or right is not None:
            for step in range(1, masked):
                start_n = visited(step, blocks) * BLOCK_N
                state = _dq_step(state, start_n, tiles, (k_ring, v_ring), of_rows, limits, unit, True, S_LAYOUT)
        for _ in range(masked, blocks[0]):
            state = _dq_step(state, 0, tiles, (k_ring, v_ring), of_rows, limits, unit, False, S_LAYOUT)
        count, ds, dq = state
        dq = warpgroup_mma(ds, tile(k_ring, count), dq, is_async=True)
        dq, ds = warpgroup_mma_wait(0, deps=(dq, ds))
        leave(k_ring, count)
        count += 1
        leave(do_ring, i_q)
        # Out by way of the queries' own place, which nobody reads any more.
        q_tile.store((dq * scale).to(q_tile.dtype))
        fence_async_shared()
        at = coordinates(i_h, i_b * outers[5] + first_m, n_queries, row)
        tma.async_copy_shared_to_global(dq_desc, at, q_ring[0].index(WARPGROUP))
        tma.store_wait(0)
        leave(q_ring, i_q)
        n_tiles += 1


@gluon.jit(do_not_specialize=launch.RUNTIME_VALUES)
def _hopper_bwd_dq_kernel(
    q_desc,
    do_desc,
    o_desc,
    k_desc,
    v_desc,
    dq_desc,
    # [b, h, m]
    row_max_ptr,
    log_sum_ptr,
    delta_ptr,  # written
    # Absent features are None.
    dlse_ptr,  # [b, h, m]
    cu_q_ptr,  # [S + 1]
    cu_k_ptr,  # [S + 1]
    lengths_ptr,  # [b]
    # Rows from one batch element to the next.
    outer_q,
    outer_do,
    outer_o,
    outer_k,
    outer_v,
    outer_dq,
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
        new_ring(q_desc, WARPGROUPS, 1), new_ring(do_desc, WARPGROUPS, 1), new_ring(o_desc, WARPGROUPS, 1),
        new_ring(k_desc, STAGES, WARPGROUPS), new_ring(v_desc, STAGES, WARPGROUPS),
    )  # fmt: skip
    fence_async_shared()
    problem = (cu_q_ptr, cu_k_ptr, lengths_ptr, H, M, N, S, offset, left, right, BLOCKS, SECTION, HEADS)
    outers = (outer_q, outer_do, outer_o, outer_k, outer_v, outer_dq)
    statistics = (row_max_ptr, log_sum_ptr, dlse_ptr, delta_ptr)
    descs = (q_desc, do_desc, o_desc, k_desc, v_desc)
    TILES = BLOCKS * HEADS
    ONE: gl.constexpr = 0
    OTHER: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_dq_compute, (ONE, rings, dq_desc, statistics, outers, problem, scale, TILES, BLOCK_M, BLOCK_N)),
            (_dq_compute, (OTHER, rings, dq_desc, statistics, outers, problem, scale, TILES, BLOCK_M, BLOCK_N)),
            (_dq_load, (rings, descs, outers, problem, GROUP, TILES, BLOCK_M, BLOCK_N)),
        ],
        [4, 1],
        [240, 24],
    )


# --- dk and dv


@gluon.jit
def _dkdv_load(rings, descs, statistics, outers, problem, GROUP, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """The loading warp: a tile of keys and values, then block by block queries, do and what is known of their rows, of
    all heads of the group."""
    k_ring, v_ring, q_ring, do_ring, numbers = rings
    k_desc, v_desc, q_desc, do_desc = descs
    outer_k, outer_v, outer_q, outer_do, _, _ = outers
    i_b, i_kv, first_n, start_n, _, n_keys, first_m, _, _, first, last, blocks = tile_of_keys(
        gl.program_id(0), problem, BLOCK_N, BLOCK_M
    )
    H = problem[3] * GROUP
    M = problem[4]
    for w in gl.static_range(WARPGROUPS):
        row = start_n + w * (BLOCK_N // WARPGROUPS)
        load_rows(k_ring, w, k_desc, i_kv, i_b * outer_k + first_n, n_keys, row)
        load_rows(v_ring, w, v_desc, i_kv, i_b * outer_v + first_n, n_keys, row)
    count = 0
    for run in gl.static_range(2):
        first_step, steps = run_of(run, blocks)
        for i in range(GROUP * steps):
            i_h = i_kv * GROUP + i // steps
            start_m = first + visited(first_step + i % steps, blocks) * BLOCK_M
            head = (i_b * H + i_h).to(gl.int64) * M + first_m
            _load_statistics(numbers, q_ring, count, statistics, head, last, start_m)
            load_rows(q_ring, count, q_desc, i_h, i_b * outer_q + first_m, last, start_m)
            load_rows(do_ring, count, do_desc, i_h, i_b * outer_do + first_m, last, start_m)
            count += 1


@gluon.jit
def _load_statistics(numbers, q_ring, count, statistics, head, last, start_m):
    """Brings what is known of the rows from `start_m` on, before their queries come."""
    BLOCK_M: gl.constexpr = numbers.type.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([BLOCK_M // 32], [32], [1], [0])
    row_max_ptr, log_sum_ptr, delta_ptr = statistics
    i_m = start_m + gl.arange(0, BLOCK_M, layout=LAYOUT)
    inside = i_m < last
    row_max = gl.load(row_max_ptr + head + i_m, mask=inside, other=0.0)
    log_sum = gl.load(log_sum_ptr + head + i_m, mask=inside, other=float("inf"))
    delta = gl.load(delta_ptr + head + i_m, mask=inside, other=0.0)
    place, _ = place_of(q_ring, count)
    wait_empty(q_ring, count)
    numbers.index(3 * place).store(row_max)
    numbers.index(3 * place + 1).store(log_sum)
    numbers.index(3 * place + 2).store(delta)


@gluon.jit
def _dkdv_step(
    state, start_m, rings, limits, unit, WARPGROUP: gl.constexpr, MASKED: gl.constexpr, S_LAYOUT: gl.constexpr
):
    """One block of queries, with the scores transposed: [64 keys, BLOCK_M]."""
    count, dk, dv = state
    k_ring, v_ring, q_ring, do_ring, numbers = rings
    here = WARPGROUP + unknown_zero()
    ROWS: gl.constexpr = dk.shape[0]
    BLOCK_M: gl.constexpr = numbers.type.shape[1]
    COLUMNS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    DTYPE: gl.constexpr = q_ring[0].dtype
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    zero = gl.zeros([ROWS, BLOCK_M], gl.float32, S_LAYOUT)
    q_tile = tile(q_ring, count)
    do_tile = tile(do_ring, count)
    place, _ = place_of(q_ring, count)
    wait_full(q_ring, count)
    dp = settled(zero - gl.expand_dims(numbers.index(3 * place + 2).load(COLUMNS), 0))
    s = warpgroup_mma(tile(k_ring, here), q_tile.permute([1, 0]), zero, use_acc=False, is_async=True)
    wait_full(do_ring, count)
    dp = warpgroup_mma(tile(v_ring, here), do_tile.permute([1, 0]), dp, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    if MASKED:
        s = hide(s, start_m, limits)
    top = gl.expand_dims(numbers.index(3 * place).load(COLUMNS), 0)
    p = exp_scores(s, top, unit, gl.expand_dims(numbers.index(3 * place + 1).load(COLUMNS), 0))
    p_half = gl.convert_layout(p.to(DTYPE), A_LAYOUT)
    dv = warpgroup_mma(p_half, do_tile, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    ds = p * dp
    if MASKED:  # a value that no query sees may be NaN, and so is its dp
        ds = gl.where(p == 0.0, 0.0, ds)
    ds = gl.convert_layout(ds.to(DTYPE), A_LAYOUT)
    dk = warpgroup_mma(ds, q_tile, dk, is_async=True)
    dv, p_half = warpgroup_mma_wait(1, deps=(dv, p_half))
    leave(do_ring, count)
    dk, ds = warpgroup_mma_wait(0, deps=(dk, ds))
    leave(q_ring, count)
    return count + 1, dk, dv


@gluon.jit
def _dkdv_compute(
    WARPGROUP: gl.constexpr, rings, descs, outers, problem, scale, GROUP, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr
):  # fmt: skip
    """A warpgroup's part: 64 keys of a tile."""
    k_ring, v_ring, _, _, _ = rings
    unit = scale * LOG2_E
    left, right = problem[8], problem[9]
    ROWS: gl.constexpr = BLOCK_N // WARPGROUPS
    SIZE: gl.constexpr = k_ring[0].type.shape[5]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    D_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    i_b, i_kv, first_n, start_n, rows, n_keys, _, n_queries, offset, first, _, blocks = tile_of_keys(
        gl.program_id(0), problem, BLOCK_N, BLOCK_M
    )
    row = start_n + WARPGROUP * ROWS
    # A key stands where the query of its own number would, less the offset, and what was its left is its right.
    # Queries past the end need no mask: their log_sum leaves them no weights.
    limits = (None, row - offset - first, right, left)
    wait_full(k_ring, WARPGROUP)
    wait_full(v_ring, WARPGROUP)
    tiles = (tile(k_ring, WARPGROUP), tile(v_ring, WARPGROUP))
    state = (0, gl.zeros([ROWS, SIZE], gl.float32, D_LAYOUT), gl.zeros([ROWS, SIZE], gl.float32, D_LAYOUT))
    for run in gl.static_range(2):
        first_step, steps = run_of(run, blocks)
        for i in range(GROUP * steps):
            start_m = visited(first_step + i % steps, blocks) * BLOCK_M
            state = _dkdv_step(state, start_m, rings, limits, unit, WARPGROUP, run == 0, S_LAYOUT)
    _, dk, dv = state
    # Keys past the length, or that only queries past the end see, were not masked: their own rows alone are wrong.
    seen = n_keys if right is None else gl.minimum(n_keys, n_queries + offset + right)
    keep = gl.expand_dims(row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, D_LAYOUT)) < seen, 1)
    tiles[1].store(gl.where(keep, dv, 0.0).to(tiles[1].dtype))
    tiles[0].store(gl.where(keep, dk * (unit / LOG2_E), 0.0).to(tiles[0].dtype))
    fence_async_shared()
    dk_desc, dv_desc = descs
    at = coordinates(i_kv, i_b * outers[4] + first_n, rows, row)
    tma.async_copy_shared_to_global(dk_desc, at, k_ring[0].index(WARPGROUP))
    at = coordinates(i_kv, i_b * outers[5] + first_n, rows, row)
    tma.async_copy_shared_to_global(dv_desc, at, v_ring[0].index(WARPGROUP))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=launch.RUNTIME_VALUES)
def _hopper_bwd_dkdv_kernel(
    k_desc,
    v_desc,
    q_desc,
    do_desc,
    dk_desc,
    dv_desc,
    # [b, h, m]
    row_max_ptr,
    log_sum_ptr,
    delta_ptr,
    # Absent features are None.
    cu_q_ptr,  # [S + 1]
    cu_k_ptr,  # [S + 1]
    lengths_ptr,  # [b]
    # Rows from one batch element to the next.
    outer_k,
    outer_v,
    outer_q,
    outer_do,
    outer_dk,
    outer_dv,
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
    q_ring = new_ring(q_desc, STAGES, WARPGROUPS)
    rings = (
        new_ring(k_desc, WARPGROUPS, 1), new_ring(v_desc, WARPGROUPS, 1),
        q_ring, new_ring(do_desc, STAGES, WARPGROUPS), new_numbers(q_ring, 3, BLOCK_M),
    )  # fmt: skip
    fence_async_shared()
    problem = (cu_q_ptr, cu_k_ptr, lengths_ptr, H, M, N, S, offset, left, right, BLOCKS, SECTION, HEADS)
    outers = (outer_k, outer_v, outer_q, outer_do, outer_dk, outer_dv)
    descs = (k_desc, v_desc, q_desc, do_desc)
    out = (dk_desc, dv_desc)
    statistics = (row_max_ptr, log_sum_ptr, delta_ptr)
    ONE: gl.constexpr = 0
    OTHER: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_dkdv_compute, (ONE, rings, out, outers, problem, scale, GROUP, BLOCK_M, BLOCK_N)),
            (_dkdv_compute, (OTHER, rings, out, outers, problem, scale, GROUP, BLOCK_M, BLOCK_N)),
            (_dkdv_load, (rings, descs, statistics, outers, problem, GROUP, BLOCK_M, BLOCK_N)),
        ],
        [4, 1],
        [240, 24],
    )


# --- the launches

# Padded head size: rows per block of the other side, and places in their rings.
DQ_SIZES = {64: (64, 4), 128: (64, 3)}
DKDV_SIZES = {64: (128, 3), 128: (64, 2)}
BLOCK = 128  # rows of a tile


def hopper_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    call: launch.Call,
) -> None:
    """Writes dq, dk and dv. As `flash_bwd.flash_bwd`, for head sizes up to MAX_HEAD_DIM and what `hopper_fwd` takes."""
    size, rows = hopper.padded_size(q.shape[3], v.shape[3]), BLOCK // WARPGROUPS.value
    tensors = {"q": q, "do": d_out, "o": out, "k": k, "v": v, "dq": dq, "dk": dk, "dv": dv}
    tiles = {name: hopper.descriptor(t, rows, size) for name, t in tensors.items()}
    delta = torch.empty_like(log_sum)
    numbers = {"scale": call.scale, "num_warps": 4}
    with launch.on_device_of(q):
        block, stages = DQ_SIZES[size]
        given = hopper.arguments(q, k, call, q, BLOCK)
        _hopper_bwd_dq_kernel[(min(config.processors(q.device), given["BLOCKS"] * given["HEADS"]),)](
            tiles["q"], tiles["do"], tiles["o"], hopper.descriptor(k, block, size), hopper.descriptor(v, block, size),
            tiles["dq"], row_max, log_sum, delta, d_lse,
            **hopper.outers(q=q, do=d_out, o=out, k=k, v=v, dq=dq), **given, **numbers,
            BLOCK_M=BLOCK, BLOCK_N=block, STAGES=stages,
        )  # fmt: skip
        block, stages = DKDV_SIZES[size]
        if call.left is not None or call.packed:  # what says where a band begins takes registers, too
            block = 64
        given = hopper.arguments(q, k, call, k, BLOCK)
        _hopper_bwd_dkdv_kernel[(given["BLOCKS"] * given["HEADS"],)](
            tiles["k"], tiles["v"], hopper.descriptor(q, block, size), hopper.descriptor(d_out, block, size),
            tiles["dk"], tiles["dv"], row_max, log_sum, delta,
            **hopper.outers(k=k, v=v, q=q, do=d_out, dk=dk, dv=dv), **given, **numbers,
            BLOCK_M=block, BLOCK_N=BLOCK, STAGES=stages,
        )  # fmt: skip
