"""Which tiles of the score matrix are visited, and which of them need the mask.

The keys a block of queries sees form one range [first, last); the keys that *all* of them see form another inside it.
Blocks outside the first are skipped, blocks inside the second run without any mask arithmetic, and the blocks between
the two, at either end, are masked. The queries that see a block of keys are found the same way.

Segment ids and ranks narrow both, by the least and greatest of every block: exactly where they are sorted, as ids are
where documents follow one another, and never wrongly where they are not.

A kernel visits its blocks in two runs, each a loop compiled on its own: run 0 the masked ones, run 1 the full ones.

Packed sequences have blocks of their own. A sequence of `length` rows from row `first` on owns the programs from
first // BLOCK + its number on: as many as it can need, wherever it begins, so that the host need not know its length.
"""

import triton
import triton.language as tl

MASKED_RUN = tl.constexpr(0)


@triton.constexpr_function
def first_run(has_masked):
    return 0 if has_masked else 1


@triton.constexpr_function
def stop_run(mask_base):
    """A boolean mask may hide anything, so with one there are no full blocks."""
    return 2 if mask_base is None else 1


@triton.constexpr_function
def hides_inside(*limits):
    """Whether one of the limits is there, by which keys may be hidden in the middle of others."""
    return any(limit is not None for limit in limits)


@triton.constexpr_function
def stages(run, *ids):
    """num_stages of a run's loop; None is the launch's.

    With ids, or windows, that is 1, because the masked run needs the registers; the full run, next to nothing.
    """
    return 2 if run == 1 and any(one is not None for one in ids) else None


@triton.jit
def held_keys(lengths_ptr, i_b, n_keys):
    """How many of n_keys a batch entry has."""
    if lengths_ptr is not None:
        n_keys = tl.minimum(tl.load(lengths_ptr + i_b), n_keys)  # a wrong length must not read past the keys
    return n_keys


@triton.jit
def keys_seen(start_m, stop_m, n_keys, offset, left, right):
    """(first, last, first_full, last_full): keys some, and keys every query of [start_m, stop_m) sees."""
    first = 0
    first_full = 0
    last = n_keys
    last_full = n_keys
    if left is not None:
        first = tl.maximum(start_m + offset - left, 0)
        first_full = tl.maximum(stop_m - 1 + offset - left, 0)
    if right is not None:
        last = tl.minimum(stop_m + offset + right, n_keys)
        last_full = tl.minimum(start_m + 1 + offset + right, n_keys)
    return first, last, first_full, last_full


@triton.jit
def within_windows(first, last, first_full, last_full, row_first, row_stop, inside):
    """`keys_seen`, narrowed by the rows' own windows, out of which those that are `inside`; both None without.

    A window may begin anywhere: what lies behind the last key is brought there, because rounding it up would overflow.
    """
    if row_first is not None:
        MOST: tl.constexpr = 2**31 - 1
        end = tl.maximum(last, 0)
        first = tl.minimum(tl.maximum(first, tl.min(tl.where(inside, row_first, MOST))), end)
        last = tl.minimum(last, tl.max(tl.where(inside, row_stop, 0)))
        first_full = tl.minimum(tl.maximum(first_full, tl.max(tl.where(inside, row_first, 0))), end)
        last_full = tl.minimum(last_full, tl.min(tl.where(inside, row_stop, MOST)))
    return first, last, first_full, last_full


@triton.jit
def queries_seeing(start_n, stop_n, M, offset, left, right):
    """(first, last, first_full, last_full): queries that see some, and every key of [start_n, stop_n).

    M is rounded up to whole blocks: queries past the end are loaded as 0 and their lse as -inf, which contributes 0
    where no score is infinite.
    """
    first = 0
    first_full = 0
    last = M
    last_full = M
    if right is not None:
        first = tl.maximum(start_n - offset - right, 0)
        first_full = tl.maximum(stop_n - 1 - offset - right, 0)
    if left is not None:
        last = tl.minimum(stop_n - offset + left, M)
        last_full = tl.minimum(start_n + 1 - offset + left, M)
    # A block past the last key sees nothing and is seen by nothing.
    last = tl.where(start_n < stop_n, last, 0)
    return first, last, first_full, tl.minimum(last_full, last)


