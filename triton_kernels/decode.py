"""Attention of few queries over many keys, split over the keys so that a batch of one fills the GPU.

The query heads of a group share one tile, so that their keys and values are read once. Grid of the first kernel: one
program per chunk of keys of one key/value head; each leaves a normalised output and its lse. The second joins the
chunks of one row. Source: Flash-Decoding (Dao, Haziza, Massa, Sizov 2023).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config, launch
from .mask import drop_unseen, visible
from .schedule import MASKED_RUN, block_start, keys_seen, run_length, stop_run, visited_blocks
from .score import is_plain, to_logits
from .softmax import first_statistics, log_sum_exp, score_unit, softmax_step
from .tiles import head_start, load_tile

MOST_ROWS = 64  # of a mask or a bias, whose addresses take registers: 16
MOST_CHUNKS = 64
CHUNKS_JOINED = tl.constexpr(MOST_CHUNKS)


@triton.jit(do_not_specialize=launch.RUNTIME_VALUES)
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    part_ptr,  # [CHUNKS, b, h, m, HEAD_DIM_V]
    part_lse_ptr,  # [CHUNKS, b, h, m]
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
    first_chunk,  # where the first one begins
    chunk,  # keys of one, a multiple of BLOCK_N
    offset,
    left,  # or None
    right,  # or None
    magnitude,
    softcap,  # or None
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
    num_kv_heads = H // GROUP
    i_chunk = tl.program_id(0) % CHUNKS
    i_kv = tl.program_id(0) // CHUNKS % num_kv_heads
    i_b = tl.program_id(0) // CHUNKS // num_kv_heads
    n_keys = N
    if lengths_ptr is not None:
        n_keys = tl.minimum(tl.load(lengths_ptr + i_b), N)  # a wrong length must not read past the keys
    PLAIN: tl.constexpr = is_plain(softcap, bias_ptr, slopes_ptr)
    NATURAL: tl.constexpr = q_ptr.dtype.element_ty == tl.float32 or not PLAIN
    unit = score_unit(magnitude, PLAIN, NATURAL)

    # Head after head of the group. Rows past the last stand at query M, which sees nothing.
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    used = rows < GROUP * M
    i_h = tl.where(used, i_kv * GROUP + rows // M, 0)
    i_m = tl.where(used, rows % M, M)
    heads = i_h[:, None].to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    # [BLOCK_M, BLOCK_D]
    q_ptrs = q_ptr + i_b.to(tl.int64) * stride_qb + heads * stride_qh + i_m[:, None] * stride_qm + columns[None, :]
    q_tile = tl.load(q_ptrs, mask=used[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
    if SCALE_SIGN != 1:
        q_tile = q_tile * SCALE_SIGN
    k_base = head_start(k_ptr, i_b, i_kv, None, stride_kb, stride_kh, stride_kn, ALIGN)
    v_base = head_start(v_ptr, i_b, i_kv, None, stride_vb, stride_vh, stride_vn, ALIGN)
    # [BLOCK_M, 1]
    mask_base = mask_ptr
    if mask_ptr is not None:
        mask_base = mask_ptr + i_b.to(tl.int64) * stride_mask_b + heads * stride_mask_h
    bias_base = bias_ptr
    if bias_ptr is not None:
        bias_base = bias_ptr + i_b.to(tl.int64) * stride_bias_b + heads * stride_bias_h
    slope = slopes_ptr
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + i_b * H + i_h)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    row_max, row_sum = first_statistics(None, 0, BLOCK_M, NATURAL)

    begin = first_chunk + i_chunk * chunk
    first, last, first_full, last_full = keys_seen(0, M, n_keys, offset, left, right)
    first = tl.maximum(first, begin)
    last = tl.minimum(last, begin + chunk)
    start, full_start, full_stop, stop = visited_blocks(
        first, last, tl.maximum(first_full, begin), tl.minimum(last_full, begin + chunk), mask_base, BLOCK_N
    )
    for run in tl.static_range(stop_run(mask_ptr)):
        for step in tl.range(0, run_length(run, start, full_start, full_stop, stop), BLOCK_N):
            start_n = block_start(run, step, start, full_start, full_stop, BLOCK_N)
            wanted = (start_n + cols >= first) & (start_n + cols < last)
            # [BLOCK_N, BLOCK_D]
            k_tile = load_tile(
                k_base, stride_kn, start_n, wanted, run == MASKED_RUN, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN, OFFSET
            )
            # [BLOCK_M, BLOCK_N]
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            s, _ = to_logits(
                s, 0, start_n, i_m[:, None], cols[None, :], M, n_keys, offset, magnitude, softcap,
                slope, bias_base, stride_bias_m, stride_bias_n, OFFSET,
            )  # fmt: skip
            if run == MASKED_RUN:
                see = visible(
                    0, start_n, i_m[:, None], cols[None, :], M, n_keys, offset, left, right,
                    None, None, mask_base, stride_mask_m, stride_mask_n, MASK_CONTIGUOUS, OFFSET,
                )  # fmt: skip
                s = tl.where(see, s, float("-inf"))
            p, row_max, row_sum, rescale = softmax_step(s, row_max, row_sum, unit, NATURAL)
            # [BLOCK_N, BLOCK_DV]
            v_tile = load_tile(
                v_base, stride_vn, start_n, wanted, run == MASKED_RUN, HEAD_DIM_V, BLOCK_N, BLOCK_DV, ALIGN, OFFSET
            )
            if run == MASKED_RUN:
                v_tile = drop_unseen(v_tile, see, mask_ptr is not None)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision="ieee")

    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    # [BLOCK_M]
    at = ((i_chunk * B + i_b).to(tl.int64) * H + i_h) * M + i_m
    tl.store(part_lse_ptr + at, log_sum_exp(row_max, row_sum, NATURAL), mask=used)
    columns_v = tl.arange(0, BLOCK_DV)
    part_ptrs = part_ptr + (at[:, None] * HEAD_DIM_V + columns_v[None, :])
    tl.store(part_ptrs, acc, mask=used[:, None] & (columns_v < HEAD_DIM_V)[None, :])


@triton.jit(do_not_specialize=launch.RUNTIME_VALUES)
def _decode_join_kernel(
    part_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,  # [b, h, m]
    sinks_ptr,  # [h] or None
    stride_ob: tl.int64,
    stride_oh: tl.int64,
    stride_om: tl.int64,
    B,
    H,
    M,
    CHUNKS,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    row = tl.program_id(0)
    i_m = row % M
    i_h = row // M % H
    i_b = row // M // H
    chunks = tl.arange(0, CHUNKS_JOINED)
    at = (chunks * B + i_b).to(tl.int64) * H * M + i_h * M + i_m
    # [CHUNKS_JOINED]
    lse_parts = tl.load(part_lse_ptr + at, mask=chunks < CHUNKS, other=float("-inf"))
    top = tl.max(lse_parts, 0)
    if sinks_ptr is not None:
        top = tl.maximum(top, tl.load(sinks_ptr + i_h))
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(lse_parts - shift), 0)
    if sinks_ptr is not None:
        total += tl.exp(tl.load(sinks_ptr + i_h) - shift)
    columns = tl.arange(0, BLOCK_DV)
    out = tl.zeros([BLOCK_DV], dtype=tl.float32)
    for i_chunk in tl.range(0, CHUNKS):
        at_one = (i_chunk * B + i_b).to(tl.int64) * H * M + i_h * M + i_m
        weight = tl.exp(tl.load(part_lse_ptr + at_one) - shift)
        out += weight * tl.load(part_ptr + at_one * HEAD_DIM_V + columns, mask=columns < HEAD_DIM_V, other=0.0)
    out = out / tl.where(total == 0.0, 1.0, total)
    out_base = head_start(out_ptr, i_b, i_h, i_m, stride_ob, stride_oh, stride_om, 1)
    tl.store(out_base + columns, out.to(out_ptr.dtype.element_ty), mask=columns < HEAD_DIM_V)
    tl.store(lse_ptr + row, tl.where(total == 0.0, float("-inf"), shift + tl.log(total)))


def suits(q: Tensor, k: Tensor, call: launch.Call) -> bool:
    """Whether these kernels take the call, and are likely to be faster than `flash_fwd`.

    They are where a group shares a tile, or where one program per head would leave processors idle.
    """
    (b, h, m, _), (hk, n) = q.shape, k.shape[1:3]
    taken = call.cu_seqlens_q is None and call.q_segments is None and call.dropout_p == 0
    few = h // hk * m <= (MOST_ROWS if call.mask is None and call.bias is None else 16) and n >= 8 * m
    return b * m > 0 and taken and few and (h > hk or b * h < config.processors(q.device))


def decode(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: launch.Call) -> None:
    """As `flash_fwd`, for calls that `suits`."""
    (b, h, m, _), (hk, n, dv) = q.shape, v.shape[1:]
    sizes = launch.sizes("decode", q, k, v, call)
    first, chunk, chunks = split(b * hk, m, n, call, sizes.block_n, config.processors(q.device))
    part = q.new_empty(chunks, b, h, m, dv, dtype=torch.float32)
    part_lse = lse.new_empty(chunks, b, h, m)
    common = call.arguments(q, k, v) | launch.layout(q, k, v, scores=(call.mask, call.bias))
    for absent in ("q_ids_ptr", "k_ids_ptr", "seed_ptr", "cu_q_ptr", "cu_k_ptr", "S", "threshold", "inv_keep"):
        del common[absent]
    shape = sizes.arguments() | {"BLOCK_M": max(16, triton.next_power_of_2(h // hk * m))}
    with launch.on_device_of(q):
        _decode_kernel[(chunks * hk * b,)](
            q, k, v, part, part_lse, **launch.strides(q=q, k=k, v=v), **common, **shape,
            B=b, CHUNKS=chunks, first_chunk=first, chunk=chunk,
        )  # fmt: skip
        _decode_join_kernel[(b * h * m,)](
            part, part_lse, out, lse, launch.contiguous(call.sinks), **launch.strides(o=out),
            B=b, H=h, M=m, CHUNKS=chunks, HEAD_DIM_V=dv, BLOCK_DV=common["BLOCK_DV"],
        )  # fmt: skip


def split(heads: int, m: int, n: int, call: launch.Call, block: int, processors: int) -> tuple[int, int, int]:
    """(first, chunk, chunks): the keys that the band lets any query see, in chunks for two programs per processor."""
    first = 0 if call.left is None else max(call.offset - call.left, 0) // block * block
    last = n if call.right is None else min(max(m + call.offset + call.right, 0), n)
    blocks = max(triton.cdiv(last - first, block), 1)
    chunks = min(max(triton.cdiv(2 * processors, heads), 1), blocks, MOST_CHUNKS)
    each = triton.cdiv(blocks, chunks)
    return first, each * block, triton.cdiv(blocks, each)
