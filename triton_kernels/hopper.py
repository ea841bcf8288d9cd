"""What the Hopper kernels share: tiles of work, rings of tiles in shared memory, warpgroups that take turns.

Rows reach shared memory by the tensor memory accelerator (TMA), which fills with zeros what lies outside a tensor. A
descriptor of rows (`descriptor`) makes it fill from *any* row on, so that a key that must not be seen is not read: the
end of a packed sequence, a key length and the last key of a tile are all the end of the tensor. It has five dimensions,
(wrap, row, head, row of the tile, column): the coordinate of the fourth is counted back from an extent of 2^30, and
the first two take that back, in addresses of 64 bits that wrap around. The idea is that of triton.tools.ragged_tma.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import launch
from .schedule import keys_seen, queries_seeing, sequence_rows

EXTENT = gl.constexpr(1 << 30)  # of a dimension without an end of its own
MOST_ROWS = 1 << 30  # that a tensor may have, of all heads and batch elements: coordinates have 32 bits
_UNBOUNDED = 0x7FFF0000  # more than any coordinate
_WRAP = 2**34  # elements; EXTENT times as many are a multiple of 2^64 bytes
WARPGROUPS = gl.constexpr(2)  # that compute; one more warp loads
SECTION_BYTES = 32 << 20  # of keys and values, which stay in the L2 cache while all their queries pass, and vice versa
_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


# --- tiles of work


@gluon.jit
def _rows_of_block(number, cu_ptr, other_cu_ptr, S, TOTAL, OTHER_TOTAL, BLOCK: gl.constexpr):
    """As `schedule.locate`, by bisection: Gluon has no free scan layout.

    Returns (block, first, length, other_first, other_length). A block that the sequence lacks begins past its end.
    """
    low = number * 0
    high = low + S - 1
    while low < high:
        middle = (low + high + 1) // 2
        owns = gl.load(cu_ptr + middle) // BLOCK + middle <= number
        low = gl.where(owns, middle, low)
        high = gl.where(owns, high, middle - 1)
    first, length = sequence_rows(cu_ptr, low, TOTAL)
    other_first, other_length = sequence_rows(other_cu_ptr, low, OTHER_TOTAL)
    return number - (first // BLOCK + low), first, length, other_first, other_length


@gluon.jit
def _place_of_tile(t, BLOCKS, SECTION, HEADS):
    """(block, batch element and head) of the `t`-th tile.

    Tiles come in sections of SECTION heads, for which the other side's rows fit the L2 cache; in a section the lower
    blocks of all heads come first.
    """
    section = t // (SECTION * BLOCKS)
    inside = t % (SECTION * BLOCKS)
    heads = gl.minimum(SECTION, HEADS - section * SECTION)
    return inside // heads, section * SECTION + inside % heads


@gluon.jit
def _counted(first, last, first_full, last_full, BLOCK: gl.constexpr):
    """Rows [first, last), of which [first_full, last_full) need no mask, as blocks from `first` on, for `visited`."""
    number = (gl.maximum(last - first, 0) + BLOCK - 1) // BLOCK
    full = gl.minimum((gl.maximum(first_full - first, 0) + BLOCK - 1) // BLOCK, number)
    stop = gl.maximum(gl.minimum(gl.maximum(last_full - first, 0) // BLOCK, number), full)
    return number, number - stop, stop - full


@gluon.jit
def tile_of_queries(t, problem, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Where the `t`-th tile of BLOCK_M queries stands, and which blocks of keys it meets. The last of a sequence come
    first, which under a causal mask see the most, so that the last to finish are short.

    Returns (i_b, i_h, first_m, start_m, n_queries, first_n, n_keys, offset, first, last, blocks): batch element and
    head; where the sequence's queries begin, the tile in it, and their number; the same for keys; the keys
    [first, last) that the tile sees; and the blocks of keys it meets, for `visited`. There is always one, if only to
    find that nothing is seen.
    """
    cu_q_ptr, cu_k_ptr, lengths_ptr, H, M, N, S, offset, left, right, BLOCKS, SECTION, HEADS = problem
    block, i_bh = _place_of_tile(t, BLOCKS, SECTION, HEADS)
    block = BLOCKS - 1 - block
    i_b = i_bh // H
    first_m = 0
    first_n = 0
    n_queries = M
    n_keys = N
    if cu_q_ptr is not None:
        block, first_m, n_queries, first_n, n_keys = _rows_of_block(block, cu_q_ptr, cu_k_ptr, S, M, N, BLOCK_M)
        offset = n_keys - n_queries
    if lengths_ptr is not None:
        n_keys = gl.minimum(gl.load(lengths_ptr + i_b), N)
    start_m = block * BLOCK_M
    stop_m = gl.minimum(start_m + BLOCK_M, n_queries)
    first, last, first_full, last_full = keys_seen(start_m, stop_m, n_keys, offset, left, right)
    last = gl.maximum(last, 0)
    number, after, full = _counted(first, last, first_full, last_full, BLOCK_N)
    blocks = (gl.maximum(number, 1), after, full)
    return i_b, i_bh % H, first_m, start_m, n_queries, first_n, n_keys, offset, first, last, blocks


