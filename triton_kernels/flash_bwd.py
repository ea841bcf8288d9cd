"""Fused attention, backward: the gradients of q, k and v, recomputing the probabilities from lse.

    ds = p * (dp - delta)    dp = d_out v^T    delta_i = out_i . d_out_i - d_lse_i
    dq = scale * ds k        dk = scale * ds^T q        dv = p^T d_out

Source: arXiv:2307.08691, algorithm 2, split in two so that every sum has one fixed order and no atomics. Grid: the dq
kernel has one program per block of queries and walks over keys; the dk/dv kernel has one program per block of keys of
one key/value head and walks over the queries of its group's heads. The first also writes delta for the second.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .mask import visible
from .philox import dropout_keep
from .schedule import (
    MASKED_RUN,
    block_start,
    first_run,
    keys_seen,
    queries_seeing,
    run_length,
    stop_run,
    visited_blocks,
)
from .softmax import exp_scores, score_unit, subtracted_lse
from .tiles import head_start, load_tile, store_tile


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
    lse_ptr,  # [b, h, m]
    dlse_ptr,  # [b, h, m] or None
    delta_ptr,  # [b, h, m], written here
    mask_ptr,  # uint8 or None
    lengths_ptr,  # [b] or None
    seed_ptr,  # [] or None
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
    H,
    GROUP,
    M,
    N,
    offset,
    left,  # or None
    right,  # or None
    scale,
    magnitude,
    threshold,
    inv_keep,
    SCALE_SIGN: tl.constexpr,
    MASK_CONTIGUOUS: tl.constexpr,
    ALIGN: tl.constexpr,
    OFFSET: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    num_blocks = tl.cdiv(M, BLOCK_M)
    start_m = (num_blocks - 1 - tl.program_id(0) % num_blocks) * BLOCK_M
    i_h = tl.program_id(0) // num_blocks % H
    i_b = tl.program_id(0) // num_blocks // H
    k_base = head_start(k_ptr, i_b, i_h // GROUP, stride_kb, stride_kh, ALIGN)
    v_base = head_start(v_ptr, i_b, i_h // GROUP, stride_vb, stride_vh, ALIGN)
    mask_base = mask_ptr
    if mask_ptr is not None:
        mask_base = head_start(mask_ptr, i_b, i_h, stride_mask_b, stride_mask_h, 1)
    n_keys = N
    if lengths_ptr is not None:
        n_keys = tl.minimum(tl.load(lengths_ptr + i_b), N)  # a wrong length must not read past the keys
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    unit = score_unit(magnitude, EXACT)

    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_m = start_m + rows < M
    # [BLOCK_M, BLOCK_DV]
    do_base = head_start(do_ptr, i_b, i_h, stride_dob, stride_doh, ALIGN)
    do_tile = load_tile(do_base, stride_dom, start_m, in_m, True, HEAD_DIM_V, BLOCK_M, BLOCK_DV, ALIGN, OFFSET)
    out_base = head_start(out_ptr, i_b, i_h, stride_ob, stride_oh, ALIGN)
    out_tile = load_tile(out_base, stride_om, start_m, in_m, True, HEAD_DIM_V, BLOCK_M, BLOCK_DV, ALIGN, OFFSET)
    # [BLOCK_M]
    statistics = (i_b * H + i_h).to(tl.int64) * M + start_m
    delta = row_dots(do_tile, out_tile, EXACT)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + statistics + rows, mask=in_m, other=0.0)
    lse = tl.load(lse_ptr + statistics + rows, mask=in_m, other=float("-inf"))
    delta = tl.where(lse == float("-inf"), 0.0, delta)
    tl.store(delta_ptr + statistics + rows, delta, mask=in_m)
    subtracted = subtracted_lse(lse, EXACT)
    # [BLOCK_M, BLOCK_D]
    q_base = head_start(q_ptr, i_b, i_h, stride_qb, stride_qh, ALIGN)
    q_tile = load_tile(q_base, stride_qm, start_m, in_m, True, HEAD_DIM, BLOCK_M, BLOCK_D, ALIGN, OFFSET)
    if SCALE_SIGN != 1:
        q_tile = q_tile * SCALE_SIGN
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)

    stop_m = tl.minimum(start_m + BLOCK_M, M)
    first, last, first_full, last_full = keys_seen(start_m, stop_m, n_keys, offset, left, right)
    start, full_start, full_stop, stop = visited_blocks(first, last, first_full, last_full, mask_base, BLOCK_N)
    for run in tl.static_range(stop_run(mask_ptr)):
        for step in tl.range(0, run_length(run, start, full_start, full_stop, stop), BLOCK_N):
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
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            p = exp_scores(s, unit, subtracted[:, None], EXACT)
            dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
            if seed_ptr is not None:
                keep = dropout_keep(seed, threshold, i_b, i_h, start_m + rows, start_n, BLOCK_M, BLOCK_N)
                dp = tl.where(keep, dp * inv_keep, 0.0)
            ds = p * (dp - delta[:, None])
            if run == MASKED_RUN:
                see = visible(
                    start_m, start_n, rows[:, None], cols[None, :], M, n_keys, offset, left, right,
                    mask_base, stride_mask_m, stride_mask_n, MASK_CONTIGUOUS, OFFSET,
                )  # fmt: skip
                ds = tl.where(see, ds, 0.0)
            if mask_ptr is not None:
                k_tile = tl.where((tl.max(see.to(tl.int32), 0) > 0)[:, None], k_tile, 0.0)
            dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")

    dq_base = head_start(dq_ptr, i_b, i_h, stride_dqb, stride_dqh, ALIGN)
    store_tile(dq_base, stride_dqm, start_m, in_m, dq * scale, HEAD_DIM, BLOCK_M, BLOCK_D, ALIGN, OFFSET)


@triton.jit(do_not_specialize=launch.RUNTIME_VALUES)
def _flash_bwd_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    dk_ptr,
    dv_ptr,
    lse_ptr,  # [b, h, m]
    delta_ptr,  # [b, h, m]
    mask_ptr,  # uint8 or None
    lengths_ptr,  # [b] or None
    seed_ptr,  # [] or None
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
    H,
    GROUP,
    M,
    N,
    offset,
    left,  # or None
    right,  # or None
    scale,
    magnitude,
    threshold,
    inv_keep,
    SCALE_SIGN: tl.constexpr,
    GROUPED: tl.constexpr,
    MASK_CONTIGUOUS: tl.constexpr,
    ALIGN: tl.constexpr,
    OFFSET: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    num_blocks = tl.cdiv(N, BLOCK_N)
    num_kv_heads = H // GROUP
    start_n = tl.program_id(0) % num_blocks * BLOCK_N
    i_kv = tl.program_id(0) // num_blocks % num_kv_heads
    i_b = tl.program_id(0) // num_blocks // num_kv_heads
    n_keys = N
    if lengths_ptr is not None:
        n_keys = tl.minimum(tl.load(lengths_ptr + i_b), N)  # a wrong length must not read past the keys
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    unit = score_unit(magnitude, EXACT)

    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_keys = start_n + cols < n_keys
    # [BLOCK_N, BLOCK_D]
    k_base = head_start(k_ptr, i_b, i_kv, stride_kb, stride_kh, ALIGN)
    k_tile = load_tile(k_base, stride_kn, start_n, in_keys, True, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN, OFFSET)
    if SCALE_SIGN != 1:
        k_tile = k_tile * SCALE_SIGN
    # [BLOCK_N, BLOCK_DV]
    v_base = head_start(v_ptr, i_b, i_kv, stride_vb, stride_vh, ALIGN)
    v_tile = load_tile(v_base, stride_vn, start_n, in_keys, True, HEAD_DIM_V, BLOCK_N, BLOCK_DV, ALIGN, OFFSET)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)

    stop_n = tl.minimum(start_n + BLOCK_N, n_keys)
    first, last, first_full, last_full = queries_seeing(
        start_n, stop_n, tl.cdiv(M, BLOCK_M) * BLOCK_M, offset, left, right
    )
    start, full_start, full_stop, stop = visited_blocks(first, last, first_full, last_full, mask_ptr, BLOCK_M)
    HAS_MASKED: tl.constexpr = left is not None or right is not None or mask_ptr is not None
    # The query heads of the group follow one another in one loop, so that its pipeline never drains between them.
    for run in tl.static_range(first_run(HAS_MASKED), stop_run(mask_ptr)):
        length = run_length(run, start, full_start, full_stop, stop)
        for step in tl.range(0, length * GROUP, BLOCK_M):
            i_h = i_kv
            if GROUPED:
                i_h = i_kv * GROUP + step // length
                step = step % length
            start_m = block_start(run, step, start, full_start, full_stop, BLOCK_M)
            in_m = start_m + rows < M
            statistics = (i_b * H + i_h).to(tl.int64) * M + start_m
            # [BLOCK_M, BLOCK_D]
            q_base = head_start(q_ptr, i_b, i_h, stride_qb, stride_qh, ALIGN)
            q_tile = load_tile(q_base, stride_qm, start_m, in_m, True, HEAD_DIM, BLOCK_M, BLOCK_D, ALIGN, OFFSET)
            # [BLOCK_M, BLOCK_DV]
            do_base = head_start(do_ptr, i_b, i_h, stride_dob, stride_doh, ALIGN)
            do_tile = load_tile(do_base, stride_dom, start_m, in_m, True, HEAD_DIM_V, BLOCK_M, BLOCK_DV, ALIGN, OFFSET)
            # [BLOCK_M]
            lse = tl.load(lse_ptr + statistics + rows, mask=in_m, other=float("-inf"))
            delta = tl.load(delta_ptr + statistics + rows, mask=in_m, other=0.0)
            # [BLOCK_N, BLOCK_M]
            s_t = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
            p_t = exp_scores(s_t, unit, subtracted_lse(lse, EXACT)[None, :], EXACT)
            dp_t = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
            if run == MASKED_RUN:
                mask_base = mask_ptr
                if mask_ptr is not None:
                    mask_base = head_start(mask_ptr, i_b, i_h, stride_mask_b, stride_mask_h, 1)
                see = visible(
                    start_m, start_n, rows[None, :], cols[:, None], M, n_keys, offset, left, right,
                    mask_base, stride_mask_m, stride_mask_n, MASK_CONTIGUOUS, OFFSET,
                )  # fmt: skip
                p_t = tl.where(see, p_t, 0.0)
            p_kept = p_t
            if seed_ptr is not None:
                keep = tl.trans(dropout_keep(seed, threshold, i_b, i_h, start_m + rows, start_n, BLOCK_M, BLOCK_N))
                p_kept = tl.where(keep, p_t * inv_keep, 0.0)
                dp_t = tl.where(keep, dp_t * inv_keep, 0.0)
            dv = tl.dot(p_kept.to(do_tile.dtype), do_tile, dv, input_precision="ieee")
            ds_t = p_t * (dp_t - delta[None, :])
            if run == MASKED_RUN:
                ds_t = tl.where(see, ds_t, 0.0)
            dk = tl.dot(ds_t.to(q_tile.dtype), q_tile, dk, input_precision="ieee")

    # Keys past the length were never masked above, only their own rows of dk and dv are wrong.
    in_n = start_n + cols < N
    dk = tl.where(in_keys[:, None], dk * scale, 0.0)
    dv = tl.where(in_keys[:, None], dv, 0.0)
    dk_base = head_start(dk_ptr, i_b, i_kv, stride_dkb, stride_dkh, ALIGN)
    store_tile(dk_base, stride_dkn, start_n, in_n, dk, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN, OFFSET)
    dv_base = head_start(dv_ptr, i_b, i_kv, stride_dvb, stride_dvh, ALIGN)
    store_tile(dv_base, stride_dvn, start_n, in_n, dv, HEAD_DIM_V, BLOCK_N, BLOCK_DV, ALIGN, OFFSET)


def flash_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    call: launch.Call,
) -> None:
    """Writes the gradients dq, dk and dv. Every tensor [b, heads, rows, size] has a last stride of 1.

    lse and d_lse: float32 [b, h, m], contiguous.
    """
    (b, h, m, _), (hk, n) = q.shape, k.shape[1:3]
    delta = torch.empty_like(lse)
    common = call.arguments(q, k, v) | launch.layout(q, k, v, out, d_out, dq, dk, dv, mask=call.mask)
    common["scale"] = call.scale
    with launch.on_device_of(q):
        sizes = launch.sizes("dq", q, v, call)
        if b * m > 0:
            _flash_bwd_dq_kernel[(triton.cdiv(m, sizes.block_m) * h * b,)](
                q, k, v, out, d_out, dq, lse, d_lse, delta,
                **launch.strides(q=q, k=k, v=v, o=out, do=d_out, dq=dq), **common, **sizes.arguments(),
            )  # fmt: skip
        sizes = launch.sizes("dkdv", q, v, call)
        if b * n > 0:
            _flash_bwd_dkdv_kernel[(triton.cdiv(n, sizes.block_n) * hk * b,)](
                q, k, v, d_out, dk, dv, lse, delta,
                **launch.strides(q=q, k=k, v=v, do=d_out, dk=dk, dv=dv), **common, **sizes.arguments(), GROUPED=h != hk,
            )  # fmt: skip
