"""What every launcher shares: turning one attention call into the arguments that all kernels take."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config

# Values that change from call to call and must never cause a recompilation. Triton would otherwise compile a variant
# for 1, one for multiples of 16 and one for the rest. Members of a tuple cannot be exempted, so strides are not in one.
RUNTIME_VALUES = (
    *(f"stride_{tensor}{axis}" for tensor in ("q", "o", "do", "dq") for axis in "bhm"),
    *(f"stride_{tensor}{axis}" for tensor in ("k", "v", "dk", "dv") for axis in "bhn"),
    *(f"stride_mask_{axis}" for axis in "bhmn"),
    *("H", "GROUP", "M", "N", "offset", "left", "right", "magnitude", "scale", "threshold", "inv_keep"),
)

# From this stride on (in elements), an offset inside a tile of 128 rows may not fit 32 bits.
WIDE_STRIDE = 1 << 23


@dataclass(frozen=True)
class Call:
    """One attention call beyond its main tensors, in the terms of `pyattn.spec`; None where a limit is absent."""

    scale: float
    offset: int
    left: int | None = None
    right: int | None = None
    mask: Tensor | None = None  # bool, broadcastable to [b, h, m, n]
    key_lengths: Tensor | None = None  # int32 [b]
    dropout_p: float = 0.0
    seed: Tensor | None = None  # int64 []

    def arguments(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
        """The keyword arguments that the forward and backward kernels have in common."""
        (_, h, m, d), (hk, n, dv) = q.shape, v.shape[1:]
        reach = m + n  # a window wider than this hides nothing; it keeps positions within 32 bits
        dropped = int(self.dropout_p * 2**32)
        return {
            **self._mask_arguments(q.shape[0], h, m, n),
            "lengths_ptr": None if self.key_lengths is None else self.key_lengths.contiguous(),
            "seed_ptr": self.seed if self.dropout_p > 0 else None,
            "H": h,
            "GROUP": h // hk,
            "M": m,
            "N": n,
            "offset": self.offset,
            "left": None if self.left is None else min(self.left, reach),
            "right": None if self.right is None else min(self.right, reach),
            # The kernels scale by a positive number and carry the sign in q, or in k: with it a row's maximum can be
            # taken before scaling. For scale 0 the scores are 0 because q is made 0.
            "magnitude": abs(self.scale) or 1.0,
            "SCALE_SIGN": (self.scale > 0) - (self.scale < 0),
            "threshold": dropped - 2**32 if dropped >= 2**31 else dropped,
            "inv_keep": 1 / (1 - self.dropout_p),
            "HEAD_DIM": d,
            "HEAD_DIM_V": dv,
            "BLOCK_D": padded_head_dim(d),
            "BLOCK_DV": padded_head_dim(dv),
        }

    def _mask_arguments(self, b: int, h: int, m: int, n: int) -> dict[str, Any]:
        names = ("stride_mask_b", "stride_mask_h", "stride_mask_m", "stride_mask_n")
        if self.mask is None:
            return {"mask_ptr": None, **dict.fromkeys(names, 0), "MASK_CONTIGUOUS": False}
        mask = self.mask.view(torch.uint8).expand(b, h, m, n)
        strides = dict(zip(names, mask.stride(), strict=True))
        return {"mask_ptr": mask, **strides, "MASK_CONTIGUOUS": mask.stride(3) == 1}


def layout(*tensors: Tensor, mask: Tensor | None) -> dict[str, Any]:
    """ALIGN and OFFSET of `tiles`: what holds for the strides of all tensors [b, heads, rows, size]."""
    width = 16 // tensors[0].element_size()  # elements of one 16-byte load
    aligned = all(stride % width == 0 for t in tensors for stride in t.stride()[:3])
    widest = max(max(t.stride(2) for t in tensors), 0 if mask is None else max(mask.stride()[2:]))
    return {"ALIGN": width if aligned else 1, "OFFSET": tl.int64 if widest >= WIDE_STRIDE else tl.int32}


def strides(**tensors: Tensor) -> dict[str, int]:
    """stride_NAMEb, stride_NAMEh and stride_NAMEm, stride_NAMEn for keys and values: of [b, heads, rows, size]."""
    return {
        f"stride_{name}{axis}": stride
        for name, t in tensors.items()
        for axis, stride in zip("bhn" if name in ("k", "v", "dk", "dv") else "bhm", t.stride(), strict=False)
    }


def sizes(kernel: str, q: Tensor, v: Tensor, call: Call) -> config.Config:
    """The launch sizes of `kernel` for this call."""
    head_dim = padded_head_dim(max(q.shape[3], v.shape[3]))
    heavy = call.mask is not None or call.dropout_p > 0
    return config.choose(kernel, config.architecture_of(q.device), 8 * q.element_size(), head_dim, heavy)


def padded_head_dim(d: int) -> int:
    """The power of two, at least 16, that tiles are wide: the matrix units take no other widths."""
    return max(16, triton.next_power_of_2(d))


def on_device_of(q: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device; this makes it q's."""
    return torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext()
