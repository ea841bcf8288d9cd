"""The weights of fused attention, which are in memory nowhere, for who wants to see them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Columns of weights that one pass computes: the largest value size that every backend takes.
_COLUMNS = 256


def weights_of(contexts: Callable[[Tensor], Tensor], k: Tensor) -> Tensor:
    """The weights [b, h, m, n] of attention, of which there is only a function from values to contexts [b, h, m, dv].

    The columns of the identity are values whose contexts are the weights.

    Args:
        contexts: called once for every 256 keys, each time with the same weights.
        k: the keys [b, h, n, d].
    """
    b, h, n, _ = k.shape
    j = torch.arange(n, device=k.device)
    columns = [(j[:, None] == part).to(k.dtype) for part in j.split(_COLUMNS)]  # each [n, at most 256]
    return torch.cat([contexts(values.expand(b, h, -1, -1)) for values in columns], -1)
