"""Fused attention, forward: out = softmax(scale * q k^T over the visible keys) v and the log of its denominator.

Source: arXiv:2307.08691 (FlashAttention-2), algorithm 1. Grid: one program per block of BLOCK_M queries of one head,
the last block first, because under a causal mask it has the most work.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .mask import visible
from .philox import dropout_keep
from .schedule import MASKED_RUN, block_start, keys_seen, run_length, stop_run, visited_blocks
from .softmax import log_sum_exp, score_unit, softmax_step
from .tiles import head_start, load_tile, store_tile


@triton.jit(do_not_specialize=launch.RUNTIME_VALUES)
def _flash_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,  # [b, h, m]
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
    # [BLOCK_M, BLOCK_D]
    q_base = head_start(q_ptr, i_b, i_h, stride_qb, stride_qh, ALIGN)
    q_tile = load_tile(q_base, stride_qm, start_m, in_m, True, HEAD_DIM, BLOCK_M, BLOCK_D, ALIGN, OFFSET)
    if SCALE_SIGN != 1:
        q_tile = q_tile * SCALE_SIGN
    # [BLOCK_M, BLOCK_DV]
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)

    stop_m = tl.minimum(start_m + BLOCK_M, M)
    first, last, first_full, last_full = keys_seen(start_m, stop_m, n_keys, offset, left, right)
    start, full_start, full_stop, stop = visited_blocks(first, last, first_full, last_full, mask_base, BLOCK_N)
    for run in tl.static_range(stop_run(mask_ptr)):
        for step in tl.range(0, run_length(run, start, full_start, full_stop, stop), BLOCK_N):
            start_n = block_start(run, step, start, full_start, full_stop, BLOCK_N)
            # A key that no query of the tile sees is not read: its NaN would survive multiplication by a weight of 0.
            wanted = (start_n + cols >= first) & (start_n + cols < last)
            # [BLOCK_N, BLOCK_D]
            k_tile = load_tile(
                k_base, stride_kn, start_n, wanted, run == MASKED_RUN, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN, OFFSET
            )
            # [BLOCK_M, BLOCK_N]
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            if run == MASKED_RUN:
                see = visible(
                    start_m, start_n, rows[:, None], cols[None, :], M, n_keys, offset, left, right,
                    mask_base, stride_mask_m, stride_mask_n, MASK_CONTIGUOUS, OFFSET,
                )  # fmt: skip
                s = tl.where(see, s, float("-inf"))
            p, row_max, row_sum, rescale = softmax_step(s, row_max, row_sum, unit, EXACT)
            if seed_ptr is not None:
                keep = dropout_keep(seed, threshold, i_b, i_h, start_m + rows, start_n, BLOCK_M, BLOCK_N)
                p = tl.where(keep, p, 0.0)
            # [BLOCK_N, BLOCK_DV]
            v_tile = load_tile(
                v_base, stride_vn, start_n, wanted, run == MASKED_RUN, HEAD_DIM_V, BLOCK_N, BLOCK_DV, ALIGN, OFFSET
            )
            if mask_ptr is not None:
                v_tile = tl.where((tl.max(see.to(tl.int32), 0) > 0)[:, None], v_tile, 0.0)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision="ieee")

    acc = acc * (inv_keep / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
    out_base = head_start(out_ptr, i_b, i_h, stride_ob, stride_oh, ALIGN)
    store_tile(out_base, stride_om, start_m, in_m, acc, HEAD_DIM_V, BLOCK_M, BLOCK_DV, ALIGN, OFFSET)
    lse_base = lse_ptr + (i_b * H + i_h).to(tl.int64) * M + start_m
    tl.store(lse_base + rows, log_sum_exp(row_max, row_sum, EXACT), mask=in_m)


def flash_fwd(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: launch.Call) -> None:
    """Writes out [b, h, m, dv] and lse [b, h, m] (float32, contiguous). q, k, v and out have a last stride of 1."""
    b, h, m, _ = q.shape
    if b * m == 0:
        return
    common = call.arguments(q, k, v) | launch.layout(q, k, v, out, mask=call.mask)
    sizes = launch.sizes("forward", q, v, call)
    with launch.on_device_of(q):
        _flash_fwd_kernel[(triton.cdiv(m, sizes.block_m) * h * b,)](
            q, k, v, out, lse, **launch.strides(q=q, k=k, v=v, o=out), **common, **sizes.arguments()
        )
