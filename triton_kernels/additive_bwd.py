"""Fused additive attention, backward: with t_ijc = tanh(q_ic + k_jc), computed again, and ds as in `flash_bwd`

    dq_ic = scale * weight_c sum_j ds_ij (1 - t_ijc^2)       dweight_c = scale * sum_ij ds_ij t_ijc
    dk_jc = scale * weight_c sum_i ds_ij (1 - t_ijc^2)

Grid and order of the sums are those of `flash_bwd`; nothing is atomic. The sums over one tile are added to float32
tensors in memory, whose rows one program owns: no register can be chosen by the column. The first kernel sums dweight
over its block of queries, the host over the blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .additive import (
    CHUNK,
    MOST_ROWS,
    NOT_ADDITIVE,
    add_tile,
    additive_scores,
    common_arguments,
    is_mild,
    pair_gradients,
    parts_start,
    set_column,
    sums_start,
)
from .flash_bwd import row_dots
from .flash_bwd_bias import flash_bwd_bias
from .mask import visible
from .philox import dropout_keep
from .schedule import (
    MASKED_RUN,
    block_start,
    first_run,
    held_keys,
    hides_inside,
    keys_seen,
    load_ids,
    locate,
    num_blocks,
    queries_seeing,
    run_length,
    stages,
    stop_run,
    visited_blocks,
    within_ids,
    within_windows,
)
from .score import load_slope, through_softcap, to_scores
from .softmax import LOG2_E, exp_scores, score_gradient
from .tiles import (
    head_start,
    load_d_lse,
    load_statistic,
    load_tile,
    score_ptrs,
    scores_start,
    statistics_start,
    store_tile,
)


@triton.jit(do_not_specialize=launch.RUNTIME_VALUES)
def _additive_bwd_dq_kernel(
    v_ptr,
    weight_ptr,  # float32 [h, a], a padded to EVEN columns, as in the next two
    q_parts_ptr,  # float32 [b, h, a, 3, m]
    k_parts_ptr,  # float32 [b, hk, a, 3, n]
    q_reach_ptr,  # float32 [b, h, m]
    k_reach_ptr,  # float32 [b, hk, n]
    out_ptr,
    do_ptr,
    dq_ptr,  # float32 [b, h, m, a] of zeros
    dweight_ptr,  # float32 [b, h, blocks of queries, a] of zeros
    # [b, h, m]
    row_max_ptr,
    log_sum_ptr,
    delta_ptr,  # written here
    dlse_ptr,  # or None
    dbias_ptr,  # [b, h, m, n] of zeros, or None
    # Absent features are None.
    mask_ptr,  # uint8
    bias_ptr,
    lengths_ptr,  # [b]
    q_ids_ptr,  # [b, m]
    k_ids_ptr,  # [b, n]
    id_ranges_ptr,  # [b, blocks of keys, 2]
    q_ranks_ptr,  # [b, m]
    k_ranks_ptr,  # [b, n]
    rank_ranges_ptr,  # [b, blocks of keys, 2]
    row_first_ptr,  # [b, m]
    row_stop_ptr,  # [b, m]
    slopes_ptr,  # [sequences, h]
    seed_ptr,  # []
    cu_q_ptr,  # [S + 1]
    cu_k_ptr,  # [S + 1]
    stride_vb: tl.int64,
    stride_vh: tl.int64,
    stride_vn: tl.int64,
    stride_ob: tl.int64,
    stride_oh: tl.int64,
    stride_om: tl.int64,
    stride_dob: tl.int64,
    stride_doh: tl.int64,
    stride_dom: tl.int64,
    stride_mask_b: tl.int64,
    stride_mask_h: tl.int64,
    stride_mask_m: tl.int64,
    stride_mask_n: tl.int64,
    stride_bias_b: tl.int64,
    stride_bias_h: tl.int64,
    stride_bias_m: tl.int64,
    stride_bias_n: tl.int64,
    stride_dbias_b: tl.int64,
    stride_dbias_h: tl.int64,
    stride_dbias_m: tl.int64,
    stride_dbias_n: tl.int64,
    H,
    GROUP,
    M,
    N,
    Q_TILES,  # of MOST_ROWS rows, into which those of the parts go
    K_TILES,
    S,
    offset,
    left,  # or None
    right,  # or None
    scale,
    magnitude,
    factor,
    softcap,  # or None
    threshold,
    inv_keep,
    NATIVE: tl.constexpr,
    EVEN: tl.constexpr,
    MASK_CONTIGUOUS: tl.constexpr,
    ALIGN: tl.constexpr,
    OFFSET: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = num_blocks(M, cu_q_ptr, S, BLOCK_M)
    i_h = tl.program_id(0) // blocks % H
    i_b = tl.program_id(0) // blocks // H
    i_s = i_b
    block = tl.program_id(0) % blocks
    first_m = None
    first_n = None
    n_queries = M
    n_keys = N
    if cu_q_ptr is not None:
        i_s, block, first_m, n_queries, first_n, n_keys = locate(block, cu_q_ptr, cu_k_ptr, S, M, N, BLOCK_M)
        offset = n_keys - n_queries
    start_m = tl.maximum(tl.cdiv(n_queries, BLOCK_M) - 1 - block, 0) * BLOCK_M
    n_keys = held_keys(lengths_ptr, i_b, n_keys)
    v_base = head_start(v_ptr, i_b, i_h // GROUP, first_n, stride_vb, stride_vh, stride_vn, ALIGN)
    mask_base = scores_start(mask_ptr, i_b, i_h, stride_mask_b, stride_mask_h)
    bias_base = scores_start(bias_ptr, i_b, i_h, stride_bias_b, stride_bias_h)
    dbias_base = scores_start(dbias_ptr, i_b, i_h, stride_dbias_b, stride_dbias_h)
    slope = load_slope(slopes_ptr, i_s * H + i_h)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    EXACT: tl.constexpr = v_ptr.dtype.element_ty == tl.float32
    HIDES: tl.constexpr = hides_inside(mask_ptr, q_ids_ptr, q_ranks_ptr, row_first_ptr)
    unit = factor * LOG2_E

    q_rows = Q_TILES * MOST_ROWS
    k_rows = K_TILES * MOST_ROWS
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_m = start_m + rows < n_queries
    # [BLOCK_M, BLOCK_DV]
    do_base = head_start(do_ptr, i_b, i_h, first_m, stride_dob, stride_doh, stride_dom, ALIGN)
    do_tile = load_tile(do_base, stride_dom, start_m, in_m, True, HEAD_DIM_V, BLOCK_M, BLOCK_DV, ALIGN, OFFSET)
    out_base = head_start(out_ptr, i_b, i_h, first_m, stride_ob, stride_oh, stride_om, ALIGN)
    out_tile = load_tile(out_base, stride_om, start_m, in_m, True, HEAD_DIM_V, BLOCK_M, BLOCK_DV, ALIGN, OFFSET)
    # [BLOCK_M]
    i_m = start_m + rows
    delta = row_dots(do_tile, out_tile, EXACT)
    d_lse = load_d_lse(dlse_ptr, i_b, i_h, H, M, first_m, i_m, in_m, 1)
    top = load_statistic(row_max_ptr, i_b, i_h, H, M, first_m, i_m, in_m, 0.0)
    log_sum = load_statistic(log_sum_ptr, i_b, i_h, H, M, first_m, i_m, in_m, float("inf"))
    delta = tl.where(log_sum == float("inf"), 0.0, delta)
    tl.store(statistics_start(delta_ptr, i_b, i_h, H, M, first_m) + i_m, delta, mask=in_m)
    q_parts = parts_start(q_parts_ptr, i_b, i_h, H, q_rows, first_m, EVEN) + start_m
    q_reach_ptrs = statistics_start(q_reach_ptr, i_b, i_h, H, q_rows, first_m) + start_m + rows
    q_reach = tl.load(q_reach_ptrs)
    k_parts_base = parts_start(k_parts_ptr, i_b, i_h // GROUP, H // GROUP, k_rows, first_n, EVEN)
    k_reach_base = statistics_start(k_reach_ptr, i_b, i_h // GROUP, H // GROUP, k_rows, first_n)
    weight_base = weight_ptr + i_h * EVEN
    dq_base = sums_start(dq_ptr, i_b, i_h, H, M, first_m, HEAD_DIM)
    dweight_base = dweight_ptr + tl.program_id(0).to(tl.int64) * HEAD_DIM

    stop_m = tl.minimum(start_m + BLOCK_M, n_queries)
    first, last, first_full, last_full = keys_seen(start_m, stop_m, n_keys, offset, left, right)
    row_first = load_ids(row_first_ptr, i_b, M, (start_m + rows)[:, None], in_m[:, None])
    row_stop = load_ids(row_stop_ptr, i_b, M, (start_m + rows)[:, None], in_m[:, None])
    first, last, first_full, last_full = within_windows(
        first, last, first_full, last_full, row_first, row_stop, in_m[:, None]
    )
    start, full_start, full_stop, stop = visited_blocks(first, last, first_full, last_full, mask_base, BLOCK_N)
    q_ids = load_ids(q_ids_ptr, i_b, M, (start_m + rows)[:, None], in_m[:, None])
    start, full_start, full_stop, stop = within_ids(
        start, full_start, full_stop, stop, q_ids, in_m[:, None], id_ranges_ptr, i_b, N, "same", BLOCK_N
    )
    q_ranks = load_ids(q_ranks_ptr, i_b, M, (start_m + rows)[:, None], in_m[:, None])
    start, full_start, full_stop, stop = within_ids(
        start, full_start, full_stop, stop, q_ranks, in_m[:, None], rank_ranges_ptr, i_b, N, "lower", BLOCK_N
    )
    for run in tl.static_range(stop_run(mask_ptr)):
        length = run_length(run, start, full_start, full_stop, stop)
        for step in tl.range(0, length, BLOCK_N, num_stages=stages(run, q_ids_ptr, q_ranks_ptr, row_first_ptr)):
            start_n = block_start(run, step, start, full_start, full_stop, BLOCK_N)
            # A key that no query of the tile sees is not read: its NaN would survive multiplication by a ds of 0.
            wanted = (start_n + cols >= first) & (start_n + cols < last)
            k_parts = k_parts_base + start_n
            mild = is_mild(q_reach, tl.load(k_reach_base + start_n + cols))
            # [BLOCK_M, BLOCK_N]
            s = additive_scores(
                q_parts, k_parts, rows[:, None], cols[None, :], q_rows, k_rows, in_m[:, None], wanted[None, :],
                mild, weight_base, NATIVE, HEAD_DIM, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            s, t = to_scores(
                s, start_m, start_n, rows[:, None], cols[None, :], n_queries, n_keys, offset, magnitude, softcap,
                slope, bias_base, stride_bias_m, stride_bias_n, OFFSET,
            )  # fmt: skip
            p = exp_scores(s, top[:, None], unit, log_sum[:, None])
            # Read again for each tile, because it would take registers through the columns' loops.
            do_tile = load_tile(do_base, stride_dom, start_m, in_m, True, HEAD_DIM_V, BLOCK_M, BLOCK_DV, ALIGN, OFFSET)
            # [BLOCK_N, BLOCK_DV]
            v_tile = load_tile(
                v_base, stride_vn, start_n, wanted, run == MASKED_RUN, HEAD_DIM_V, BLOCK_N, BLOCK_DV, ALIGN, OFFSET
            )
            dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
            if seed_ptr is not None:
                keep = dropout_keep(seed, threshold, i_s, i_h, start_m + rows, start_n, BLOCK_M, BLOCK_N)
                dp = tl.where(keep, dp * inv_keep, 0.0)
            ds = score_gradient(p, dp, delta[:, None], d_lse)
            if run == MASKED_RUN:
                j_n = (start_n + cols)[None, :]
                k_ids = load_ids(k_ids_ptr, i_b, N, j_n, j_n < n_keys)
                k_ranks = load_ids(k_ranks_ptr, i_b, N, j_n, j_n < n_keys)
                see = visible(
                    start_m, start_n, rows[:, None], cols[None, :], n_queries, n_keys, offset, left, right,
                    mask_base, stride_mask_m, stride_mask_n, MASK_CONTIGUOUS, OFFSET,
                    q_ids, k_ids, q_ranks, k_ranks, row_first, row_stop,
                )  # fmt: skip
                ds = tl.where(see, ds, 0.0)
                if HIDES:
                    wanted = wanted & (tl.max(see.to(tl.int32), 0) > 0)
            if dbias_ptr is not None:
                dbias_ptrs = score_ptrs(
                    dbias_base, start_m, start_n, rows[:, None], cols[None, :], stride_dbias_m, stride_dbias_n, OFFSET
                )
                inside = in_m[:, None] & (start_n + cols < n_keys)[None, :]
                tl.store(dbias_ptrs, ds.to(dbias_ptr.dtype.element_ty), mask=inside)
            ds = through_softcap(ds, t, softcap)
            for first_c in tl.range(0, HEAD_DIM, CHUNK):
                dq = tl.zeros([BLOCK_M, CHUNK], dtype=tl.float32)
                dweight = tl.zeros([BLOCK_M, CHUNK], dtype=tl.float32)
                for c in tl.range(first_c, tl.minimum(first_c + CHUNK, HEAD_DIM), 2):
                    i = c - first_c
                    slopes_0, slopes_1, sums_0, sums_1 = pair_gradients(
                        ds, q_parts, k_parts, rows[:, None], cols[None, :], q_rows, k_rows, in_m[:, None],
                        wanted[None, :], mild, c, NATIVE,
                    )  # fmt: skip
                    dq = set_column(set_column(dq, i, slopes_0), i + 1, slopes_1)
                    dweight = set_column(set_column(dweight, i, sums_0), i + 1, sums_1)
                i_c = first_c + tl.arange(0, CHUNK)
                w = tl.load(weight_base + i_c, mask=i_c < HEAD_DIM, other=0.0)
                add_tile(dq_base, start_m, in_m, first_c, dq * (w * scale)[None, :], HEAD_DIM, BLOCK_M)
                dweight_ptrs = dweight_base + i_c
                dweight = tl.load(dweight_ptrs, mask=i_c < HEAD_DIM, other=0.0) + tl.sum(dweight, 0)
                tl.store(dweight_ptrs, dweight, mask=i_c < HEAD_DIM)
            tl.debug_barrier()  # another thread may read these sums for the next tile


@triton.jit(do_not_specialize=launch.RUNTIME_VALUES)
def _additive_bwd_dkdv_kernel(
    v_ptr,
    weight_ptr,  # float32 [h, a], a padded to EVEN columns, as in the next two
    q_parts_ptr,  # float32 [b, h, a, 3, m]
    k_parts_ptr,  # float32 [b, hk, a, 3, n]
    q_reach_ptr,  # float32 [b, h, m]
    k_reach_ptr,  # float32 [b, hk, n]
    do_ptr,
    dk_ptr,  # float32 [b, hk, n, a] of zeros
    dv_ptr,
    # [b, h, m]
    row_max_ptr,
    log_sum_ptr,
    delta_ptr,
    dlse_ptr,  # or None
    # Absent features are None.
    mask_ptr,  # uint8
    bias_ptr,
    lengths_ptr,  # [b]
    q_ids_ptr,  # [b, m]
    k_ids_ptr,  # [b, n]
    id_ranges_ptr,  # [b, blocks of queries, 2]
    q_ranks_ptr,  # [b, m]
    k_ranks_ptr,  # [b, n]
    rank_ranges_ptr,  # [b, blocks of queries, 2]
    row_first_ptr,  # [b, m]
    row_stop_ptr,  # [b, m]
    window_ranges_ptr,  # [b, blocks of queries, 4]
    slopes_ptr,  # [sequences, h]
    seed_ptr,  # []
    cu_q_ptr,  # [S + 1]
    cu_k_ptr,  # [S + 1]
    stride_vb: tl.int64,
    stride_vh: tl.int64,
    stride_vn: tl.int64,
    stride_dob: tl.int64,
    stride_doh: tl.int64,
    stride_dom: tl.int64,
    stride_dvb: tl.int64,
    stride_dvh: tl.int64,
    stride_dvn: tl.int64,
    stride_mask_b: tl.int64,
    stride_mask_h: tl.int64,
    stride_mask_m: tl.int64,
    stride_mask_n: tl.int64,
    stride_bias_b: tl.int64,
    stride_bias_h: tl.int64,
    stride_bias_m: tl.int64,
    stride_bias_n: tl.int64,
    H,
    GROUP,
    M,
    N,
    Q_TILES,  # of MOST_ROWS rows, into which those of the parts go
    K_TILES,
    S,
    offset,
    left,  # or None
    right,  # or None
    scale,
    magnitude,
    factor,
    softcap,  # or None
    threshold,
    inv_keep,
    NATIVE: tl.constexpr,
    EVEN: tl.constexpr,
    GROUPED: tl.constexpr,
    MASK_CONTIGUOUS: tl.constexpr,
    ALIGN: tl.constexpr,
    OFFSET: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = num_blocks(N, cu_k_ptr, S, BLOCK_N)
    num_kv_heads = H // GROUP
    i_kv = tl.program_id(0) // blocks % num_kv_heads
    i_b = tl.program_id(0) // blocks // num_kv_heads
    i_s = i_b
    block = tl.program_id(0) % blocks
    first_m = None
    first_n = None
    n_queries = M
    all_keys = N
    if cu_k_ptr is not None:
        i_s, block, first_n, all_keys, first_m, n_queries = locate(block, cu_k_ptr, cu_q_ptr, S, N, M, BLOCK_N)
        offset = all_keys - n_queries
    start_n = block * BLOCK_N
    n_keys = all_keys
    n_keys = held_keys(lengths_ptr, i_b, n_keys)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    unit = factor * LOG2_E

    q_rows = Q_TILES * MOST_ROWS
    k_rows = K_TILES * MOST_ROWS
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_keys = start_n + cols < n_keys
    k_parts = parts_start(k_parts_ptr, i_b, i_kv, num_kv_heads, k_rows, first_n, EVEN) + start_n
    k_reach_ptrs = statistics_start(k_reach_ptr, i_b, i_kv, num_kv_heads, k_rows, first_n) + start_n + cols
    k_reach = tl.load(k_reach_ptrs)
    dk_base = sums_start(dk_ptr, i_b, i_kv, num_kv_heads, N, first_n, HEAD_DIM)
    v_base = head_start(v_ptr, i_b, i_kv, first_n, stride_vb, stride_vh, stride_vn, ALIGN)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)

    stop_n = tl.minimum(start_n + BLOCK_N, n_keys)
    first, last, first_full, last_full = queries_seeing(
        start_n, stop_n, tl.cdiv(n_queries, BLOCK_M) * BLOCK_M, offset, left, right
    )
    start, full_start, full_stop, stop = visited_blocks(first, last, first_full, last_full, mask_ptr, BLOCK_M)
    k_ids = load_ids(k_ids_ptr, i_b, N, (start_n + cols)[:, None], in_keys[:, None])
    start, full_start, full_stop, stop = within_ids(
        start, full_start, full_stop, stop, k_ids, in_keys[:, None], id_ranges_ptr, i_b, M, "same", BLOCK_M
    )
    k_ranks = load_ids(k_ranks_ptr, i_b, N, (start_n + cols)[:, None], in_keys[:, None])
    start, full_start, full_stop, stop = within_ids(
        start, full_start, full_stop, stop, k_ranks, in_keys[:, None], rank_ranges_ptr, i_b, M, "higher", BLOCK_M
    )
    if row_first_ptr is not None:
        start, full_start, full_stop, stop = within_ids(
            start, full_start, full_stop, stop, (start_n + cols)[:, None], in_keys[:, None],
            window_ranges_ptr, i_b, M, "windows", BLOCK_M,
        )  # fmt: skip
    HIDES: tl.constexpr = hides_inside(mask_ptr, q_ids_ptr, q_ranks_ptr, row_first_ptr)
    HAS_MASKED: tl.constexpr = left is not None or right is not None or HIDES
    # The query heads of the group follow one another in one loop, so that its pipeline never drains between them.
    for run in tl.static_range(first_run(HAS_MASKED), stop_run(mask_ptr)):
        length = run_length(run, start, full_start, full_stop, stop)
        for step in tl.range(0, length * GROUP, BLOCK_M, num_stages=stages(run, q_ids_ptr, q_ranks_ptr, row_first_ptr)):
            i_h = i_kv
            if GROUPED:
                i_h = i_kv * GROUP + step // length
                step = step % length
            start_m = block_start(run, step, start, full_start, full_stop, BLOCK_M)
            in_m = start_m + rows < n_queries
            i_m = start_m + rows
            q_parts = parts_start(q_parts_ptr, i_b, i_h, H, q_rows, first_m, EVEN) + start_m
            q_reach_ptrs = statistics_start(q_reach_ptr, i_b, i_h, H, q_rows, first_m) + i_m
            mild = is_mild(tl.load(q_reach_ptrs), k_reach)
            weight_base = weight_ptr + i_h * EVEN
            # [BLOCK_M]
            top = load_statistic(row_max_ptr, i_b, i_h, H, M, first_m, i_m, in_m, 0.0)
            log_sum = load_statistic(log_sum_ptr, i_b, i_h, H, M, first_m, i_m, in_m, float("inf"))
            bias_base = scores_start(bias_ptr, i_b, i_h, stride_bias_b, stride_bias_h)
            slope = load_slope(slopes_ptr, i_s * H + i_h)
            # [BLOCK_N, BLOCK_M]
            s_t = additive_scores(
                q_parts, k_parts, rows[None, :], cols[:, None], q_rows, k_rows, in_m[None, :], in_keys[:, None],
                mild, weight_base, NATIVE, HEAD_DIM, BLOCK_N, BLOCK_M,
            )  # fmt: skip
            s_t, t_t = to_scores(
                s_t, start_m, start_n, rows[None, :], cols[:, None], n_queries, n_keys, offset, magnitude, softcap,
                slope, bias_base, stride_bias_m, stride_bias_n, OFFSET,
            )  # fmt: skip
            p_t = exp_scores(s_t, top[None, :], unit, log_sum[None, :])
            # [BLOCK_M, BLOCK_DV]
            do_base = head_start(do_ptr, i_b, i_h, first_m, stride_dob, stride_doh, stride_dom, ALIGN)
            do_tile = load_tile(do_base, stride_dom, start_m, in_m, True, HEAD_DIM_V, BLOCK_M, BLOCK_DV, ALIGN, OFFSET)
            # [BLOCK_N, BLOCK_DV], read again for each tile, because it would take registers through the columns' loops.
            v_tile = load_tile(v_base, stride_vn, start_n, in_keys, True, HEAD_DIM_V, BLOCK_N, BLOCK_DV, ALIGN, OFFSET)
            dp_t = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
            delta = load_statistic(delta_ptr, i_b, i_h, H, M, first_m, i_m, in_m, 0.0)
            d_lse = load_d_lse(dlse_ptr, i_b, i_h, H, M, first_m, i_m, in_m, 0)
            if run == MASKED_RUN:
                mask_base = scores_start(mask_ptr, i_b, i_h, stride_mask_b, stride_mask_h)
                q_ids = load_ids(q_ids_ptr, i_b, M, i_m[None, :], in_m[None, :])
                q_ranks = load_ids(q_ranks_ptr, i_b, M, i_m[None, :], in_m[None, :])
                row_first = load_ids(row_first_ptr, i_b, M, i_m[None, :], in_m[None, :])
                row_stop = load_ids(row_stop_ptr, i_b, M, i_m[None, :], in_m[None, :])
                see = visible(
                    start_m, start_n, rows[None, :], cols[:, None], n_queries, n_keys, offset, left, right,
                    mask_base, stride_mask_m, stride_mask_n, MASK_CONTIGUOUS, OFFSET,
                    q_ids, k_ids, q_ranks, k_ranks, row_first, row_stop,
                )  # fmt: skip
                p_t = tl.where(see, p_t, 0.0)
            p_kept = p_t
            if seed_ptr is not None:
                keep = tl.trans(dropout_keep(seed, threshold, i_s, i_h, start_m + rows, start_n, BLOCK_M, BLOCK_N))
                p_kept = tl.where(keep, p_t * inv_keep, 0.0)
                dp_t = tl.where(keep, dp_t * inv_keep, 0.0)
            dv = tl.dot(p_kept.to(do_tile.dtype), do_tile, dv, input_precision="ieee")
            ds_t = score_gradient(p_t, dp_t, delta[None, :], d_lse)
            seen = in_keys
            if run == MASKED_RUN:
                ds_t = tl.where(see, ds_t, 0.0)
                seen = in_keys & (tl.max(see.to(tl.int32), 1) > 0)  # the NaN of another key would stay with a ds of 0
            ds_t = through_softcap(ds_t, t_t, softcap)
            for first_c in tl.range(0, HEAD_DIM, CHUNK):
                dk = tl.zeros([BLOCK_N, CHUNK], dtype=tl.float32)
                for c in tl.range(first_c, tl.minimum(first_c + CHUNK, HEAD_DIM), 2):
                    i = c - first_c
                    slopes_0, slopes_1, _, _ = pair_gradients(
                        ds_t, q_parts, k_parts, rows[None, :], cols[:, None], q_rows, k_rows, in_m[None, :],
                        seen[:, None], mild, c, NATIVE,
                    )  # fmt: skip
                    dk = set_column(set_column(dk, i, slopes_0), i + 1, slopes_1)
                i_c = first_c + tl.arange(0, CHUNK)
                w = tl.load(weight_base + i_c, mask=i_c < HEAD_DIM, other=0.0)
                add_tile(dk_base, start_n, in_keys, first_c, dk * (w * scale)[None, :], HEAD_DIM, BLOCK_N)
            tl.debug_barrier()  # another thread may read these sums for the next tile

    # Keys past the length were never masked above, only their own rows of dv are wrong.
    in_n = start_n + cols < all_keys
    dv = tl.where(in_keys[:, None], dv, 0.0)
    dv_base = head_start(dv_ptr, i_b, i_kv, first_n, stride_dvb, stride_dvh, stride_dvn, ALIGN)
    store_tile(dv_base, stride_dvn, start_n, in_n, dv, HEAD_DIM_V, BLOCK_N, BLOCK_DV, ALIGN, OFFSET)


def additive_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    out: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dweight: Tensor,
    dbias: Tensor | None,
    call: launch.Call,
) -> Tensor:
    """As `flash_bwd`, with the weight [h, a] of additive scores and its gradient."""
    (b, h, m, a), (hk, n) = q.shape, k.shape[1:3]
    delta = torch.empty_like(log_sum)
    dq_sums, dk_sums = log_sum.new_zeros(b, h, m, a), log_sum.new_zeros(b, hk, n, a)
    common = common_arguments(q, k, v, weight, call) | launch.layout(
        v, out, d_out, dv, scores=(call.mask, call.bias, dbias)
    )
    common["scale"] = abs(call.scale)  # its sign is the weight's
    owned = dbias is not None and dbias.shape == (b, h, m, n)
    with launch.on_device_of(q):
        sizes = launch.sizes("additive dq", q, k, v, call)
        blocks = call.blocks(m, sizes.block_m)
        dweight_sums = log_sum.new_zeros(b, h, blocks, a)
        if b * m > 0:
            _additive_bwd_dq_kernel[(blocks * h * b,)](
                v_ptr=v, out_ptr=out, do_ptr=d_out, dq_ptr=dq_sums, dweight_ptr=dweight_sums,
                row_max_ptr=row_max, log_sum_ptr=log_sum, delta_ptr=delta, dlse_ptr=d_lse,
                **launch.strides(v=v, o=out, do=d_out), **common, **sizes.arguments(),
                **launch.score_tensor("dbias", dbias if owned else None, b, h, m, n),
                **launch.ranges(call.k_segments, call.k_ranks, sizes.block_n),
            )  # fmt: skip
        sizes = launch.sizes("additive dkdv", q, k, v, call)
        if b * n > 0:
            _additive_bwd_dkdv_kernel[(call.blocks(n, sizes.block_n) * hk * b,)](
                v_ptr=v, do_ptr=d_out, dk_ptr=dk_sums, dv_ptr=dv,
                row_max_ptr=row_max, log_sum_ptr=log_sum, delta_ptr=delta, dlse_ptr=d_lse,
                **launch.strides(v=v, do=d_out, dv=dv), **common, **sizes.arguments(),
                GROUPED=h != hk, **launch.ranges(call.q_segments, call.q_ranks, sizes.block_m),
                window_ranges_ptr=launch.window_ranges(call.row_first, call.row_stop, sizes.block_m),
            )  # fmt: skip
        if dbias is not None and not owned and b * m * n > 0:
            additive = {name: common[name] for name in NOT_ADDITIVE}
            flash_bwd_bias(q, k, v, row_max, log_sum, delta, d_lse, d_out, dbias, call, additive)
    dq.copy_(dq_sums)
    dk.copy_(dk_sums)
    dweight.copy_(dweight_sums.sum((0, 2)) * call.scale)
    return delta
