"""Vectors of tokens and of positions: rows of a table, by integers that come from a user, and sinusoids."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pyattn.check import DtypeError, RangeError, ShapeError, is_traced
from pyattn.spec import dtype_name


def check_tokens(name: str, ids: Tensor) -> None:
    """Raises ShapeError unless ids are [b, m]."""
    if ids.ndim != 2:
        raise ShapeError(f"{name}: expected [b, m], got {list(ids.shape)}")


def check_ids(name: str, ids: Tensor, count: int) -> None:
    """Raises DtypeError unless ids are int64 or int32, and on the CPU RangeError unless they are in [0, count)."""
    _check_integers(name, ids)
    if ids.device.type == "cpu" and ids.numel() and not is_traced(ids):
        low, high = ids.aminmax()
        if low < 0 or high >= count:
            raise RangeError(f"{name}: expected values in [0, {count}), got {int(low)} to {int(high)}")


def embed(name: str, ids: Tensor, table: Tensor, padding: int | None = None) -> Tensor:
    """table[ids]. Rows of `padding` get no gradient.

    Raises:
        DtypeError: ids are not int64 or int32; names the argument, `name`.
        RangeError: an id outside the table. On the CPU alone: the kernels of a GPU have no way to raise it.
    """
    _check_integers(name, ids)
    try:
        return F.embedding(ids, table, padding)
    except IndexError:
        low, high = ids.aminmax()
        raise RangeError(f"{name}: expected values in [0, {len(table)}), got {int(low)} to {int(high)}") from None


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """sin(p / 10000^(2c / width)) for c = 0 .. width / 2 - 1, and behind all of them the cosines: [*, width].

    In the dtype of `positions`; float32 has the sine of a thousandth position wrong in its fifth digit. Source: Vaswani
    et al. 2017, arXiv:1706.03762, section 3.5, whose order of the channels is another one.
    """
    rates = 10000.0 ** (torch.arange(0, width, 2, dtype=positions.dtype, device=positions.device) / -width)
    angles = positions[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)


def _check_integers(name: str, ids: Tensor) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise DtypeError(f"{name}: expected int64 or int32, got {dtype_name(ids.dtype)}")
