"""What every launcher shares: turning one attention call into the arguments that all kernels take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import config
from .relative import NO_RELATIVE, Relative

# The arguments that say a tensor's strides, of [b, heads, rows, size] and of [b, h, m, n]. They are put together once,
# because a launch on the host would spend as long on a name as on its value.
ROW_STRIDES = {
    tensor: tuple(f"stride_{tensor}{axis}" for axis in ("bhn" if tensor in ("k", "v", "dk", "dv") else "bhm"))
    for tensor in ("q", "o", "do", "dq", "k", "v", "dk", "dv")
}
SCORE_STRIDES = {tensor: tuple(f"stride_{tensor}_{axis}" for axis in "bhmn") for tensor in ("mask", "bias", "dbias")}

# Values that change from call to call and must never cause a recompilation. Triton would otherwise compile a variant
# for 1, one for multiples of 16 and one for the rest. Members of a tuple cannot be exempted, so strides are not in one.
RUNTIME_VALUES = (
    *(name for names in (ROW_STRIDES | SCORE_STRIDES).values() for name in names),
    *("H", "GROUP", "M", "N", "S", "offset", "left", "right"),
    *("magnitude", "factor", "scale", "softcap", "threshold", "inv_keep"),
    *("B", "CHUNKS", "PAGES", "page_size"),
    *("rk_heads", "distances", "first_distance", "first_row"),
    *(f"outer_{tensor}" for tensor in ("q", "k", "v", "o", "do", "dq", "dk", "dv")),
    *("BLOCKS", "SECTION", "HEADS", "Q_TILES", "K_TILES"),
)

# From this stride on (in elements), an offset inside a tile of 128 rows may not fit 32 bits.
WIDE_STRIDE = 1 << 23


_LARGEST = torch.finfo(torch.float32).max


class Call(NamedTuple):
    """One attention call beyond its main tensors, in the terms of `pyattn.spec`; None where a limit is absent."""

    scale: float
    offset: int | None  # None is key_lengths - m, which `decode` alone takes
    left: int | None = None
    right: int | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    mask: Tensor | None = None  # bool, broadcastable to [b, h, m, n]
    bias: Tensor | None = None  # floating, broadcastable to [b, h, m, n]
    key_lengths: Tensor | None = None  # int32 [b]
    q_segments: Tensor | None = None  # int32 or int64 [b, m]
    k_segments: Tensor | None = None  # int32 or int64 [b, n]
    q_ranks: Tensor | None = None  # int32 [b, m]
    k_ranks: Tensor | None = None  # int32 [b, n]
    row_first: Tensor | None = None  # int32 [b, m]
    row_stop: Tensor | None = None  # int32 [b, m]
    relative: Relative | None = None
    alibi_slopes: Tensor | None = None  # float32 [sequences, h]
    sinks: Tensor | None = None  # float32 [h]
    seed: Tensor | None = None  # int64 []
    cu_seqlens_q: Tensor | None = None  # int32 [sequences + 1]; then b is 1, and offset without meaning
    cu_seqlens_k: Tensor | None = None  # int32 [sequences + 1]
    block_table: Tensor | None = None  # int32 [b, pages of one]; `decode` alone takes it

    @property
    def packed(self) -> int:
        """How many sequences are packed."""
        return 0 if self.cu_seqlens_q is None else len(self.cu_seqlens_q) - 1

    def blocks(self, rows: int, block: int) -> int:
        """As `schedule.num_blocks`."""
        return parts(rows, block) if self.cu_seqlens_q is None else rows // block + self.packed

    def keys(self, k: Tensor) -> int:
        """How many keys a batch element has, or has room for."""
        return k.shape[2] * (1 if self.block_table is None else self.block_table.shape[1])

    def arguments(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
        """The keyword arguments that the forward and backward kernels have in common."""
        (_, h, m, d), (hk, dv), n = q.shape, v.shape[1::2], self.keys(k)
        reach = m + n  # a window wider than this hides nothing; it keeps positions within 32 bits
        dropped = int(self.dropout_p * 2**32)
        # The kernels scale by a positive number and carry the sign in q, or in k: with it a row's maximum can be
        # taken before scaling. For scale 0 the scores are 0 because q is made 0. With a softcap it is the scale
        # over it, and finite: infinity times a product of 0 would be NaN.
        magnitude = min((abs(self.scale) or 1.0) / (self.softcap or 1.0), _LARGEST)
        plain = self.softcap is None and self.bias is None and self.alibi_slopes is None
        return {
            **(mask := score_tensor("mask", self.mask, q.shape[0], h, m, n)),
            "MASK_CONTIGUOUS": mask["stride_mask_n"] == 1,
            **score_tensor("bias", self.bias, q.shape[0], h, m, n),
            "lengths_ptr": contiguous(self.key_lengths),
            "q_ids_ptr": contiguous(self.q_segments),
            "k_ids_ptr": contiguous(self.k_segments),
            "q_ranks_ptr": contiguous(self.q_ranks),
            "k_ranks_ptr": contiguous(self.k_ranks),
            "row_first_ptr": contiguous(self.row_first),
            "row_stop_ptr": contiguous(self.row_stop),
            "slopes_ptr": contiguous(self.alibi_slopes),
            "seed_ptr": self.seed if self.dropout_p > 0 else None,
            "cu_q_ptr": self.cu_seqlens_q,
            "cu_k_ptr": self.cu_seqlens_k,
            "H": h,
            "GROUP": h // hk,
            "M": m,
            "N": n,
            "S": self.packed,
            "offset": self.offset,
            "left": None if self.left is None else min(self.left, reach),
            "right": None if self.right is None else min(self.right, reach),
            "magnitude": magnitude,
            "factor": magnitude if plain else 1.0,  # from scores to logits, as in `score.to_scores`
            "SCALE_SIGN": (self.scale > 0) - (self.scale < 0),
            "softcap": self.softcap,
            "threshold": dropped - 2**32 if dropped >= 2**31 else dropped,
            "inv_keep": 1 / (1 - self.dropout_p),
            "HEAD_DIM": d,
            "HEAD_DIM_V": dv,
            "BLOCK_D": padded_head_dim(d),
            "BLOCK_DV": padded_head_dim(dv),
        }

    def relative_arguments(self) -> dict[str, Any]:
        """Those of `relative`, of kernels whose scores are products."""
        return NO_RELATIVE if self.relative is None else self.relative.arguments()


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def score_tensor(name: str, t: Tensor | None, b: int, h: int, m: int, n: int) -> dict[str, Any]:
    """NAME_ptr and its strides over [b, h, m, n], 0 where it broadcasts."""
    if t is None:
        return {f"{name}_ptr": None, **dict.fromkeys(SCORE_STRIDES[name], 0)}
    t = (t.view(torch.uint8) if t.dtype is torch.bool else t).expand(b, h, m, n)
    return {f"{name}_ptr": t, **dict(zip(SCORE_STRIDES[name], t.stride(), strict=True))}


def ranges(segments: Tensor | None, ranks: Tensor | None, block: int) -> dict[str, Tensor | None]:
    """id_ranges_ptr and rank_ranges_ptr for kernels that visit blocks of this side."""
    return {"id_ranges_ptr": _ranges(segments, block), "rank_ranges_ptr": _ranges(ranks, block)}


def _ranges(ids: Tensor | None, block: int) -> Tensor | None:
    """The least and greatest of every block of ids [b, rows], as [b, blocks, 2]."""
    return None if ids is None else torch.stack(_in_blocks(ids, block).aminmax(dim=-1), -1)


def window_ranges(first: Tensor | None, stop: Tensor | None, block: int) -> Tensor | None:
    """The least first and the greatest stop, the greatest first and the least stop of every block of queries with
    windows of their own, as [b, blocks, 4]."""
    if first is None or stop is None:
        return None
    (lowest, highest), (least, greatest) = (_in_blocks(t, block).aminmax(dim=-1) for t in (first, stop))
    return torch.stack([lowest, greatest, highest, least], -1)


def _in_blocks(ids: Tensor, block: int) -> Tensor:
    """[b, rows] as [b, blocks, block], the last row as often as it takes."""
    b, rows = ids.shape
    blocks = parts(rows, block)
    whole = ids.new_empty(b, blocks * block)
    whole[:, :rows] = ids
    whole[:, rows:] = ids[:, -1:]
    return whole.view(b, blocks, block)


def layout(*tensors: Tensor, scores: Iterable[Tensor | None]) -> dict[str, Any]:
    """ALIGN and OFFSET of `tiles`: what holds for the strides of all tensors [b, heads, rows, size].

    scores: tensors that broadcast to [b, h, m, n].
    """
    width = 16 // tensors[0].element_size()  # elements of one 16-byte load
    bits = widest = 0  # of all strides; the largest inside a tile
    for t in tensors:
        batch, head, row, _ = t.stride()
        bits |= batch | head | row
        widest = max(widest, row)
    widest = max([widest, *(max(t.stride()[2:]) for t in scores if t is not None)])
    return {"ALIGN": 1 if bits % width else width, "OFFSET": tl.int64 if widest >= WIDE_STRIDE else tl.int32}


def strides(**tensors: Tensor) -> dict[str, int]:
    """stride_NAMEb, stride_NAMEh and stride_NAMEm, stride_NAMEn for keys and values: of [b, heads, rows, size]."""
    return {
        name: stride
        for tensor, t in tensors.items()
        for name, stride in zip(ROW_STRIDES[tensor], t.stride(), strict=False)
    }


def sizes(kernel: str, q: Tensor, k: Tensor, v: Tensor, call: Call) -> config.Config:
    """The launch sizes of `kernel` for this call."""
    # The columns of additive scores are walked over: they make no tile wide.
    head_dim = padded_head_dim(v.shape[3] if kernel.startswith("additive") else max(q.shape[3], v.shape[3]))
    if call.relative is not None:
        kernel, head_dim = f"relative {kernel}", max(head_dim, padded_head_dim(call.relative.k.shape[3]))
    architecture, bits = config.architecture_of(q.device), 8 * q.element_size()
    return config.choose(kernel, architecture, bits, head_dim, _load(q, k, v, call))


def _load(q: Tensor, k: Tensor, v: Tensor, call: Call) -> str:
    """How much a call keeps in registers beside its tiles, in the words of `config.choose`."""
    hiding = (call.mask, call.bias, call.q_segments, call.q_ranks, call.row_first)
    if call.dropout_p > 0 or any(t is not None for t in hiding):
        return "heavy"
    d, dv = q.shape[3], v.shape[3]
    padded = padded_head_dim(d) != d or padded_head_dim(dv) != dv
    grouped_window = call.left is not None and q.shape[1] != k.shape[1]
    logits = call.softcap is not None or call.alibi_slopes is not None
    return "crowded" if padded or grouped_window or logits or call.packed else "light"


@cache
def padded_head_dim(d: int) -> int:
    """The power of two, at least 16, that tiles are wide: the matrix units take no other widths."""
    return max(16, power_of_2(d))


def power_of_2(x: int) -> int:
    """The least that is no less than x, which is at least 1. Triton's own are slow on the host, as is its cdiv."""
    return 1 << (x - 1).bit_length()


def parts(rows: int, size: int) -> int:
    """How many parts of at most `size` make up `rows`."""
    return -(-rows // size)


def on_device_of(q: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device; this makes it q's."""
    if not q.is_cuda or q.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(q.device)
