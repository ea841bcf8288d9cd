"""The gradient of relative_k: for every distance the sum of ds_ij relative_q_i over the pairs that have it.

Grid: one program per block of rows of relative_k of one head, which walks along its diagonal of the scores, always in
the same order. A block of queries meets BLOCK distances at keys of two blocks: query i of the tile those from key i on
of the first one, and those before key i of the second. Both together are one tile of scores, whose columns turned
(`relative.turn`) are the rows. What `flash_bwd` computes of ds is computed again.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .mask import visible
from .philox import dropout_keep
from .relative import load_rows, matrix_start, of_low, store_rows, turn, turning
from .schedule import held_keys, keys_seen, load_ids
from .score import load_slope, through_softcap, to_scores
from .softmax import LOG2_E, exp_scores, score_gradient
from .tiles import head_start, load_d_lse, load_statistic, load_tile, scores_start


@triton.jit
def products_with(
    q_tile,
    do_tile,
    term,
    k_base,
    v_base,
    start_n,
    first,
    last,
    stride_kn,
    stride_vn,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ALIGN: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """q k^T onto the relative term, as other kernels sum them, and d_out v^T, of the keys `start_n ...`, of which those
    in [first, last) are read; both [BLOCK, BLOCK]."""
    keys = start_n + tl.arange(0, BLOCK)
    wanted = (keys >= first) & (keys < last)
    k_tile = load_tile(k_base, stride_kn, start_n, wanted, True, HEAD_DIM, BLOCK, BLOCK_D, ALIGN, OFFSET)
    v_tile = load_tile(v_base, stride_vn, start_n, wanted, True, HEAD_DIM_V, BLOCK, BLOCK_DV, ALIGN, OFFSET)
    s = tl.dot(q_tile, tl.trans(k_tile), term, input_precision="ieee")
    return s, tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")


@triton.jit(do_not_specialize=launch.RUNTIME_VALUES)
def _flash_bwd_drelative_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    drk_ptr,  # as rk_ptr
    # [b, h, m]
    row_max_ptr,
    log_sum_ptr,
    delta_ptr,
    dlse_ptr,  # or None
    # Absent features are None.
    bias_ptr,
    mask_ptr,  # uint8
    lengths_ptr,  # [b]
    q_ids_ptr,  # [b, m]
    k_ids_ptr,  # [b, n]
    q_ranks_ptr,  # [b, m]
    k_ranks_ptr,  # [b, n]
    row_first_ptr,  # [b, m]
    row_stop_ptr,  # [b, m]
    slopes_ptr,  # [sequences, h]
    seed_ptr,  # []
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
    B,
    rk_heads,
    distances,
    first_distance,
    first_row,  # of the blocks of relative_k, no greater than 0
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
    BLOCK: tl.constexpr = BLOCK_M  # of queries, of keys and of rows
    blocks = tl.cdiv(distances - first_row, BLOCK)
    start_r = first_row + tl.program_id(0) % blocks * BLOCK
    i_h = tl.program_id(0) // blocks % H
    own_b = tl.program_id(0) // blocks // H
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    unit = factor * LOG2_E

    rows = tl.arange(0, BLOCK)
    # [BLOCK, BLOCK_E]
    drk = tl.zeros([BLOCK, BLOCK_E], dtype=tl.float32)
    for more in tl.range(0, tl.where(rk_heads == 0, B, 1)):
        i_b = own_b + more
        rk_base = matrix_start(rk_ptr, i_b * rk_heads + i_h, distances, HEAD_DIM_E)
        rk_tile = load_rows(rk_base, start_r, distances, HEAD_DIM_E, BLOCK, BLOCK_E)
        if SCALE_SIGN != 1:
            rk_tile = rk_tile * SCALE_SIGN
        rq_base = matrix_start(rq_ptr, i_b * H + i_h, M, HEAD_DIM_E)
        q_base = head_start(q_ptr, i_b, i_h, None, stride_qb, stride_qh, stride_qm, ALIGN)
        k_base = head_start(k_ptr, i_b, i_h // GROUP, None, stride_kb, stride_kh, stride_kn, ALIGN)
        do_base = head_start(do_ptr, i_b, i_h, None, stride_dob, stride_doh, stride_dom, ALIGN)
        v_base = head_start(v_ptr, i_b, i_h // GROUP, None, stride_vb, stride_vh, stride_vn, ALIGN)
        mask_base = scores_start(mask_ptr, i_b, i_h, stride_mask_b, stride_mask_h)
        bias_base = scores_start(bias_ptr, i_b, i_h, stride_bias_b, stride_bias_h)
        slope = load_slope(slopes_ptr, i_b * H + i_h)
        n_keys = held_keys(lengths_ptr, i_b, N)
        # From the query that has key 0 at the first of the distances, to the one that has the last key at the last.
        query_of_key_0 = start_r + first_distance - offset
        start = tl.maximum(query_of_key_0, 0) // BLOCK * BLOCK
        stop = tl.minimum(query_of_key_0 + BLOCK - 1 + n_keys, M)
        for step in tl.range(0, stop - start, BLOCK):
            start_m = start + step
            start_n = tl.multiple_of(start_m - query_of_key_0 - (BLOCK - 1), BLOCK)  # may be negative
            i_m = start_m + rows
            in_m = i_m < M
            top = load_statistic(row_max_ptr, i_b, i_h, H, M, None, i_m, in_m, 0.0)
            log_sum = load_statistic(log_sum_ptr, i_b, i_h, H, M, None, i_m, in_m, float("inf"))
            delta = load_statistic(delta_ptr, i_b, i_h, H, M, None, i_m, in_m, 0.0)
            d_lse = load_d_lse(dlse_ptr, i_b, i_h, H, M, None, i_m, in_m, 1)
            rq_tile = load_rows(rq_base, start_m, M, HEAD_DIM_E, BLOCK, BLOCK_E)
            # [BLOCK, BLOCK]
            turns = turning(start_m, BLOCK, 1)
            term = turn(tl.dot(rq_tile, tl.trans(rk_tile), input_precision="ieee"), turns, 1)
            is_near = of_low(turns, BLOCK)  # of keys from i on, as of rows
            cols = rows[None, :] + tl.where(is_near, 0, BLOCK)
            q_tile = load_tile(q_base, stride_qm, start_m, in_m, True, HEAD_DIM, BLOCK, BLOCK_D, ALIGN, OFFSET)
            if SCALE_SIGN != 1:
                q_tile = q_tile * SCALE_SIGN
            do_tile = load_tile(do_base, stride_dom, start_m, in_m, True, HEAD_DIM_V, BLOCK, BLOCK_DV, ALIGN, OFFSET)
            first, last = keys_seen(start_m, tl.minimum(start_m + BLOCK, M), n_keys, offset, left, right)[:2]
            near_s, near_dp = products_with(
                q_tile, do_tile, term, k_base, v_base, start_n, first, last, stride_kn, stride_vn,
                HEAD_DIM, HEAD_DIM_V, BLOCK, BLOCK_D, BLOCK_DV, ALIGN, OFFSET,
            )  # fmt: skip
            far_s, far_dp = products_with(
                q_tile, do_tile, term, k_base, v_base, start_n + BLOCK, first, last, stride_kn, stride_vn,
                HEAD_DIM, HEAD_DIM_V, BLOCK, BLOCK_D, BLOCK_DV, ALIGN, OFFSET,
            )  # fmt: skip
            s = tl.where(is_near, near_s, far_s)
            dp = tl.where(is_near, near_dp, far_dp)
            # A key before the first one is put behind the last, where nothing is read.
            keys = tl.where(start_n + cols < 0, N - start_n, cols)
            s, t = to_scores(
                s, start_m, start_n, rows[:, None], keys, M, n_keys, offset, magnitude, softcap,
                slope, bias_base, stride_bias_m, stride_bias_n, OFFSET,
            )  # fmt: skip
            p = exp_scores(s, top[:, None], unit, log_sum[:, None])
            if seed_ptr is not None:
                near_keep = dropout_keep(seed, threshold, i_b, i_h, i_m, start_n, BLOCK, BLOCK)
                far_keep = dropout_keep(seed, threshold, i_b, i_h, i_m, start_n + BLOCK, BLOCK, BLOCK)
                dp = tl.where(tl.where(is_near, near_keep, far_keep), dp * inv_keep, 0.0)
            j_n = start_n + keys
            q_ids = load_ids(q_ids_ptr, i_b, M, i_m[:, None], in_m[:, None])
            q_ranks = load_ids(q_ranks_ptr, i_b, M, i_m[:, None], in_m[:, None])
            row_first = load_ids(row_first_ptr, i_b, M, i_m[:, None], in_m[:, None])
            row_stop = load_ids(row_stop_ptr, i_b, M, i_m[:, None], in_m[:, None])
            k_ids = load_ids(k_ids_ptr, i_b, N, j_n, j_n < n_keys)
            k_ranks = load_ids(k_ranks_ptr, i_b, N, j_n, j_n < n_keys)
            see = visible(
                start_m, start_n, rows[:, None], keys, M, n_keys, offset, left, right,
                mask_base, stride_mask_m, stride_mask_n, MASK_CONTIGUOUS, OFFSET,
                q_ids, k_ids, q_ranks, k_ranks, row_first, row_stop,
            )  # fmt: skip
            ds = through_softcap(tl.where(see, score_gradient(p, dp, delta[:, None], d_lse), 0.0), t, softcap)
            drk = tl.dot(tl.trans(turn(ds, turns, 1).to(rq_tile.dtype)), rq_tile, drk, input_precision="ieee")

    drk_base = matrix_start(drk_ptr, own_b * rk_heads + i_h, distances, HEAD_DIM_E)
    store_rows(drk_base, start_r, distances, drk * scale, HEAD_DIM_E, BLOCK, BLOCK_E)


def flash_bwd_relative(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    delta: Tensor,
    d_lse: Tensor | None,
    d_out: Tensor,
    drk: Tensor,
    call: launch.Call,
) -> None:
    """Writes drk, the gradient of `call.relative.k`. The other tensors as `flash_bwd` has them when it has written
    delta."""
    assert call.relative is not None and call.offset is not None
    sizes = launch.sizes("rows", q, k, v, call)
    first_row = (call.offset - call.relative.first + 1) % sizes.block_m - sizes.block_m
    batch, h, distances, _ = drk.shape
    blocks = launch.parts(distances - first_row, sizes.block_m)
    common = call.arguments(q, k, v)
    common |= call.relative_arguments()
    common |= launch.layout(q, k, v, d_out, scores=(call.mask, call.bias))
    for of_packed in ("S", "cu_q_ptr", "cu_k_ptr"):
        del common[of_packed]
    if blocks * h * batch > 0:
        _flash_bwd_drelative_kernel[(blocks * h * batch,)](
            q, k, v, d_out, drk, row_max, log_sum, delta, d_lse, **launch.strides(q=q, k=k, v=v, do=d_out), **common,
            **sizes.arguments(), B=len(q), first_row=first_row, scale=call.scale,
        )  # fmt: skip
