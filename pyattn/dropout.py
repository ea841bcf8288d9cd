"""Random bits of attention weights: a function of the seed and the place of a weight, of nothing else. By them dropout
keeps a weight, and hard attention chooses a key.

`pyattn.spec` states the rule; `csrc/cpu/dropout.h` and `triton_kernels/philox.py` draw the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def keep(seed: Tensor, dropout_p: float, b: Tensor, h: Tensor, i: Tensor, n: int) -> Tensor:
    """bool [..., n], True where a weight is kept: for batch entries b, heads h and queries i, which broadcast to [...].

    Args:
        seed: int64 scalar.
        dropout_p: probability of dropping a weight, in [0, 1).
        b, h, i: int64 indices.
        n: number of keys.
    """
    return words(seed, b, h, i, n) >= int(dropout_p * 2**32)


def words(seed: Tensor, b: Tensor, h: Tensor, i: Tensor, n: int) -> Tensor:
    """The random word of each weight, int64 [..., n] in [0, 2**32). Arguments are those of `keep`."""
    j4 = torch.arange((n + 3) // 4, device=seed.device)
    four = torch.broadcast_tensors(*philox(seed, j4, i[..., None], h[..., None], b[..., None]))  # each [..., n / 4]
    return torch.stack(four, -1).flatten(-2)[..., :n]


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, ...]:
    """Philox-4x32-10 (Salmon et al. 2011, section 3.3) in int64 arithmetic. Returns four words in [0, 2**32)."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # the low 64 bits wrap, which is all that is needed
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3
