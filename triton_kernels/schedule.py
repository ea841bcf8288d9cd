"""Which tiles of the score matrix are visited, and which of them need the mask.

The keys a block of queries sees form one range [first, last); the keys that *all* of them see form another inside it.
Blocks outside the first are skipped, blocks inside the second run without any mask arithmetic, and the blocks between
the two, at either end, are masked. The queries that see a block of keys are found the same way.

A kernel visits its blocks in two runs, each a loop compiled on its own: run 0 the masked ones, run 1 the full ones.
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
def queries_seeing(start_n, stop_n, M, offset, left, right):
    """(first, last, first_full, last_full): queries that see some, and every key of [start_n, stop_n).

    M is rounded up to whole blocks: queries past the end are loaded as 0 and their lse as -inf, which contributes 0.
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
