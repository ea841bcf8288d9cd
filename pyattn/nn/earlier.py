"""Attention of a recurrent network's states to those before them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pyattn.api import attention


def attend_earlier(implementation: str, states: Tensor, before: Tensor) -> Tensor:
    """What each state finds among the states before it, by scaled products; 0 where there is none.

    A state does not attend to itself: it is at hand where what it finds goes.

    Args:
        implementation: a name out of `pyattn.nn.attend.ATTENTIONS`.
        states: [b, m, size].
        before: [b, i, size], the states before the first of them.
    Returns:
        [b, m, size]
    Source: Cheng, Dong and Lapata 2016, arXiv:1601.06733, section 3.1, whose cells are such memories themselves.
    """
    keys = torch.cat([before, states[:, :-1]], 1).unsqueeze(1)
    query = states.unsqueeze(1)
    if implementation == "pyattn":  # its last query stands at the last key, so that a state sees what is before it
        return attention(query, keys, keys, causal=True).squeeze(1)
    m, n = states.shape[1], keys.shape[2]
    mask = torch.ones(m, n, dtype=torch.bool, device=states.device).tril(n - m)
    return F.scaled_dot_product_attention(query, keys, keys, attn_mask=mask).squeeze(1)
