"""Fused attention, backward: the gradients of q, k, v, bias and sinks, recomputing the probabilities.

    ds = p * (dp - delta + d_lse)    dp = d_out v^T    delta_i = out_i . d_out_i
    dq = scale * ds k        dk = scale * ds^T q        dv = p^T d_out        dbias = ds

(and with a softcap, ds times its slope in dq and dk). Source: arXiv:2307.08691, algorithm 2, split so that every sum
has one fixed order and no atomics. Grid: the dq kernel has one program per block of queries and walks over keys; the
dk/dv kernel has one program per block of keys of one key/value head and walks over the queries of its group's heads.
The first also writes delta for the others, and dbias unless the bias broadcasts, which is `flash_bwd_bias`'s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .flash_bwd_bias import flash_bwd_bias
from .flash_bwd_relative import flash_bwd_relative
from .mask import drop_unseen, visible
from .philox import dropout_keep
from .relative import (
    Relative,
    add_query_gradient,
    load_low_and_high,
    load_rows,
    matrix_start,
    relative_products,
    store_rows,
)
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


@triton.jit
def row_dots(x, y, EXACT: tl.constexpr):
    """x_i . y_i for the rows of two tiles [ROWS, BLOCK]. Returns float32 [ROWS]."""
    if EXACT:
        # By the matrix product, which sums in the order that dp is summed in: where a row has nearly all its weight on
        # one key, dp - delta is a difference of equals, and another order would leave its rounding in the gradient.
        products = tl.dot(x, tl.trans(y), input_precision="ieee")
        index = tl.arange(0, x.shape[0])
        return tl.sum(tl.where(index[:, None] == index[None, :], products, 0.0), 1)
    return tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)


@triton.jit(do_not_specialize=launch.RUNTIME_VALUES)
def _flash_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    do_ptr,
    dq_ptr,
    # [b, h, m]
    row_max_ptr,
    log_sum_ptr,
    delta_ptr,  # written here
    dlse_ptr,  # or None
    dbias_ptr,  # [b, h, m, n] of zeros, or None
    drq_ptr,  # [b, h, m, HEAD_DIM_E], contiguous, or None
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
    # Of a relative term, as `relative` has them.
    rq_ptr,
    rk_ptr,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_qm: tl.int64,
    stride_kb: tl.int64,
    stride_kh: tl.int64,
    stride_kn: tl.int64,
    stride_vb: tl.int64,
    stride_vh: tl.int64,
    stride_vn: tl.int64,
    stride_ob: tl.int64,
    stride_oh: tl.int64,
    stride_om: tl.int64,
    stride_dob: tl.int64,
    stride_doh: tl.int64,
    stride_dom: tl.int64,
    stride_dqb: tl.int64,
    stride_dqh: tl.int64,
    stride_dqm: tl.int64,
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
    S,
    rk_heads,
    distances,
    first_distance,
    offset,
    left,  # or None
    right,  # or None
    scale,
    magnitude,
    factor,
    softcap,  # or None
    threshold,
    inv_keep,
    SCALE_SIGN: tl.constexpr,
    MASK_CONTIGUOUS: tl.constexpr,
    ALIGN: tl.constexpr,
    OFFSET: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    HEAD_DIM_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_E: tl.constexpr,
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
    k_base = head_start(k_ptr, i_b, i_h // GROUP, first_n, stride_kb, stride_kh, stride_kn, ALIGN)
    v_base = head_start(v_ptr, i_b, i_h // GROUP, first_n, stride_vb, stride_vh, stride_vn, ALIGN)
    mask_base = scores_start(mask_ptr, i_b, i_h, stride_mask_b, stride_mask_h)
    bias_base = scores_start(bias_ptr, i_b, i_h, stride_bias_b, stride_bias_h)
    dbias_base = scores_start(dbias_ptr, i_b, i_h, stride_dbias_b, stride_dbias_h)
    slope = load_slope(slopes_ptr, i_s * H + i_h)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    HIDES: tl.constexpr = hides_inside(mask_ptr, q_ids_ptr, q_ranks_ptr, row_first_ptr)
    unit = factor * LOG2_E

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
    # [BLOCK_M, BLOCK_D]
    q_base = head_start(q_ptr, i_b, i_h, first_m, stride_qb, stride_qh, stride_qm, ALIGN)
    q_tile = load_tile(q_base, stride_qm, start_m, in_m, True, HEAD_DIM, BLOCK_M, BLOCK_D, ALIGN, OFFSET)
    if SCALE_SIGN != 1:
        q_tile = q_tile * SCALE_SIGN
    if rq_ptr is not None:
        rq_base = matrix_start(rq_ptr, i_b * H + i_h, M, HEAD_DIM_E)
        rq_tile = load_rows(rq_base, start_m, M, HEAD_DIM_E, BLOCK_M, BLOCK_E)
        if SCALE_SIGN != 1:
            rq_tile = rq_tile * SCALE_SIGN
        rk_base = matrix_start(rk_ptr, i_b * rk_heads + i_h, distances, HEAD_DIM_E)
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if rq_ptr is not None:
        drq = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)

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
            # [BLOCK_N, BLOCK_D]
            k_tile = load_tile(
                k_base, stride_kn, start_n, wanted, run == MASKED_RUN, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN, OFFSET
            )
            # [BLOCK_N, BLOCK_DV]
            v_tile = load_tile(
                v_base, stride_vn, start_n, wanted, run == MASKED_RUN, HEAD_DIM_V, BLOCK_N, BLOCK_DV, ALIGN, OFFSET
            )
            # [BLOCK_M, BLOCK_N]
            s = None
            if rq_ptr is not None:
                row = start_m - start_n + offset - first_distance
                low, high = load_low_and_high(rk_base, row, distances, HEAD_DIM_E, BLOCK_N, BLOCK_E)
                s = relative_products(rq_tile, low, high, start_n, 1)
            s = tl.dot(q_tile, tl.trans(k_tile), s, input_precision="ieee")
            s, t = to_scores(
                s, start_m, start_n, rows[:, None], cols[None, :], n_queries, n_keys, offset, magnitude, softcap,
                slope, bias_base, stride_bias_m, stride_bias_n, OFFSET,
            )  # fmt: skip
            p = exp_scores(s, top[:, None], unit, log_sum[:, None])
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
                k_tile = drop_unseen(k_tile, see, HIDES)
            if dbias_ptr is not None:
                dbias_ptrs = score_ptrs(
                    dbias_base, start_m, start_n, rows[:, None], cols[None, :], stride_dbias_m, stride_dbias_n, OFFSET
                )
                inside = in_m[:, None] & (start_n + cols < n_keys)[None, :]
                tl.store(dbias_ptrs, ds.to(dbias_ptr.dtype.element_ty), mask=inside)
            ds = through_softcap(ds, t, softcap)
            dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
            if rq_ptr is not None:
                drq = add_query_gradient(drq, ds, low, high, start_n)

    dq_base = head_start(dq_ptr, i_b, i_h, first_m, stride_dqb, stride_dqh, stride_dqm, ALIGN)
    store_tile(dq_base, stride_dqm, start_m, in_m, dq * scale, HEAD_DIM, BLOCK_M, BLOCK_D, ALIGN, OFFSET)
    if rq_ptr is not None:
        drq_base = matrix_start(drq_ptr, i_b * H + i_h, M, HEAD_DIM_E)
        store_rows(drq_base, start_m, M, drq * scale, HEAD_DIM_E, BLOCK_M, BLOCK_E)


@triton.jit(do_not_specialize=launch.RUNTIME_VALUES)
def _flash_bwd_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    dk_ptr,
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
    # Of a relative term, as `relative` has them.
    rq_ptr,
    rk_ptr,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_qm: tl.int64,
    stride_kb: tl.int64,
    stride_kh: tl.int64,
    stride_kn: tl.int64,
    stride_vb: tl.int64,
    stride_vh: tl.int64,
    stride_vn: tl.int64,
    stride_dob: tl.int64,
    stride_doh: tl.int64,
    stride_dom: tl.int64,
    stride_dkb: tl.int64,
    stride_dkh: tl.int64,
    stride_dkn: tl.int64,
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
    S,
    rk_heads,
    distances,
    first_distance,
    offset,
    left,  # or None
    right,  # or None
    scale,
    magnitude,
    factor,
    softcap,  # or None
    threshold,
    inv_keep,
    SCALE_SIGN: tl.constexpr,
    GROUPED: tl.constexpr,
    MASK_CONTIGUOUS: tl.constexpr,
    ALIGN: tl.constexpr,
    OFFSET: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    HEAD_DIM_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_E: tl.constexpr,
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

    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_keys = start_n + cols < n_keys
    # [BLOCK_N, BLOCK_D]
    k_base = head_start(k_ptr, i_b, i_kv, first_n, stride_kb, stride_kh, stride_kn, ALIGN)
    k_tile = load_tile(k_base, stride_kn, start_n, in_keys, True, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN, OFFSET)
    if SCALE_SIGN != 1:
        k_tile = k_tile * SCALE_SIGN
    # [BLOCK_N, BLOCK_DV]
    v_base = head_start(v_ptr, i_b, i_kv, first_n, stride_vb, stride_vh, stride_vn, ALIGN)
    v_tile = load_tile(v_base, stride_vn, start_n, in_keys, True, HEAD_DIM_V, BLOCK_N, BLOCK_DV, ALIGN, OFFSET)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
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
            # [BLOCK_M, BLOCK_D]
            q_base = head_start(q_ptr, i_b, i_h, first_m, stride_qb, stride_qh, stride_qm, ALIGN)
            q_tile = load_tile(q_base, stride_qm, start_m, in_m, True, HEAD_DIM, BLOCK_M, BLOCK_D, ALIGN, OFFSET)
            # [BLOCK_M, BLOCK_DV]
            do_base = head_start(do_ptr, i_b, i_h, first_m, stride_dob, stride_doh, stride_dom, ALIGN)
            do_tile = load_tile(do_base, stride_dom, start_m, in_m, True, HEAD_DIM_V, BLOCK_M, BLOCK_DV, ALIGN, OFFSET)
            # [BLOCK_M]
            top = load_statistic(row_max_ptr, i_b, i_h, H, M, first_m, i_m, in_m, 0.0)
            log_sum = load_statistic(log_sum_ptr, i_b, i_h, H, M, first_m, i_m, in_m, float("inf"))
            bias_base = scores_start(bias_ptr, i_b, i_h, stride_bias_b, stride_bias_h)
            slope = load_slope(slopes_ptr, i_s * H + i_h)
            # [BLOCK_N, BLOCK_M]
            s_t = None
            if rq_ptr is not None:
                rq_base = matrix_start(rq_ptr, i_b * H + i_h, M, HEAD_DIM_E)
                rq_tile = load_rows(rq_base, start_m, M, HEAD_DIM_E, BLOCK_M, BLOCK_E)
                rk_base = matrix_start(rk_ptr, i_b * rk_heads + i_h, distances, HEAD_DIM_E)
                row = start_m - start_n + offset - first_distance
                low, high = load_low_and_high(rk_base, row, distances, HEAD_DIM_E, BLOCK_N, BLOCK_E)
                s_t = relative_products(rq_tile * SCALE_SIGN, low, high, start_m, 0)
            s_t = tl.dot(k_tile, tl.trans(q_tile), s_t, input_precision="ieee")
            s_t, t_t = to_scores(
                s_t, start_m, start_n, rows[None, :], cols[:, None], n_queries, n_keys, offset, magnitude, softcap,
                slope, bias_base, stride_bias_m, stride_bias_n, OFFSET,
            )  # fmt: skip
            p_t = exp_scores(s_t, top[None, :], unit, log_sum[None, :])
            dp_t = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
            # While the product runs: before it, registers are scarce.
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
            elif rq_ptr is not None:  # of a query past the end, 0 times infinite numbers of a distance
                p_t = tl.where(in_m[None, :], p_t, 0.0)
            p_kept = p_t
            if seed_ptr is not None:
                keep = tl.trans(dropout_keep(seed, threshold, i_s, i_h, start_m + rows, start_n, BLOCK_M, BLOCK_N))
                p_kept = tl.where(keep, p_t * inv_keep, 0.0)
                dp_t = tl.where(keep, dp_t * inv_keep, 0.0)
            dv = tl.dot(p_kept.to(do_tile.dtype), do_tile, dv, input_precision="ieee")
            ds_t = score_gradient(p_t, dp_t, delta[None, :], d_lse)
            if run == MASKED_RUN:
                ds_t = tl.where(see, ds_t, 0.0)
            ds_t = through_softcap(ds_t, t_t, softcap)
            dk = tl.dot(ds_t.to(q_tile.dtype), q_tile, dk, input_precision="ieee")

    # Keys past the length were never masked above, only their own rows of dk and dv are wrong.
    in_n = start_n + cols < all_keys
    dk = tl.where(in_keys[:, None], dk * scale, 0.0)
    dv = tl.where(in_keys[:, None], dv, 0.0)
    dk_base = head_start(dk_ptr, i_b, i_kv, first_n, stride_dkb, stride_dkh, stride_dkn, ALIGN)
    store_tile(dk_base, stride_dkn, start_n, in_n, dk, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN, OFFSET)
    dv_base = head_start(dv_ptr, i_b, i_kv, first_n, stride_dvb, stride_dvh, stride_dvn, ALIGN)
    store_tile(dv_base, stride_dvn, start_n, in_n, dv, HEAD_DIM_V, BLOCK_N, BLOCK_DV, ALIGN, OFFSET)


def flash_bwd(
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
    dbias: Tensor | None,
    drelative: Relative | None,
    call: launch.Call,
) -> Tensor:
    """Writes the gradients dq, dk, dv, dbias, whose zeros need not be written, and drelative. Returns delta [b, h, m].

    Every tensor [b, heads, rows, size] has a last stride of 1. row_max, log_sum and d_lse are float32 [b, h, m] and
    contiguous, the first two as the forward left them.
    """
    (b, h, m, _), (hk, n) = q.shape, k.shape[1:3]
    delta = torch.empty_like(log_sum)
    common = call.arguments(q, k, v)
    common |= call.relative_arguments()
    common |= launch.layout(q, k, v, out, d_out, dq, dk, dv, scores=(call.mask, call.bias, dbias))
    common["scale"] = call.scale
    owned = dbias is not None and dbias.shape == (b, h, m, n)
    with launch.on_device_of(q):
        sizes = launch.sizes("dq", q, k, v, call)
        if b * m > 0:
            _flash_bwd_dq_kernel[(call.blocks(m, sizes.block_m) * h * b,)](
                q, k, v, out, d_out, dq, row_max, log_sum, delta, d_lse,
                **launch.strides(q=q, k=k, v=v, o=out, do=d_out, dq=dq), **common, **sizes.arguments(),
                **launch.score_tensor("dbias", dbias if owned else None, b, h, m, n),
                drq_ptr=None if drelative is None else drelative.q,
                **launch.ranges(call.k_segments, call.k_ranks, sizes.block_n),
            )  # fmt: skip
        sizes = launch.sizes("dkdv", q, k, v, call)
        if b * n > 0:
            _flash_bwd_dkdv_kernel[(call.blocks(n, sizes.block_n) * hk * b,)](
                q, k, v, d_out, dk, dv, row_max, log_sum, delta, d_lse,
                **launch.strides(q=q, k=k, v=v, do=d_out, dk=dk, dv=dv), **common, **sizes.arguments(),
                GROUPED=h != hk, **launch.ranges(call.q_segments, call.q_ranks, sizes.block_m),
                window_ranges_ptr=launch.window_ranges(call.row_first, call.row_stop, sizes.block_m),
            )  # fmt: skip
        if dbias is not None and not owned and b * m * n > 0:
            flash_bwd_bias(q, k, v, row_max, log_sum, delta, d_lse, d_out, dbias, call)
        if drelative is not None:
            flash_bwd_relative(q, k, v, row_max, log_sum, delta, d_lse, d_out, drelative.k, call)
    return delta
