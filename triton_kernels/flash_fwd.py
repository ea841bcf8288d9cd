"""Fused attention, forward: out = softmax(logits over the visible keys) v and the log of its denominator.

Source: arXiv:2307.08691 (FlashAttention-2), algorithm 1. Grid: one program per block of BLOCK_M queries of one head,
the last block first, because under a causal mask it has the most work.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .mask import drop_unseen, visible
from .philox import dropout_keep
from .relative import load_low_and_high, load_rows, matrix_start, relative_products
from .schedule import (
    MASKED_RUN,
    block_start,
    held_keys,
    hides_inside,
    keys_seen,
    load_ids,
    locate,
    num_blocks,
    run_length,
    stages,
    stop_run,
    visited_blocks,
    within_ids,
    within_windows,
)
from .score import load_slope, to_scores
from .softmax import LOG2_E, finish_rows, softmax_step
from .tiles import head_start, load_tile, scores_start, statistics_start, store_tile


@triton.jit(do_not_specialize=launch.RUNTIME_VALUES)
def _flash_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    # [b, h, m]
    lse_ptr,
    row_max_ptr,
    log_sum_ptr,
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
    sinks_ptr,  # [h]
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
    slope = load_slope(slopes_ptr, i_s * H + i_h)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    HIDES: tl.constexpr = hides_inside(mask_ptr, q_ids_ptr, q_ranks_ptr, row_first_ptr)
    unit = factor * LOG2_E

    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_m = start_m + rows < n_queries
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
    # [BLOCK_M, BLOCK_DV]
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)

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
            # A key that no query of the tile sees is not read: its NaN would survive multiplication by a weight of 0.
            wanted = (start_n + cols >= first) & (start_n + cols < last)
            # [BLOCK_N, BLOCK_D]
            k_tile = load_tile(
                k_base, stride_kn, start_n, wanted, run == MASKED_RUN, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN, OFFSET
            )
            # [BLOCK_M, BLOCK_N]
            s = None
            if rq_ptr is not None:
                row = start_m - start_n + offset - first_distance
                low, high = load_low_and_high(rk_base, row, distances, HEAD_DIM_E, BLOCK_N, BLOCK_E)
                s = relative_products(rq_tile, low, high, start_n, 1)
            s = tl.dot(q_tile, tl.trans(k_tile), s, input_precision="ieee")
            s, _ = to_scores(
                s, start_m, start_n, rows[:, None], cols[None, :], n_queries, n_keys, offset, magnitude, softcap,
                slope, bias_base, stride_bias_m, stride_bias_n, OFFSET,
            )  # fmt: skip
            if run == MASKED_RUN:
                j_n = (start_n + cols)[None, :]
                k_ids = load_ids(k_ids_ptr, i_b, N, j_n, j_n < n_keys)
                k_ranks = load_ids(k_ranks_ptr, i_b, N, j_n, j_n < n_keys)
                see = visible(
                    start_m, start_n, rows[:, None], cols[None, :], n_queries, n_keys, offset, left, right,
                    mask_base, stride_mask_m, stride_mask_n, MASK_CONTIGUOUS, OFFSET,
                    q_ids, k_ids, q_ranks, k_ranks, row_first, row_stop,
                )  # fmt: skip
                s = tl.where(see, s, float("-inf"))
            p, row_max, row_sum, rescale = softmax_step(s, row_max, row_sum, unit)
            if seed_ptr is not None:
                keep = dropout_keep(seed, threshold, i_s, i_h, start_m + rows, start_n, BLOCK_M, BLOCK_N)
                p = tl.where(keep, p, 0.0)
            # [BLOCK_N, BLOCK_DV]
            v_tile = load_tile(
                v_base, stride_vn, start_n, wanted, run == MASKED_RUN, HEAD_DIM_V, BLOCK_N, BLOCK_DV, ALIGN, OFFSET
            )
            if run == MASKED_RUN:
                v_tile = drop_unseen(v_tile, see, HIDES)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision="ieee")

    rescale, lse, top, log_sum = finish_rows(row_max, row_sum, sinks_ptr, i_h, factor)
    acc = acc * (inv_keep * rescale)[:, None]
    out_base = head_start(out_ptr, i_b, i_h, first_m, stride_ob, stride_oh, stride_om, ALIGN)
    store_tile(out_base, stride_om, start_m, in_m, acc, HEAD_DIM_V, BLOCK_M, BLOCK_DV, ALIGN, OFFSET)
    i_m = start_m + rows
    tl.store(statistics_start(lse_ptr, i_b, i_h, H, M, first_m) + i_m, lse, mask=in_m)
    tl.store(statistics_start(row_max_ptr, i_b, i_h, H, M, first_m) + i_m, top, mask=in_m)
    tl.store(statistics_start(log_sum_ptr, i_b, i_h, H, M, first_m) + i_m, log_sum, mask=in_m)


def flash_fwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, row_max: Tensor, log_sum: Tensor, call: launch.Call
) -> None:
    """Writes out [b, h, m, dv] and lse, row_max and log_sum [b, h, m] (float32, contiguous), the last two of which
    `flash_bwd` reads. q, k, v and out have a last stride of 1.

    Packed sequences are a batch of one, whose rows `call.cu_seqlens_q` and `cu_seqlens_k` part.
    """
    b, h, m, _ = q.shape
    if b * m == 0:
        return
    common = call.arguments(q, k, v)
    common |= call.relative_arguments()
    common |= launch.layout(q, k, v, out, scores=(call.mask, call.bias))
    sizes = launch.sizes("forward", q, k, v, call)
    with launch.on_device_of(q):
        _flash_fwd_kernel[(call.blocks(m, sizes.block_m) * h * b,)](
            q, k, v, out, lse, row_max, log_sum, **launch.strides(q=q, k=k, v=v, o=out), **common, **sizes.arguments(),
            sinks_ptr=launch.contiguous(call.sinks), **launch.ranges(call.k_segments, call.k_ranks, sizes.block_n),
        )  # fmt: skip