@gluon.jit
def tile_of_keys(t, problem, BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr):
    """Where the `t`-th tile of BLOCK_N keys stands, and which blocks of queries see it, of which there may be none.

    Here H, BLOCKS and HEADS are those of keys. Returns (i_b, i_kv, first_n, start_n, rows, n_keys, first_m, n_queries,
    offset, first, last, blocks) as `tile_of_queries`, with `rows` the sequence's keys, hidden ones included.
    """
    cu_q_ptr, cu_k_ptr, lengths_ptr, H, M, N, S, offset, left, right, BLOCKS, SECTION, HEADS = problem
    block, i_bh = _place_of_tile(t, BLOCKS, SECTION, HEADS)
    i_b = i_bh // H
    first_m = 0
    first_n = 0
    n_queries = M
    rows = N
    if cu_k_ptr is not None:
        block, first_n, rows, first_m, n_queries = _rows_of_block(block, cu_k_ptr, cu_q_ptr, S, N, M, BLOCK_N)
        offset = rows - n_queries
    n_keys = rows
    if lengths_ptr is not None:
        n_keys = gl.minimum(gl.load(lengths_ptr + i_b), rows)
    start_n = block * BLOCK_N
    stop_n = gl.minimum(start_n + BLOCK_N, n_keys)
    first, last, first_full, last_full = queries_seeing(start_n, stop_n, n_queries, offset, left, right)
    blocks = _counted(first, last, first_full, last_full, BLOCK_M)
    return i_b, i_bh % H, first_n, start_n, rows, n_keys, first_m, n_queries, offset, first, last, blocks


@gluon.jit
def masked_blocks(blocks):
    """How many of a tile's blocks come first, and need a mask."""
    return blocks[0] - blocks[2]


@gluon.jit
def visited(step, blocks):
    """The block visited at `step`: those that need a mask, from the last to the first, and then the others.

    blocks: (their number, how many lie after those that need no mask, how many need none).
    """
    number, after, full = blocks
    masked = number - 1 - step - gl.where(step < after, 0, full)
    return gl.where(step < number - full, masked, masked + number - after)


@gluon.jit
def run_of(run: gl.constexpr, blocks):
    """(first step, steps) of run 0, the blocks that need a mask, and run 1, those that need none."""
    masked = masked_blocks(blocks)
    if run == 0:
        return masked * 0, masked
    return masked, blocks[2]


