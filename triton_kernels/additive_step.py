"""Additive attention of few queries, backward: a decoder's step, whose forward is `decode`.

Grid: one program per chunk of the keys of one key/value head, for all rows of its group. It owns d_k and d_v of its
keys, and leaves what they add to d_q and dweight of each row, which the host sums over chunks; nothing is atomic.
Source: as `additive_bwd`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config, launch
from .additive import FEW_COLUMNS, scores_of_few
from .decode import MOST_ADDITIVE_ROWS, split
from .flash_bwd import row_dots
from .mask import visible
from .score import tanh, through_softcap, to_scores
from .softmax import LOG2_E, exp_scores, score_gradient
from .tiles import gather_tile, head_start, load_tile, store_tile, tile_ptrs


@triton.jit(do_not_specialize=launch.RUNTIME_VALUES)
def _additive_step_bwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    weight_ptr,  # [h, a]
    out_ptr,
    do_ptr,
    dk_ptr,
    dv_ptr,
    # float32 [chunks, b, h, m, a] of zeros
    dq_ptr,
    dweight_ptr,
    ds_ptr,  # float32 [b, h, m, n], or None
    # [b, h, m]
    row_max_ptr,
    log_sum_ptr,
    delta_ptr,  # written here
    dlse_ptr,  # or None
    # Absent features are None.
    mask_ptr,  # uint8
    bias_ptr,
    lengths_ptr,  # [b]
    slopes_ptr,  # [b, h]
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
    B,
    H,
    GROUP,
    M,
    N,
    CHUNKS,
    offset,
    left,  # or None
    right,  # or None
    scale,
    magnitude,
    factor,
    softcap,  # or None
    SCALE_SIGN: tl.constexpr,
    MASK_CONTIGUOUS: tl.constexpr,
    ALIGN: tl.constexpr,
    OFFSET: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    num_kv_heads = H // GROUP
    i_chunk = tl.program_id(0) % CHUNKS
    i_kv = tl.program_id(0) // CHUNKS % num_kv_heads
    i_b = tl.program_id(0) // CHUNKS // num_kv_heads
    n_keys = N
    if lengths_ptr is not None:
        n_keys = tl.minimum(tl.load(lengths_ptr + i_b), N)  # a wrong length must not read past the keys
    EXACT: tl.constexpr = v_ptr.dtype.element_ty == tl.float32
    unit = factor * LOG2_E

    # The group's heads of one query, then those of the next. Rows past the last stand at query M, which sees nothing.
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    count = GROUP * M
    used = rows < count
    i_h = tl.where(used, i_kv * GROUP + rows % GROUP, 0)
    i_m = tl.where(used, rows // GROUP, M)
    q_base = head_start(q_ptr, i_b, i_kv * GROUP, None, stride_qb, stride_qh, stride_qm, ALIGN)
    k_base = head_start(k_ptr, i_b, i_kv, None, stride_kb, stride_kh, stride_kn, ALIGN)
    v_base = head_start(v_ptr, i_b, i_kv, None, stride_vb, stride_vh, stride_vn, ALIGN)
    dk_base = head_start(dk_ptr, i_b, i_kv, None, stride_dkb, stride_dkh, stride_dkn, ALIGN)
    dv_base = head_start(dv_ptr, i_b, i_kv, None, stride_dvb, stride_dvh, stride_dvn, ALIGN)
    weight_base = weight_ptr + i_kv * GROUP * HEAD_DIM
    # [BLOCK_M, BLOCK_DV]
    do_base = head_start(do_ptr, i_b, i_kv * GROUP, None, stride_dob, stride_doh, stride_dom, ALIGN)
    do_tile = gather_tile(
        do_base, stride_doh, stride_dom, rows % GROUP, i_m, used, HEAD_DIM_V, BLOCK_M, BLOCK_DV, ALIGN
    )
    out_base = head_start(out_ptr, i_b, i_kv * GROUP, None, stride_ob, stride_oh, stride_om, ALIGN)
    out_tile = gather_tile(
        out_base, stride_oh, stride_om, rows % GROUP, i_m, used, HEAD_DIM_V, BLOCK_M, BLOCK_DV, ALIGN
    )
    # [BLOCK_M]
    at = (i_b.to(tl.int64) * H + i_h) * M + i_m
    top = tl.load(row_max_ptr + at, mask=used, other=0.0)
    log_sum = tl.load(log_sum_ptr + at, mask=used, other=float("inf"))
    delta = tl.where(log_sum == float("inf"), 0.0, row_dots(do_tile, out_tile, EXACT))
    tl.store(delta_ptr + at, delta, mask=used & (i_chunk == 0))
    d_lse = dlse_ptr
    if dlse_ptr is not None:
        d_lse = tl.load(dlse_ptr + at, mask=used, other=0.0)[:, None]
    # [BLOCK_M, 1]
    mask_base = mask_ptr
    if mask_ptr is not None:
        mask_base = mask_ptr + i_b.to(tl.int64) * stride_mask_b + i_h[:, None].to(tl.int64) * stride_mask_h
    bias_base = bias_ptr
    if bias_ptr is not None:
        bias_base = bias_ptr + i_b.to(tl.int64) * stride_bias_b + i_h[:, None].to(tl.int64) * stride_bias_h
    slope = slopes_ptr
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + i_b * H + i_h)[:, None]

    share = tl.cdiv(tl.cdiv(N, BLOCK_N), CHUNKS) * BLOCK_N
    for step in tl.range(0, tl.minimum(share, N - i_chunk * share), BLOCK_N):
        start_n = i_chunk * share + step
        in_n = start_n + cols < N
        # [BLOCK_M, BLOCK_N]
        see = visible(
            0, start_n, i_m[:, None], cols[None, :], M, n_keys, offset, left, right,
            mask_base, stride_mask_m, stride_mask_n, MASK_CONTIGUOUS, OFFSET,
        )  # fmt: skip
        # What no row sees is not read: its NaN would survive multiplication by a ds of 0.
        wanted = tl.max(see.to(tl.int32), 0) > 0
        s = SCALE_SIGN * scores_of_few(
            q_base, stride_qh, stride_qm, k_base, stride_kn, weight_base, 0, count, GROUP, start_n, wanted,
            HEAD_DIM, BLOCK_M, BLOCK_N, ALIGN, OFFSET,
        )  # fmt: skip
        s, t = to_scores(
            s, 0, start_n, i_m[:, None], cols[None, :], M, n_keys, offset, magnitude, softcap,
            slope, bias_base, stride_bias_m, stride_bias_n, OFFSET,
        )  # fmt: skip
        p = tl.where(see, exp_scores(s, top[:, None], unit, log_sum[:, None]), 0.0)
        # [BLOCK_N, BLOCK_DV]
        v_tile = load_tile(v_base, stride_vn, start_n, wanted, True, HEAD_DIM_V, BLOCK_N, BLOCK_DV, ALIGN, OFFSET)
        # Read again for each block, because it would take registers through the columns' loops.
        do_tile = gather_tile(
            do_base, stride_doh, stride_dom, rows % GROUP, i_m, used, HEAD_DIM_V, BLOCK_M, BLOCK_DV, ALIGN
        )
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
        dv = tl.dot(tl.trans(p).to(do_tile.dtype), do_tile, input_precision="ieee")
        store_tile(dv_base, stride_dvn, start_n, in_n, dv, HEAD_DIM_V, BLOCK_N, BLOCK_DV, ALIGN, OFFSET)
        ds = tl.where(see, score_gradient(p, dp, delta[:, None], d_lse), 0.0)
        if ds_ptr is not None:
            tl.store(ds_ptr + (at[:, None] * N + start_n + cols), ds, mask=used[:, None] & in_n[None, :])
        ds = through_softcap(ds, t, softcap) * scale
        for first in tl.range(0, HEAD_DIM, FEW_COLUMNS):
            c = first + tl.arange(0, FEW_COLUMNS)
            inside = c < HEAD_DIM
            # [BLOCK_N, FEW_COLUMNS]
            k_ptrs = tile_ptrs(k_base + first, stride_kn, start_n, BLOCK_N, FEW_COLUMNS, ALIGN, OFFSET)
            k = tl.load(k_ptrs, mask=wanted[:, None] & inside[None, :], other=0.0).to(tl.float32)
            dk = tl.zeros([BLOCK_N, FEW_COLUMNS], dtype=tl.float32)
            for i in tl.range(0, count):
                head = i % GROUP
                row = head_start(q_base, None, head, i // GROUP, 0, stride_qh, stride_qm, ALIGN)
                q = tl.load(row + c, mask=inside, other=0.0).to(tl.float32)
                weight = tl.load(weight_base + head * HEAD_DIM + c, mask=inside, other=0.0).to(tl.float32)
                own = tl.sum(tl.where(rows[:, None] == i, ds, 0.0), 0)[:, None]
                t_i = tanh(q[None, :] + k)
                slopes = own * (1 - t_i * t_i)
                dk += slopes * weight[None, :]
                sums = ((i_chunk * B + i_b).to(tl.int64) * H + i_kv * GROUP + head) * M + i // GROUP
                dq_ptrs = dq_ptr + sums * HEAD_DIM + c
                dweight_ptrs = dweight_ptr + sums * HEAD_DIM + c
                dq = tl.load(dq_ptrs, mask=inside, other=0.0) + tl.sum(slopes, 0) * weight
                dweight = tl.load(dweight_ptrs, mask=inside, other=0.0) + tl.sum(own * t_i, 0)
                tl.store(dq_ptrs, dq, mask=inside)
                tl.store(dweight_ptrs, dweight, mask=inside)
            dk_ptrs = tile_ptrs(dk_base + first, stride_dkn, start_n, BLOCK_N, FEW_COLUMNS, ALIGN, OFFSET)
            tl.store(dk_ptrs, dk.to(dk_ptr.dtype.element_ty), mask=in_n[:, None] & inside[None, :])
        tl.debug_barrier()  # another thread may read these sums for the next block


def additive_step_bwd(
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
    """As `additive_bwd`, for calls that `decode.suits`."""
    (b, h, m, a), (hk, n) = q.shape, k.shape[1:3]
    delta = torch.empty_like(log_sum)
    sizes = launch.sizes("additive decode", q, k, v, call)
    chunks = split(hk * b, m, n, call, sizes.block_n, config.processors(q.device))
    dq_sums, dweight_sums = log_sum.new_zeros(2, chunks, b, h, m, a)
    ds = None if dbias is None else log_sum.new_empty(b, h, m, n)
    common = call.arguments(q, k, v) | launch.layout(q, k, v, out, d_out, dk, dv, scores=(call.mask, call.bias))
    for absent in (
        "q_ids_ptr",
        "k_ids_ptr",
        "q_ranks_ptr",
        "k_ranks_ptr",
        "row_first_ptr",
        "row_stop_ptr",
        "seed_ptr",
        "cu_q_ptr",
        "cu_k_ptr",
        "S",
        "threshold",
        "inv_keep",
        "BLOCK_D",
    ):
        del common[absent]
    with launch.on_device_of(q):
        _additive_step_bwd_kernel[(chunks * hk * b,)](
            q, k, v, weight.contiguous(), out, d_out, dk, dv, dq_sums, dweight_sums, ds, row_max, log_sum, delta, d_lse,
            **launch.strides(q=q, k=k, v=v, o=out, do=d_out, dk=dk, dv=dv), **common,
            **sizes.arguments() | {"BLOCK_M": MOST_ADDITIVE_ROWS}, B=b, CHUNKS=chunks, scale=call.scale,
        )  # fmt: skip
    dq.copy_(dq_sums.sum(0))
    dweight.copy_(dweight_sums.sum((0, 1, 3)))
    if dbias is not None and ds is not None:
        dbias.copy_(ds.sum_to_size(dbias.shape))
    return delta
