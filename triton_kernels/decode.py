"""Attention of few queries over many keys, and over caches of keys, paged ones too.

The query heads of a group share tiles, query after query, so that their keys and values are read once. Keys are split,
so that a batch of one fills the GPU. Grid of the first kernel: one program per chunk of the keys that a tile of rows
sees, the chunks innermost; each leaves what it has accumulated, with its maximum and sum. The second joins the chunks
of one row.
Sources: Flash-Decoding (Dao, Haziza, Massa, Sizov 2023); pages, Kwon et al. 2023, arXiv:2309.06180.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config, launch
from .additive import scores_of_few
from .mask import drop_unseen, visible
from .schedule import MASKED_RUN, block_start, keys_seen, run_length, stop_run, visited_blocks
from .score import to_scores
from .softmax import LOG2_E, exp_scores, finish_rows, softmax_step
from .tiles import gather_tile, head_start, load_tile, page_rows

MOST_ROWS, MOST_ROWS_WITH_SCORES = 64, 16  # of a tile; the addresses of a mask and a bias take registers
MOST_ADDITIVE_ROWS = 16
MOST_CHUNKS = 64
CHUNKS_JOINED = tl.constexpr(MOST_CHUNKS)


@triton.jit(do_not_specialize=launch.RUNTIME_VALUES)
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    part_ptr,  # [CHUNKS, b, h, m, HEAD_DIM_V]
    # [CHUNKS, b, h, m]
    part_max_ptr,
    part_sum_ptr,
    # Absent features are None.
    mask_ptr,  # uint8
    bias_ptr,
    lengths_ptr,  # [b]
    table_ptr,  # [b, pages of one]
    slopes_ptr,  # [b, h]
    weight_ptr,  # [h, HEAD_DIM]; with it scores are additive
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
    PAGES,  # of all
    page_size,
    offset,  # or None: the length less M
    left,  # or None
    right,  # or None
    magnitude,
    factor,
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
    tiles = tl.cdiv(GROUP * M, BLOCK_M)
    i_chunk = tl.program_id(0) % CHUNKS
    tile = tl.program_id(0) // CHUNKS % tiles
    i_kv = tl.program_id(0) // CHUNKS // tiles % num_kv_heads
    i_b = tl.program_id(0) // CHUNKS // tiles // num_kv_heads
    n_keys = N
    if lengths_ptr is not None:
        n_keys = tl.minimum(tl.load(lengths_ptr + i_b), N)  # a wrong length must not read past the keys
    if offset is None:
        offset = n_keys - M
    unit = factor * LOG2_E

    # The group's heads of one query, then those of the next. Rows past the last stand at query M, which sees nothing.
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    used = rows < GROUP * M
    i_h = tl.where(used, i_kv * GROUP + rows % GROUP, 0)
    i_m = tl.where(used, rows // GROUP, M)
    q_base = head_start(q_ptr, i_b, i_kv * GROUP, None, stride_qb, stride_qh, stride_qm, ALIGN)
    weight_base = weight_ptr
    if weight_ptr is not None:
        weight_base = weight_ptr + i_kv * GROUP * HEAD_DIM
    else:
        # [BLOCK_M, BLOCK_D]
        q_tile = gather_tile(q_base, stride_qh, stride_qm, rows % GROUP, i_m, used, HEAD_DIM, BLOCK_M, BLOCK_D, ALIGN)
        if SCALE_SIGN != 1:
            q_tile = q_tile * SCALE_SIGN
    entry = i_b
    pages = table_ptr
    if table_ptr is not None:
        entry = None
        pages = table_ptr + i_b.to(tl.int64) * tl.cdiv(N, page_size)
    k_base = head_start(k_ptr, entry, i_kv, None, stride_kb, stride_kh, stride_kn, ALIGN)
    v_base = head_start(v_ptr, entry, i_kv, None, stride_vb, stride_vh, stride_vn, ALIGN)
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
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)

    # This program's share of the keys that the tile sees, in whole blocks.
    start_m = tile * BLOCK_M // GROUP
    stop_m = tl.minimum(tl.cdiv((tile + 1) * BLOCK_M, GROUP), M)
    first, last, first_full, last_full = keys_seen(start_m, stop_m, n_keys, offset, left, right)
    begin = first // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(tl.maximum(last - begin, 0), BLOCK_N), CHUNKS) * BLOCK_N
    begin += i_chunk * share
    first = tl.maximum(first, begin)
    last = tl.minimum(last, begin + share)
    start, full_start, full_stop, stop = visited_blocks(
        first, last, tl.maximum(first_full, begin), tl.minimum(last_full, begin + share), mask_base, BLOCK_N
    )
    for run in tl.static_range(stop_run(mask_ptr)):
        for step in tl.range(0, run_length(run, start, full_start, full_stop, stop), BLOCK_N):
            start_n = block_start(run, step, start, full_start, full_stop, BLOCK_N)
            wanted = (start_n + cols >= first) & (start_n + cols < last)
            if table_ptr is not None:
                page, row = page_rows(pages, PAGES, page_size, start_n + cols, wanted)
            # [BLOCK_M, BLOCK_N]
            if weight_ptr is not None:
                s = SCALE_SIGN * scores_of_few(
                    q_base, stride_qh, stride_qm, k_base, stride_kn, weight_base, tile * BLOCK_M,
                    tl.minimum(BLOCK_M, GROUP * M - tile * BLOCK_M), GROUP, start_n, wanted,
                    HEAD_DIM, BLOCK_M, BLOCK_N, ALIGN, OFFSET,
                )  # fmt: skip
            else:
                # [BLOCK_N, BLOCK_D]
                if table_ptr is not None:
                    k_tile = gather_tile(
                        k_base, stride_kb, stride_kn, page, row, wanted, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN
                    )
                else:
                    k_tile = load_tile(
                        k_base, stride_kn, start_n, wanted, run == MASKED_RUN, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN, OFFSET
                    )
                s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            s, _ = to_scores(
                s, 0, start_n, i_m[:, None], cols[None, :], M, n_keys, offset, magnitude, softcap,
                slope, bias_base, stride_bias_m, stride_bias_n, OFFSET,
            )  # fmt: skip
            if run == MASKED_RUN:
                see = visible(
                    0, start_n, i_m[:, None], cols[None, :], M, n_keys, offset, left, right,
                    mask_base, stride_mask_m, stride_mask_n, MASK_CONTIGUOUS, OFFSET,
                )  # fmt: skip
                s = tl.where(see, s, float("-inf"))
            p, row_max, row_sum, rescale = softmax_step(s, row_max, row_sum, unit)
            # [BLOCK_N, BLOCK_DV]
            if table_ptr is not None:
                v_tile = gather_tile(
                    v_base, stride_vb, stride_vn, page, row, wanted, HEAD_DIM_V, BLOCK_N, BLOCK_DV, ALIGN
                )
            else:
                v_tile = load_tile(
                    v_base, stride_vn, start_n, wanted, run == MASKED_RUN, HEAD_DIM_V, BLOCK_N, BLOCK_DV, ALIGN, OFFSET
                )
            if run == MASKED_RUN:
                v_tile = drop_unseen(v_tile, see, mask_ptr is not None)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision="ieee")

    # [BLOCK_M]
    at = ((i_chunk * B + i_b).to(tl.int64) * H + i_h) * M + i_m
    tl.store(part_max_ptr + at, row_max, mask=used)
    tl.store(part_sum_ptr + at, row_sum, mask=used)
    columns_v = tl.arange(0, BLOCK_DV)
    part_ptrs = part_ptr + (at[:, None] * HEAD_DIM_V + columns_v[None, :])
    tl.store(part_ptrs, acc, mask=used[:, None] & (columns_v < HEAD_DIM_V)[None, :])


@triton.jit(do_not_specialize=launch.RUNTIME_VALUES)
def _decode_join_kernel(
    part_ptr,
    part_max_ptr,
    part_sum_ptr,
    out_ptr,
    # [b, h, m]
    lse_ptr,
    row_max_ptr,
    log_sum_ptr,
    sinks_ptr,  # [h] or None
    stride_ob: tl.int64,
    stride_oh: tl.int64,
    stride_om: tl.int64,
    B,
    H,
    M,
    CHUNKS,
    factor,
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
    part_max = tl.load(part_max_ptr + at, mask=chunks < CHUNKS, other=float("-inf"))
    part_sum = tl.load(part_sum_ptr + at, mask=chunks < CHUNKS, other=0.0)
    unit = factor * LOG2_E
    row_max = tl.max(part_max, 0)
    top = tl.where(row_max == float("-inf"), 0.0, row_max)
    row_sum = tl.sum(exp_scores(part_max, top, unit) * part_sum, 0)
    columns = tl.arange(0, BLOCK_DV)
    out = tl.zeros([BLOCK_DV], dtype=tl.float32)
    for i_chunk in tl.range(0, CHUNKS):
        at_one = (i_chunk * B + i_b).to(tl.int64) * H * M + i_h * M + i_m
        weight = exp_scores(tl.load(part_max_ptr + at_one), top, unit)
        out += weight * tl.load(part_ptr + at_one * HEAD_DIM_V + columns, mask=columns < HEAD_DIM_V, other=0.0)
    rescale, lse, top, log_sum = finish_rows(row_max, row_sum, sinks_ptr, i_h, factor)
    out = out * rescale
    out_base = head_start(out_ptr, i_b, i_h, i_m, stride_ob, stride_oh, stride_om, 1)
    tl.store(out_base + columns, out.to(out_ptr.dtype.element_ty), mask=columns < HEAD_DIM_V)
    tl.store(lse_ptr + row, lse)
    tl.store(row_max_ptr + row, top)
    tl.store(log_sum_ptr + row, log_sum)


def suits(q: Tensor, k: Tensor, call: launch.Call, additive: bool = False) -> bool:
    """Whether these kernels take the call, and alone do or are likely to be faster than `flash_fwd`.

    They are where a group shares a tile, or where one program per head would leave processors idle; with additive
    scores wherever the rows of a group fit a tile, because theirs are computed row by row.
    """
    (b, h, m, _), (hk, n) = q.shape, k.shape[1:3]
    if call.offset is None:
        return b * m > 0
    absent = (call.cu_seqlens_q, call.q_segments, call.q_ranks, call.row_first, call.relative)
    taken = all(one is None for one in absent) and call.dropout_p == 0
    rows = h // hk * m
    if additive:
        return b * m > 0 and taken and rows <= MOST_ADDITIVE_ROWS
    few = rows <= rows_per_tile(rows, call) and n >= 8 * m
    return b * m > 0 and taken and few and (h > hk or b * h < config.processors(q.device))


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    call: launch.Call,
    weight: Tensor | None = None,
) -> None:
    """As `flash_fwd`, for calls that `suits`; k and v may be pages [pages, hk, page size, head size].

    weight: [h, a] of additive scores.
    """
    (b, h, m, _), (hk, dv) = q.shape, v.shape[1::2]
    sizes = launch.sizes("decode" if weight is None else "additive decode", q, k, v, call)
    block_m = rows_per_tile(h // hk * m, call)
    programs = launch.parts(h // hk * m, block_m) * hk * b
    chunks = split(programs, m, call.keys(k), call, sizes.block_n, config.processors(q.device))
    part = q.new_empty(chunks, b, h, m, dv, dtype=torch.float32)
    part_max, part_sum = (lse.new_empty(chunks, b, h, m) for _ in range(2))
    common = call.arguments(q, k, v) | launch.layout(q, k, v, scores=(call.mask, call.bias))
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
    ):
        del common[absent]
    with launch.on_device_of(q):
        _decode_kernel[(chunks * programs,)](
            q, k, v, part, part_max, part_sum, **launch.strides(q=q, k=k, v=v), **common,
            **sizes.arguments() | {"BLOCK_M": block_m, "num_warps": 4 if block_m <= 32 else 8},
            table_ptr=call.block_table, weight_ptr=launch.contiguous(weight), B=b, CHUNKS=chunks, PAGES=k.shape[0],
            page_size=k.shape[2],
        )  # fmt: skip
        _decode_join_kernel[(b * h * m,)](
            part, part_max, part_sum, out, lse, row_max, log_sum, launch.contiguous(call.sinks),
            **launch.strides(o=out), B=b, H=h, M=m, CHUNKS=chunks, factor=common["factor"],
            HEAD_DIM_V=dv, BLOCK_DV=common["BLOCK_DV"],
        )  # fmt: skip


def rows_per_tile(rows: int, call: launch.Call) -> int:
    """BLOCK_M for a group that has so many rows."""
    most = MOST_ROWS if call.mask is None and call.bias is None else MOST_ROWS_WITH_SCORES
    return min(max(16, launch.power_of_2(rows)), most)


def split(programs: int, m: int, n: int, call: launch.Call, block: int, processors: int) -> int:
    """In how many chunks to take the keys of each of `programs` tiles, so that every processor gets two programs."""
    keys = n if call.left is None or call.right is None else min(n, call.left + call.right + m)
    return min(launch.parts(2 * processors, programs), max(launch.parts(keys, block), 1), MOST_CHUNKS)
