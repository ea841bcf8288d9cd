"""flash_attn.bert_padding: from padded sequences to packed ones and back. Plain torch, so all of it has gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from pyattn.check import ShapeError
from pyattn.face import showing

__all__ = ["index_first_axis", "index_put_first_axis", "pad_input", "unpad_input"]

__dir__ = showing(__all__)


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """The rows `indices` of input [rows, ...]: [number of indices, ...]."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """[first_axis_dim, ...] with values [number of indices, ...] in the rows `indices`, and 0 elsewhere."""
    if indices.shape != values.shape[:1]:
        raise ShapeError(f"indices: expected [{values.shape[0]}], a row for each of the values, "
                         f"got {list(indices.shape)}")  # fmt: skip
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy_(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Packs the tokens of a padded batch one after the other.

    Args:
        hidden_states: [b, s, ...].
        attention_mask: bool or integer [b, s]; True or not 0 is a token.
        unused_mask: bool or integer [b, s], more tokens to pack, which `seqused` does not count.

    Returns:
        (hidden_states [total, ...], indices int64 [total] of the tokens in the batch's b * s, cu_seqlens int32 [b + 1],
        the longest sequence's length as an int, for which a GPU is waited for, seqused int32 [b]).

    Raises:
        ShapeError: a mask is not [b, s].
    """
    for name, mask in (("attention_mask", attention_mask), ("unused_mask", unused_mask)):
        if mask is not None and mask.shape != hidden_states.shape[:2]:
            raise ShapeError(f"{name}: expected [b, s] = {list(hidden_states.shape[:2])}, that of hidden_states, "
                             f"got {list(mask.shape)}")  # fmt: skip
    used = attention_mask.bool()
    packed = used if unused_mask is None else used | unused_mask.bool()
    lengths = packed.sum(-1, dtype=torch.int32)
    indices = packed.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, cu_seqlens, max(lengths.tolist(), default=0), used.sum(-1, dtype=torch.int32)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Undoes `unpad_input`: tokens [total, ...] at their places in [batch, seqlen, ...], and 0 elsewhere."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