@gluon.jit
def settled(x):
    """x in registers of its own from here on. Were an accumulator filled between two products, ptxas would have the
    second wait for the first."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], gl.float32, is_pure=False, pack=1)


@gluon.jit
def unknown_zero():
    """0, which the compiler does not know: it would compute the addresses of a tile before a loop, and spill them."""
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def hide(s, col, limits):
    """Scores [64, BLOCK_N] of the keys from `col` on, -inf where a query does not see a key.

    limits: (n_keys or None, the key that the first query stands at, left, right).
    """
    end, here, left, right = limits
    i_m = gl.arange(0, s.shape[0], layout=gl.SliceLayout(1, s.type.layout))
    j_n = gl.expand_dims(col + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout)), 0)
    if end is not None:
        s = gl.where(j_n < end, s, -float("inf"))
    if left is not None:
        s = gl.where(j_n >= gl.expand_dims(i_m + (here - left), 1), s, -float("inf"))
    if right is not None:
        s = gl.where(j_n <= gl.expand_dims(i_m + (here + right), 1), s, -float("inf"))
    return s


# --- rings of tiles


@gluon.jit
def new_ring(desc, PLACES: gl.constexpr, READERS: gl.constexpr):
    """PLACES tiles in shared memory, each with a barrier that says it is full and one that READERS have left it."""
    tiles = gl.allocate_shared_memory(desc.dtype, [PLACES] + desc.block_type.shape, desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(PLACES):
        mbarrier.init(full.index(place), count=1)
        mbarrier.init(empty.index(place), count=READERS)
    return tiles, full, empty


@gluon.jit
def new_numbers(ring, NUMBERS: gl.constexpr, ROWS: gl.constexpr):
    """Room for NUMBERS of each of ROWS rows, beside every tile of the ring and guarded by the tile's own barriers."""
    PLACES: gl.constexpr = ring[1].type.shape[0]
    return gl.allocate_shared_memory(gl.float32, [PLACES * NUMBERS, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def place_of(ring, count):
    """Where the `count`-th tile that passes through the ring lies, and the phase of its barriers."""
    PLACES: gl.constexpr = ring[1].type.shape[0]
    return count % PLACES, (count // PLACES) & 1


@gluon.jit
def coordinates(i_h, outer, stop, row):
    """Of a tile that begins at `row` of the rows from `outer` on, which end at `stop`: counted from `outer`, too."""
    return [EXTENT, outer + stop, i_h, EXTENT - stop + row, 0]


@gluon.jit
def wait_empty(ring, count):
    place, phase = place_of(ring, count)
    mbarrier.wait(ring[2].index(place), phase ^ 1)


@gluon.jit
def load_rows(ring, count, desc, i_h, outer, stop, row):
    """Fills the ring's next place with the tile at `coordinates`, once its readers have left it."""
    tiles, full, _ = ring
    place, _ = place_of(ring, count)
    wait_empty(ring, count)
    mbarrier.expect(full.index(place), desc.block_type.nbytes)
    at = coordinates(i_h, outer, stop, row)
    tma.async_copy_global_to_shared(desc, at, full.index(place), tiles.index(place))


@gluon.jit
def wait_full(ring, count):
    place, phase = place_of(ring, count)
    mbarrier.wait(ring[1].index(place), phase)


@gluon.jit
def tile(ring, count):
    """[rows, columns] in shared memory."""
    tiles = ring[0]
    place, _ = place_of(ring, count)
    return tiles.index(place).reshape([tiles.type.shape[4], tiles.type.shape[5]])


@gluon.jit
def leave(ring, count):
    """Says that this reader needs the tile no more."""
    place, _ = place_of(ring, count)
    mbarrier.arrive(ring[2].index(place), count=1)


# --- warpgroups that take turns

# Hardware barriers by number: Triton's own code takes them from 0 on.
_FIRST_TURN = gl.constexpr(9)


@gluon.constexpr_function
def _barrier(operation, number):
    return f"bar.{operation} {number}, 256; mov.u32 $0, 0;"


@gluon.jit
def wait_for_turn(WARPGROUP: gl.constexpr):
    text: gl.constexpr = _barrier("sync", _FIRST_TURN + WARPGROUP)
    gl.inline_asm_elementwise(text, "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def pass_turn(WARPGROUP: gl.constexpr):
    text: gl.constexpr = _barrier("arrive", _FIRST_TURN + 1 - WARPGROUP)
    gl.inline_asm_elementwise(text, "=r", [], gl.int32, is_pure=False, pack=1)


# --- the host's part


def arguments(q: Tensor, k: Tensor, call: launch.Call, tiled: Tensor, block: int) -> dict[str, Any]:
    """The keyword arguments that say what a kernel over tiles of `block` rows of `tiled`, which is q or k, works on."""
    (b, h, m, d), (hk, n) = q.shape, k.shape[1:3]
    reach = m + n  # a window wider than this hides nothing; it keeps positions within 32 bits
    left, right = (None if side is None else min(side, reach) for side in (call.left, call.right))
    heads, rows = tiled.shape[1:3]
    others, group = (n, h // hk) if tiled is q else (m, 1)
    fitting = SECTION_BYTES // (4 * others * d * (1 if tiled is q else h // hk) + 1)
    return {
        "cu_q_ptr": call.cu_seqlens_q,
        "cu_k_ptr": call.cu_seqlens_k,
        "lengths_ptr": launch.contiguous(call.key_lengths),
        "H": heads,
        "GROUP": h // hk,
        "M": m,
        "N": n,
        "S": call.packed,
        "offset": call.offset,
        "left": left,
        "right": right,
        "BLOCKS": call.blocks(rows, block),
        "SECTION": min(max(fitting, 1) * group, b * heads),
        "HEADS": b * heads,
    }


def padded_size(d: int, dv: int) -> int:
    """The head size that tiles have: TMA fills the rest with zeros."""
    return max(64, launch.power_of_2(max(d, dv)))


def outers(**tensors: Tensor) -> dict[str, int]:
    """outer_NAME: how many rows lie from one batch element [heads, rows, size] to the next."""
    return {f"outer_{name}": t.stride(0) // t.stride(2) if t.shape[0] > 1 else 0 for name, t in tensors.items()}


def fits(t: Tensor) -> bool:
    """Whether a descriptor can say where the rows of [b, heads, rows, size] lie."""
    return t.data_ptr() % 16 == 0 and _layout_fits(t.shape[0], t.stride(), t.element_size())


@lru_cache(maxsize=1024)
def _layout_fits(batch: int, strides: tuple[int, ...], element_size: int) -> bool:
    outer, head, row, _ = strides
    if min(head, row) <= 0 or any(stride * element_size % 16 for stride in (head, row)):
        return False
    return batch == 1 or (outer % row == 0 and batch * outer // row < MOST_ROWS)


def descriptor(t: Tensor, rows: int, size: int) -> TensorDescriptor:
    """Of tiles of `rows` rows and `size` columns out of [b, heads, rows, columns], which `fits`.

    Copied from one of the same layout: to make one takes four times as long.
    """
    made = object.__new__(TensorDescriptor)
    made.__dict__ |= _descriptor(t.shape[1], t.shape[3], t.stride(), t.dtype, rows, size).__dict__ | {"base": t}
    return made


@lru_cache(maxsize=1024)
def _descriptor(
    heads: int, columns: int, strides: tuple[int, ...], dtype: torch.dtype, rows: int, size: int
) -> TensorDescriptor:
    row, block = strides[2], [1, 1, 1, rows, size]
    return TensorDescriptor(
        torch.empty((), dtype=dtype, device="meta"),
        [_UNBOUNDED, _UNBOUNDED, heads, EXTENT.value, columns],
        [_WRAP - row, row, strides[1], row, 1],
        block,
        gl.NVMMASharedLayout.get_default_for(block, _DTYPES[dtype]),
    )
