"""Tensor maps: what the CUDA driver's cuTensorMapEncodeTiled makes for tensor copies, in the machine's own encoding."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from ptx.program import Fault

_BYTES = 128
_MOST_RANK = 5


def encode(
    address: int, shape: Sequence[int], strides: Sequence[int], box: Sequence[int], item: int, swizzle: int = 0
) -> bytes:
    """A map of a tensor, held to the function's rules (CUDA driver API, "Tensor Map Object Management").

    Args:
        shape, strides, box: in elements, of the innermost dimension first.
        item: bytes of an element.
        swizzle: bytes over which 16 bytes of a row are exchanged: 0, 32, 64 or 128.
    """
    rank, steps = len(shape), [item * stride for stride in strides]
    rules = {
        "the innermost stride is 1": strides[0] == 1,
        "the address is a multiple of 16": address % 16 == 0,
        "strides are multiples of 16 below 2^40": all(step % 16 == 0 and 0 < step < 1 << 40 for step in steps[1:]),
        "sizes are from 1 to 2^32": all(0 < n <= 1 << 32 for n in shape),
        "boxes have 1 to 256 elements a side, and not 255": all(0 < n <= 256 and n != 255 for n in box),
        "rows of a box are multiples of 16 bytes": box[0] * item % 16 == 0,
        "rows of a box fit the swizzle": swizzle == 0 or box[0] * item <= swizzle,
    }
    if broken := [rule for rule, kept in rules.items() if not kept]:
        raise Fault(f"tensor map of shape {shape}, strides {strides}, box {box}: not kept: {', '.join(broken)}")
    pad = [0] * (_MOST_RANK - rank)
    sides = [min(n, 255) for n in box]  # one byte each: 255 says 256
    mode = (0, 32, 64, 128).index(swizzle)
    packed = struct.pack("<QII5Q5Q5BBxx", address, rank, item, *shape, *pad, item, *steps[1:], *pad, *sides, *pad, mode)
    return packed.ljust(_BYTES, b"\0")
