"""Which CUDA kernels there are: template arguments, threads and shared memory, by kernel, GPU, dtype and head size.

Nothing has been measured on a GPU. Tiles are the largest whose accumulators fit the registers and whose operands fit
the chip's shared memory; `tests/test_cuda_compile.py` compiles every row and holds it to that.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch

RICH, DROPOUT = 1, 2  # Flags of csrc/cuda/args.cuh
PART_K, PART_V = 1, 2  # Parts of csrc/cuda/backward_kv.cuh
KERNELS = ("forward", "decode", "backward_q", "backward_kv", "backward_bias")
DECODE_ROWS = 16  # of a group's heads and queries in one block
JOIN_THREADS = 128

_TYPES = {torch.float16: "half_t", torch.bfloat16: "bf16_t", torch.float32: "float", torch.float64: "double"}
# From which compute capability on a dtype has matrix units that the kernels use.
_TENSOR_FROM = {torch.float16: 75, torch.bfloat16: 80}
_TENSOR_HEADS = range(32, 257, 32)
_LARGEST_HEAD_WITHOUT_COPIES = 192  # above it kernels for Turing spilled 4 to 488 bytes (NVRTC 13.0)
# Shared memory that a block may have, in KiB, by compute capability; of others, the least.
_SHARED = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
_COPIES_FROM = 80  # asynchronous copies; without them one step's rows are held, and none in advance
_SEEN_BYTES = 16  # of SeenColumns in csrc/cuda/mask.cuh

# (warps, streamed rows, stages), the first of which that fits is taken.
_TILES = ((4, 64, 2), (4, 64, 1), (4, 32, 2), (4, 32, 1), (4, 16, 2), (4, 16, 1))
_DECODE_TILES = ((4, 64, 2), (4, 64, 1), (2, 32, 1))  # 16 keys for each warp


class Row(NamedTuple):
    """One compiled kernel and what a launch of it must know."""

    instantiation: str
    threads: int
    shared_bytes: int
    owned: int  # rows of a block
    streamed: int  # rows of a step
    slice: int  # columns of results that a block has


def rows(kernel: str, capability: int, dtype: torch.dtype, d: int, dv: int, flags: int) -> list[Row]:
    """What a call launches of `kernel`, one after the other.

    Args:
        capability: compute capability, 86 for 8.6.
    """
    if takes_matrix_units(capability, dtype, max(d, dv)):
        return _tensor_rows(kernel, capability, dtype, -(-max(d, dv) // 32) * 32, flags)
    return _plain_rows(kernel, dtype, flags)


def takes_matrix_units(capability: int, dtype: torch.dtype, head_dim: int) -> bool:
    largest = _TENSOR_HEADS[-1] if capability >= _COPIES_FROM else _LARGEST_HEAD_WITHOUT_COPIES
    return capability >= _TENSOR_FROM.get(dtype, 1 << 30) and head_dim <= largest


@cache
def join_row(dtype: torch.dtype) -> Row:
    return Row(f"decode_join<{_TYPES[dtype]}>", JOIN_THREADS, 0, 1, 0, 0)


def all_rows(capability: int) -> Iterator[Row]:
    """Every kernel that any call on such a GPU may launch."""
    for dtype in _TYPES:
        yield join_row(dtype)
        heads = [h for h in _TENSOR_HEADS if takes_matrix_units(capability, dtype, h)]
        for kernel in KERNELS:
            for flags in _flags_of(kernel):
                yield from _plain_rows(kernel, dtype, flags)
                for head in heads:
                    yield from _tensor_rows(kernel, capability, dtype, head, flags)


def shared_limit(capability: int) -> int:
    """Bytes of shared memory that a block may have."""
    return 1024 * _SHARED.get(capability, min(_SHARED.values()))


def _flags_of(kernel: str) -> tuple[int, ...]:
    if kernel == "decode":  # has no dropout
        return 0, RICH
    if kernel == "backward_bias":  # has a bias
        return RICH, RICH | DROPOUT
    return 0, RICH, DROPOUT, RICH | DROPOUT


@cache
def _tensor_rows(kernel: str, capability: int, dtype: torch.dtype, head: int, flags: int) -> list[Row]:
    limit, most_stages = shared_limit(capability), 2 if capability >= _COPIES_FROM else 1
    for warps, streamed, stages in _DECODE_TILES if kernel == "decode" else _TILES:
        shared = _tensor_bytes(kernel, head, warps, streamed, stages)
        if streamed > _most_streamed(kernel, capability, head, flags) or stages > most_stages or shared > limit:
            continue
        family = f"Tensor<{_TYPES[dtype]}, {head}, {warps}, {streamed}, {stages}>"
        both = PART_K | PART_V
        together = 128 if capability >= _COPIES_FROM else 96  # the largest head whose two sums fit beside each other
        parts = () if kernel != "backward_kv" else (both,) if head <= together else (PART_K, PART_V)
        return _instances(kernel, family, flags, parts, 32 * warps, shared, 16 * warps, streamed, head)
    raise AssertionError(f"no tile of {kernel} for head size {head} fits {limit} bytes")


def _most_streamed(kernel: str, capability: int, head: int, flags: int) -> int:
    """The rows whose products fit the registers beside the accumulators of results."""
    if kernel == "decode":
        return 64
    old = capability < _COPIES_FROM  # what others copy goes through its registers
    if kernel == "forward":
        return 64 if head <= 128 else 16 if old and head > 160 else 32
    if head > (192 if kernel == "backward_kv" else 224) or (old and kernel == "backward_q" and head >= 160):
        return 16
    if kernel == "backward_kv" and capability in (86, 89, 90) and head == 128 and flags & RICH:
        return 16  # with 32 NVRTC 13.0 spilled 8 to 24 bytes
    return 64 if kernel == "backward_q" and head <= 64 and not old else 32


def _tensor_bytes(kernel: str, head: int, warps: int, streamed: int, stages: int) -> int:
    """What csrc/cuda takes from its arena, in the order in which the kernels do."""
    owned = {"forward": 16 * warps, "decode": DECODE_ROWS}.get(kernel, 2 * 16 * warps)
    tiles = (owned + 2 * stages * streamed) * (head + 8) * 2
    return tiles + _beside_tiles(kernel, warps, streamed, head, 4)


def _beside_tiles(kernel: str, warps: int, streamed: int, columns: int, accumulator: int) -> int:
    if kernel == "decode":
        return _SEEN_BYTES + (2 * DECODE_ROWS * warps + DECODE_ROWS * (columns + 8)) * accumulator
    return warps * streamed * accumulator if kernel == "backward_bias" else _SEEN_BYTES


@cache
def _plain_rows(kernel: str, dtype: torch.dtype, flags: int) -> list[Row]:
    double = dtype is torch.float64
    warps, streamed, columns = 4, 16 if double else 32, 64 if double else 128
    if kernel == "decode":
        streamed = 32 if double else 64
    accumulator, pitch = 8 if double else 4, 33  # CHUNK + 1 of csrc/cuda/plain.cuh
    chunks = (16 * warps + streamed) * pitch + warps * 16 * (streamed + 1)
    shared = chunks * accumulator + _beside_tiles(kernel, warps, streamed, columns, accumulator)
    family = f"Plain<{_TYPES[dtype]}, {warps}, {streamed}, {columns}>"
    parts = (PART_K, PART_V) if kernel == "backward_kv" else ()
    return _instances(kernel, family, flags, parts, 32 * warps, shared, 16 * warps, streamed, columns)


def _instances(kernel: str, family: str, flags: int, parts: tuple[int, ...], *sizes: int) -> list[Row]:
    tails = [f", {part}" for part in parts] or [""]
    return [Row(f"{kernel}<{family}, {flags}{tail}>", *sizes) for tail in tails]
