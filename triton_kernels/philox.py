"""Dropout's bits: Philox-4x32-10 (Salmon et al. 2011) on the absolute position, whatever the block size.

The key is the seed, the counter (j // 4, i, head, batch entry); key j takes word j % 4 of the four it gives.
"""

import triton
import triton.language as tl


@triton.jit
def dropout_keep(seed, threshold, i_b, i_h, i_m, start_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which weights of queries `i_m` and keys `start_n ...` are kept: bool [BLOCK_M, BLOCK_N].

    threshold: the uint32 below which a word drops its weight, in the bits of an int32.
    """
    # [BLOCK_M, BLOCK_N // 4]
    nothing = tl.zeros([BLOCK_M, BLOCK_N // 4], dtype=tl.int32)
    j_4 = start_n // 4 + tl.arange(0, BLOCK_N // 4)
    w0, w1, w2, w3 = tl.philox(seed, nothing + j_4[None, :], nothing + i_m[:, None], nothing + i_h, nothing + i_b)
    limit = threshold.to(tl.uint32, bitcast=True)
    even = tl.join((w0 >= limit).to(tl.int8), (w2 >= limit).to(tl.int8))
    odd = tl.join((w1 >= limit).to(tl.int8), (w3 >= limit).to(tl.int8))
    return tl.reshape(tl.join(even, odd), [BLOCK_M, BLOCK_N]) != 0
