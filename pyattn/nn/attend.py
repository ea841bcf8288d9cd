"""What the attention of a model runs on: pyattn, or torch's own to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyattn.api import attention, attention_kvcache
from pyattn.check import RangeError


class Attention(NamedTuple):
    """One implementation.

    `full(q, k, v, causal, key_lengths, dropout_p)`: q [b, h, m, d] over k, v [b, h, n, d]; key_lengths [b] or None.
    `cached(q, k, v, lengths, block_table)`: causal, without gradients; the last query stands at the last of
    lengths [b] keys; k and v are [b, h, room, d], or pages [pages, h, page, d] with block_table [b, columns].
    """

    full: Callable[[Tensor, Tensor, Tensor, bool, Tensor | None, float], Tensor]
    cached: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def check_attention(name: str) -> None:
    """Raises RangeError unless `name` is one of ATTENTIONS."""
    if name not in ATTENTIONS:
        raise RangeError(f"attention: expected one of {', '.join(ATTENTIONS)}, got {name}")


def _pyattn_full(q: Tensor, k: Tensor, v: Tensor, causal: bool, key_lengths: Tensor | None, dropout_p: float) -> Tensor:
    return attention(q, k, v, causal=causal, key_lengths=key_lengths, dropout_p=dropout_p)


def _pyattn_cached(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, block_table: Tensor | None) -> Tensor:
    return attention_kvcache(q, k, v, lengths, block_table=block_table, causal=True)


def _torch_full(q: Tensor, k: Tensor, v: Tensor, causal: bool, key_lengths: Tensor | None, dropout_p: float) -> Tensor:
    if key_lengths is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=causal)
    keys = torch.arange(k.shape[2], device=q.device)
    mask = (keys < key_lengths[:, None])[:, None, None]  # [b, 1, 1, n]
    if causal:
        mask = mask & (keys <= keys[: q.shape[2], None])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


def _torch_cached(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, block_table: Tensor | None) -> Tensor:
    if block_table is not None:  # torch has no paged attention
        k, v = (pages[block_table.long()].transpose(1, 2).flatten(2, 3) for pages in (k, v))
    longest = int(lengths.max())
    keys = torch.arange(longest, device=q.device)
    queries = lengths[:, None] - q.shape[2] + torch.arange(q.shape[2], device=q.device)  # where each one stands
    mask = (keys <= queries[:, :, None])[:, None]  # [b, 1, m, n]
    return F.scaled_dot_product_attention(q, k[:, :, :longest], v[:, :, :longest], attn_mask=mask)


ATTENTIONS = {
    "pyattn": Attention(_pyattn_full, _pyattn_cached),
    "torch": Attention(_torch_full, _torch_cached),
}
