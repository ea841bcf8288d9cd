"""The gradient of a bias that broadcasts: the sum of ds over all that one element of the bias is added to.

Grid: one program per block of the bias's own shape, which visits every block of scores that broadcasting spreads it
over, always in the same order. What `flash_bwd` computes of ds is computed again.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .additive import MOST_ROWS, NOT_ADDITIVE, additive_scores, is_mild, parts_start
from .mask import visible
from .philox import dropout_keep
from .relative import load_low_and_high, load_rows, matrix_start, relative_products
from .schedule import held_keys, keys_seen, load_ids
from .score import load_slope, to_scores
from .softmax import LOG2_E, exp_scores, score_gradient
from .tiles import head_start, load_d_lse, load_statistic, load_tile, score_ptrs, scores_start, statistics_start


@triton.jit(do_not_specialize=launch.RUNTIME_VALUES)
def _flash_bwd_dbias_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    dbias_ptr,
    # [b, h, m]
    row_max_ptr,
    log_sum_ptr,
    delta_ptr,
    dlse_ptr,  # or None
    bias_ptr,
    # Absent features are None.
    # Of additive scores, as `additive_bwd` has them.
    weight_ptr,
    q_parts_ptr,
    k_parts_ptr,
    q_reach_ptr,
    k_reach_ptr,
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
    stride_dbias_b: tl.int64,
    stride_dbias_h: tl.int64,
    stride_dbias_m: tl.int64,
    stride_dbias_n: tl.int64,
    H,
    GROUP,
    M,
    N,
    Q_TILES,
    K_TILES,
    B,
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
    ONE_B: tl.constexpr,  # the bias broadcasts over the batch
    ONE_H: tl.constexpr,
    ONE_M: tl.constexpr,
    ONE_N: tl.constexpr,
    MASK_CONTIGUOUS: tl.constexpr,
    ALIGN: tl.constexpr,
    OFFSET: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    HEAD_DIM_E: tl.constexpr,
    NATIVE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    # What this program's block of the bias is spread over, by axis: how many, and where they begin.
    each_n = blocks_n if ONE_N else 1
    each_m = blocks_m if ONE_M else 1
    each_h = H if ONE_H else 1
    each_b = B if ONE_B else 1
    own_n = tl.program_id(0) % (blocks_n // each_n)
    rest = tl.program_id(0) // (blocks_n // each_n)
    own_m = rest % (blocks_m // each_m)
    rest = rest // (blocks_m // each_m)
    own_h = rest % (H // each_h)
    own_b = rest // (H // each_h)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    unit = factor * LOG2_E

    q_rows = Q_TILES * MOST_ROWS
    k_rows = K_TILES * MOST_ROWS
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    # Loops of their own, because the product of all four may need more than 32 bits.
    for i_bh in tl.range(0, each_h * each_b):
        i_h = own_h + i_bh % each_h
        i_b = own_b + i_bh // each_h
        n_keys = held_keys(lengths_ptr, i_b, N)
        mask_base = scores_start(mask_ptr, i_b, i_h, stride_mask_b, stride_mask_h)
        bias_base = head_start(bias_ptr, i_b, i_h, None, stride_bias_b, stride_bias_h, stride_bias_m, 1)
        slope = load_slope(slopes_ptr, i_b * H + i_h)
        q_base = head_start(q_ptr, i_b, i_h, None, stride_qb, stride_qh, stride_qm, ALIGN)
        k_base = head_start(k_ptr, i_b, i_h // GROUP, None, stride_kb, stride_kh, stride_kn, ALIGN)
        do_base = head_start(do_ptr, i_b, i_h, None, stride_dob, stride_doh, stride_dom, ALIGN)
        v_base = head_start(v_ptr, i_b, i_h // GROUP, None, stride_vb, stride_vh, stride_vn, ALIGN)
        for block_m in tl.range(0, each_m):
            start_m = (own_m + block_m) * BLOCK_M
            in_m = start_m + rows < M
            stop_m = tl.minimum(start_m + BLOCK_M, M)
            first, last = keys_seen(start_m, stop_m, n_keys, offset, left, right)[:2]
            i_m = start_m + rows
            top = load_statistic(row_max_ptr, i_b, i_h, H, M, None, i_m, in_m, 0.0)
            log_sum = load_statistic(log_sum_ptr, i_b, i_h, H, M, None, i_m, in_m, float("inf"))
            delta = load_statistic(delta_ptr, i_b, i_h, H, M, None, i_m, in_m, 0.0)
            d_lse = load_d_lse(dlse_ptr, i_b, i_h, H, M, None, i_m, in_m, 1)
            if weight_ptr is not None:
                q_parts = parts_start(q_parts_ptr, i_b, i_h, H, q_rows, None, EVEN) + start_m
                q_reach_ptrs = statistics_start(q_reach_ptr, i_b, i_h, H, q_rows, None) + i_m
                q_reach = tl.load(q_reach_ptrs)
            else:
                q_tile = load_tile(q_base, stride_qm, start_m, in_m, True, HEAD_DIM, BLOCK_M, BLOCK_D, ALIGN, OFFSET)
                if SCALE_SIGN != 1:
                    q_tile = q_tile * SCALE_SIGN
                if rq_ptr is not None:
                    rq_base = matrix_start(rq_ptr, i_b * H + i_h, M, HEAD_DIM_E)
                    rq_tile = load_rows(rq_base, start_m, M, HEAD_DIM_E, BLOCK_M, BLOCK_E)
                    if SCALE_SIGN != 1:
                        rq_tile = rq_tile * SCALE_SIGN
                    rk_base = matrix_start(rk_ptr, i_b * rk_heads + i_h, distances, HEAD_DIM_E)
            do_tile = load_tile(do_base, stride_dom, start_m, in_m, True, HEAD_DIM_V, BLOCK_M, BLOCK_DV, ALIGN, OFFSET)
            for block_n in tl.range(0, each_n):
                start_n = (own_n + block_n) * BLOCK_N
                wanted = (start_n + cols >= first) & (start_n + cols < last)
                v_tile = load_tile(
                    v_base, stride_vn, start_n, wanted, True, HEAD_DIM_V, BLOCK_N, BLOCK_DV, ALIGN, OFFSET
                )
                # [BLOCK_M, BLOCK_N]
                if weight_ptr is None:
                    k_tile = load_tile(
                        k_base, stride_kn, start_n, wanted, True, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN, OFFSET
                    )
                    s = None
                    if rq_ptr is not None:
                        row = start_m - start_n + offset - first_distance
                        low, high = load_low_and_high(rk_base, row, distances, HEAD_DIM_E, BLOCK_N, BLOCK_E)
                        s = relative_products(rq_tile, low, high, start_n, 1)
                    s = tl.dot(q_tile, tl.trans(k_tile), s, input_precision="ieee")
                else:
                    j_n = start_n + cols
                    k_reach_ptrs = statistics_start(k_reach_ptr, i_b, i_h // GROUP, H // GROUP, k_rows, None) + j_n
                    mild = is_mild(q_reach, tl.load(k_reach_ptrs))
                    k_parts = parts_start(k_parts_ptr, i_b, i_h // GROUP, H // GROUP, k_rows, None, EVEN) + start_n
                    s = additive_scores(
                        q_parts, k_parts, rows[:, None], cols[None, :], q_rows, k_rows, in_m[:, None], wanted[None, :],
                        mild, weight_ptr + i_h * EVEN, NATIVE, HEAD_DIM, BLOCK_M, BLOCK_N,
                    )  # fmt: skip
                s, _ = to_scores(
                    s, start_m, start_n, rows[:, None], cols[None, :], M, n_keys, offset, magnitude, softcap,
                    slope, bias_base, stride_bias_m, stride_bias_n, OFFSET,
                )  # fmt: skip
                p = exp_scores(s, top[:, None], unit, log_sum[:, None])
                dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
                if seed_ptr is not None:
                    keep = dropout_keep(seed, threshold, i_b, i_h, start_m + rows, start_n, BLOCK_M, BLOCK_N)
                    dp = tl.where(keep, dp * inv_keep, 0.0)
                q_ids = load_ids(q_ids_ptr, i_b, M, i_m[:, None], in_m[:, None])
                q_ranks = load_ids(q_ranks_ptr, i_b, M, i_m[:, None], in_m[:, None])
                row_first = load_ids(row_first_ptr, i_b, M, i_m[:, None], in_m[:, None])
                row_stop = load_ids(row_stop_ptr, i_b, M, i_m[:, None], in_m[:, None])
                j_n = (start_n + cols)[None, :]
                k_ids = load_ids(k_ids_ptr, i_b, N, j_n, j_n < n_keys)
                k_ranks = load_ids(k_ranks_ptr, i_b, N, j_n, j_n < n_keys)
                see = visible(
                    start_m, start_n, rows[:, None], cols[None, :], M, n_keys, offset, left, right,
                    mask_base, stride_mask_m, stride_mask_n, MASK_CONTIGUOUS, OFFSET,
                    q_ids, k_ids, q_ranks, k_ranks, row_first, row_stop,
                )  # fmt: skip
                acc += tl.where(see, score_gradient(p, dp, delta[:, None], d_lse), 0.0)

    if ONE_M:
        acc = tl.where(rows[:, None] == 0, tl.sum(acc, 0)[None, :], 0.0)
    if ONE_N:
        acc = tl.where(cols[None, :] == 0, tl.sum(acc, 1)[:, None], 0.0)
    in_m = own_m * BLOCK_M + rows < (1 if ONE_M else M)
    in_n = own_n * BLOCK_N + cols < (1 if ONE_N else N)
    dbias_base = head_start(dbias_ptr, own_b, own_h, None, stride_dbias_b, stride_dbias_h, stride_dbias_m, 1)
    dbias_ptrs = score_ptrs(
        dbias_base, own_m * BLOCK_M, own_n * BLOCK_N, rows[:, None], cols[None, :], stride_dbias_m, stride_dbias_n,
        OFFSET,
    )  # fmt: skip
    tl.store(dbias_ptrs, acc.to(dbias_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


def flash_bwd_bias(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    delta: Tensor,
    d_lse: Tensor | None,
    d_out: Tensor,
    dbias: Tensor,
    call: launch.Call,
    additive: dict[str, Any] = NOT_ADDITIVE,
) -> None:
    """Writes dbias, in the bias's shape. additive: those of `additive.common_arguments` that are not every kernel's.

    The other tensors as `flash_bwd` has them when it has written delta."""
    (b, h, m, _), n = q.shape, k.shape[2]
    sizes = launch.sizes("dq" if additive is NOT_ADDITIVE else "additive dq", q, k, v, call)
    one_b, one_h, one_m, one_n = (size == 1 for size in dbias.shape)
    blocks_m, blocks_n = launch.parts(m, sizes.block_m), launch.parts(n, sizes.block_n)
    programs = (1 if one_b else b) * (1 if one_h else h) * (1 if one_m else blocks_m) * (1 if one_n else blocks_n)
    common = call.arguments(q, k, v)
    common |= additive
    common |= call.relative_arguments()
    common |= launch.layout(q, k, v, d_out, scores=(call.mask, call.bias, dbias))
    for of_packed in ("S", "cu_q_ptr", "cu_k_ptr"):
        del common[of_packed]
    _flash_bwd_dbias_kernel[(programs,)](
        q, k, v, d_out, dbias, row_max, log_sum, delta, d_lse, **launch.strides(q=q, k=k, v=v, do=d_out),
        **dict(zip((f"stride_dbias_{axis}" for axis in "bhmn"), dbias.stride(), strict=True)),
        **common, **sizes.arguments(), B=b, ONE_B=one_b, ONE_H=one_h, ONE_M=one_m, ONE_N=one_n,
    )  # fmt: skip