@triton.jit
def visited_blocks(first, last, first_full, last_full, mask_base, BLOCK: tl.constexpr):
    """(start, full_start, full_stop, stop), multiples of BLOCK.

    Visited are the blocks in [start, stop), full are those in [full_start, full_stop).
    """
    start = first // BLOCK * BLOCK
    stop = tl.where(first < last, tl.cdiv(tl.maximum(last, 0), BLOCK) * BLOCK, start)
    if mask_base is not None:
        return start, start, start, stop
    full_start = tl.minimum(tl.cdiv(first_full, BLOCK) * BLOCK, stop)
    full_stop = tl.maximum(tl.maximum(last_full, 0) // BLOCK * BLOCK, full_start)
    return start, full_start, full_stop, stop


@triton.jit
def load_ids(ptr, i_b, LENGTH, positions, inside):
    """The segment ids or ranks [b, LENGTH] of one batch entry's `positions`; None where ptr is."""
    ids = ptr
    if ptr is not None:
        ids = tl.load(ptr + i_b.to(tl.int64) * LENGTH + positions, mask=inside, other=0)
    return ids


@triton.jit
def within_ids(
    start, full_start, full_stop, stop, ids, inside, ranges_ptr, i_b, LENGTH, SEES: tl.constexpr, BLOCK: tl.constexpr
):
    """`visited_blocks`, narrowed to those whose ids some row sees, out of rows with the `ids` that are `inside`.

    ids: None where the call has none. ranges_ptr: the (least, greatest) id of each block of the other side, which is
    LENGTH long, [b, blocks, 2]. SEES says which of those are visible: "same" ids, as of segments; "lower" ones, as
    queries see the ranks of keys; "higher" ones, as keys are seen. Of "windows" ids are places of keys, and a block of
    queries has the least first and the greatest stop, the greatest first and the least stop, [b, blocks, 4].
    """
    if ids is not None:
        MOST: tl.constexpr = 2 ** (ids.dtype.primitive_bitwidth - 1) - 1
        low, high = tl.min(tl.where(inside, ids, MOST)), tl.max(tl.where(inside, ids, -MOST - 1))
        WIDTH: tl.constexpr = 4 if SEES == "windows" else 2
        ranges = ranges_ptr + i_b.to(tl.int64) * tl.cdiv(LENGTH, BLOCK) * WIDTH
        SCAN: tl.constexpr = 128
        first_met = stop // BLOCK
        last_met = start // BLOCK - 1
        first_whole = first_met
        last_whole = last_met
        whole_blocks = 0
        for scan in tl.range(start // BLOCK, stop // BLOCK, SCAN):
            block = scan + tl.arange(0, SCAN)
            exists = block < stop // BLOCK
            least = tl.load(ranges + WIDTH * block, mask=exists, other=0)
            greatest = tl.load(ranges + WIDTH * block + 1, mask=exists, other=0)
            if SEES == "same":
                met = exists & (least <= high) & (greatest >= low)
                whole = exists & (least == high) & (greatest == low)
            elif SEES == "lower":
                met = exists & (least < high)
                whole = exists & (greatest < low)
            elif SEES == "windows":
                met = exists & (least <= high) & (greatest > low)
                last_first = tl.load(ranges + WIDTH * block + 2, mask=exists, other=0)
                first_stop = tl.load(ranges + WIDTH * block + 3, mask=exists, other=0)
                whole = exists & (last_first <= low) & (first_stop > high)
            else:
                met = exists & (greatest > low)
                whole = exists & (least > high)
            first_met = tl.minimum(first_met, tl.min(tl.where(met, block, stop // BLOCK), 0))
            last_met = tl.maximum(last_met, tl.max(tl.where(met, block, -1), 0))
            first_whole = tl.minimum(first_whole, tl.min(tl.where(whole, block, stop // BLOCK), 0))
            last_whole = tl.maximum(last_whole, tl.max(tl.where(whole, block, -1), 0))
            whole_blocks += tl.sum(whole.to(tl.int32), 0)
        stop = tl.maximum((last_met + 1) * BLOCK, start)
        start = tl.minimum(first_met * BLOCK, stop)
        in_a_row = last_whole - first_whole + 1 == whole_blocks
        full_start = tl.minimum(tl.maximum(full_start, first_whole * BLOCK), stop)
        full_stop = tl.maximum(tl.minimum(full_stop, tl.where(in_a_row, (last_whole + 1) * BLOCK, 0)), full_start)
    return start, full_start, full_stop, stop


@triton.jit
def num_blocks(TOTAL, cu_ptr, S, BLOCK: tl.constexpr):
    """Programs per head along an axis of TOTAL rows that is cut into blocks; S packed sequences lie on it."""
    blocks = tl.cdiv(TOTAL, BLOCK)
    if cu_ptr is not None:
        blocks = TOTAL // BLOCK + S
    return blocks


@triton.jit
def sequence_rows(cu_ptr, i_s, TOTAL):
    """(first, length) of a packed sequence. Wrong bounds must not read past the tensor."""
    first = tl.minimum(tl.maximum(tl.load(cu_ptr + i_s), 0), TOTAL)
    stop = tl.minimum(tl.load(cu_ptr + i_s + 1), TOTAL)
    return first, tl.maximum(stop - first, 0)


@triton.jit
def locate(number, cu_ptr, other_cu_ptr, S, TOTAL, OTHER_TOTAL, BLOCK: tl.constexpr):
    """Which rows of packed sequences the block `number` of an axis is, and which rows of the other axis it meets.

    Returns (i_s, block, first, length, other_first, other_length): the sequence, the block's number in it, and the
    sequence's rows on both axes. A program whose sequence has no such block has both lengths 0.
    """
    SCAN: tl.constexpr = 128
    i_s = -1
    for scan in tl.range(0, S, SCAN):
        sequence = scan + tl.arange(0, SCAN)
        exists = sequence < S
        owned_from = tl.load(cu_ptr + sequence, mask=exists, other=0) // BLOCK + sequence
        i_s += tl.sum((exists & (owned_from <= number)).to(tl.int32), 0)
    i_s = tl.maximum(i_s, 0)
    first, length = sequence_rows(cu_ptr, i_s, TOTAL)
    other_first, other_length = sequence_rows(other_cu_ptr, i_s, OTHER_TOTAL)
    block = number - (first // BLOCK + i_s)
    inside = (block >= 0) & (block < tl.cdiv(length, BLOCK))
    length = tl.where(inside, length, 0)
    other_length = tl.where(inside, other_length, 0)
    return i_s, tl.where(inside, block, 0), first, length, other_first, other_length


@triton.jit
def run_length(run: tl.constexpr, start, full_start, full_stop, stop):
    """The blocks of one run, times BLOCK."""
    if run == MASKED_RUN:
        return (full_start - start) + (stop - full_stop)
    return full_stop - full_start


@triton.jit
def block_start(run: tl.constexpr, step, start, full_start, full_stop, BLOCK: tl.constexpr):
    """Where the block begins that a run visits at `step`. The masked run leaps over the full blocks."""
    if run == MASKED_RUN:
        position = start + step
        position += tl.where(position < full_start, 0, full_stop - full_start)
    else:
        position = full_start + step
    return tl.multiple_of(position, BLOCK)
