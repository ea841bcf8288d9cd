"""xformers.ops.fmha.attn_bias without a bias in memory: which keys a query sees, said by a class.

Classes, their constructors and the methods that make one of another are named as in xformers 0.0.35. What its kernels
need of them, like `materialize`, is left out. A block is one sequence of many that lie one after the other in a batch
of one. What a class means is in BANDS, by its name, so that xformers' own objects mean the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from pyattn.check import RangeError, ShapeError

Bias = TypeVar("Bias", bound="AttentionBias")
Padded = TypeVar("Padded", bound="BlockDiagonalPaddedKeysMask")


class Band(NamedTuple):
    """The keys that a query sees around its own position; None is unlimited."""

    left: int | None
    right: int | None
    top_left: bool = False  # the first query is aligned with the first key, instead of the last with the last


class AttentionBias:
    """Base of every bias that is not a tensor."""

    def to(self: Bias, device: torch.device | str) -> Bias:
        return self


class LowerTriangularMask(AttentionBias):
    """Query i sees the keys j <= i."""

    def __init__(self, device: torch.device | None = None) -> None:
        pass

    def add_bias(self, bias: Tensor) -> LowerTriangularMaskWithTensorBias:
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """Query i sees the keys j <= i, and [b, h, m, n] is added to the scores."""

    def __init__(self, bias: Tensor) -> None:
        self._bias = bias

    def to(self, device: torch.device | str) -> LowerTriangularMaskWithTensorBias:
        return LowerTriangularMaskWithTensorBias(self._bias.to(device))


class LowerTriangularFromBottomRightMask(AttentionBias):
    """Query i sees the keys j <= i + n - m."""

    def make_local_attention(self, window_size: int) -> LowerTriangularFromBottomRightLocalAttentionMask:
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """Query i sees the window_size keys up to i + n - m."""

    _window_size: int

    def __post_init__(self) -> None:
        _check_window(window_size=self._window_size - 1)


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    """Query i sees the keys from i + n - m - window_left to i + n - m + window_right."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        _check_window(window_left=self.window_left, window_right=self.window_right)


@dataclass
class SeqLenInfo:
    """Where blocks begin along a dimension: `seqstart` int32 [blocks + 1], and the same as a list."""

    seqstart: Tensor
    seqstart_py: list[int]

    @classmethod
    def from_seqlens(cls, seqlens: Iterable[int], *, device: torch.device | str | None = None) -> SeqLenInfo:
        starts = list(accumulate(seqlens, initial=0))
        return cls(torch.tensor(starts, dtype=torch.int32, device=device or _default_device()), starts)

    @property
    def lengths(self) -> list[int]:
        return [end - start for start, end in pairwise(self.seqstart_py)]

    def to(self, device: torch.device | str) -> SeqLenInfo:
        return SeqLenInfo(self.seqstart.to(device), self.seqstart_py)

    def split(self, tensor: Tensor, batch_sizes: Sequence[int] | None = None) -> list[Tensor]:
        """[1, total, ...] as one [b_i, m_i, ...] for each of `batch_sizes`; each block alone by default."""
        if tensor.shape[:2] != (1, self.seqstart_py[-1]):
            raise ShapeError(f"tensor: expected [1, {self.seqstart_py[-1]}, ...], got {list(tensor.shape)}")
        ends = accumulate(batch_sizes or [1] * len(self.lengths), initial=0)
        return [
            tensor[:, self.seqstart_py[first] : self.seqstart_py[last]].reshape(last - first, -1, *tensor.shape[2:])
            for first, last in pairwise(ends)
        ]


@dataclass
class PaddedSeqLenInfo(SeqLenInfo):
    """Blocks that have room for `padding` rows each and fill the first `seqlen_py` of them."""

    seqlen_py: list[int]
    padding: int

    @classmethod
    def from_seqlens_padded(
        cls, seqlens: Sequence[int], padding: int, *, device: torch.device | str | None = None
    ) -> PaddedSeqLenInfo:
        if any(length > padding for length in seqlens):
            raise RangeError(f"kv_seqlen: expected at most kv_padding={padding}, got {max(seqlens)}")
        rooms = SeqLenInfo.from_seqlens([padding] * len(seqlens), device=device)
        return cls(rooms.seqstart, rooms.seqstart_py, list(seqlens), padding)

    @property
    def lengths(self) -> list[int]:
        return self.seqlen_py

    def to(self, device: torch.device | str) -> PaddedSeqLenInfo:
        return PaddedSeqLenInfo(self.seqstart.to(device), self.seqstart_py, self.seqlen_py, self.padding)


@dataclass
class _Blocks(AttentionBias):
    q_seqinfo: SeqLenInfo
    k_seqinfo: SeqLenInfo

    def to(self: Bias, device: torch.device | str) -> Bias:
        changes = {name: info.to(device) for name, info in vars(self).items() if isinstance(info, SeqLenInfo)}
        return type(self)(**vars(self) | changes)


@dataclass
class BlockDiagonalMask(_Blocks):
    """A query sees the keys of its own block."""

    _batch_sizes: Sequence[int] | None = None

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None, *, device: torch.device | None = None
    ) -> BlockDiagonalMask:
        q = SeqLenInfo.from_seqlens(q_seqlen, device=device)
        if kv_seqlen is None or list(kv_seqlen) == list(q_seqlen):
            return cls(q, q)
        _check_blocks(q_seqlen, kv_seqlen)
        return cls(q, SeqLenInfo.from_seqlens(kv_seqlen, device=device))

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[BlockDiagonalMask, Tensor]:
        """For tensors [b_i, m_i, ...]: the bias, and their rows as one [1, total, ...]."""
        made = cls.from_seqlens(_lengths(tensors), device=tensors[0].device)
        made._batch_sizes = [t.shape[0] for t in tensors]
        return made, _in_a_row(tensors)

    @classmethod
    def from_tensor_lists_qkv(
        cls, tensors_q: Sequence[Tensor], tensors_k: Sequence[Tensor], tensors_v: Sequence[Tensor] | None = None
    ) -> tuple[BlockDiagonalMask, Tensor, Tensor, Tensor | None]:
        made = cls.from_seqlens(_lengths(tensors_q), _lengths(tensors_k), device=tensors_q[0].device)
        made._batch_sizes = [t.shape[0] for t in tensors_q]
        return made, _in_a_row(tensors_q), _in_a_row(tensors_k), None if tensors_v is None else _in_a_row(tensors_v)

    def split_queries(self, tensor: Tensor) -> list[Tensor]:
        return self.q_seqinfo.split(tensor, self._batch_sizes)

    def split_kv(self, tensor: Tensor) -> list[Tensor]:
        return self.k_seqinfo.split(tensor, self._batch_sizes)

    split = split_queries

    def make_causal(self) -> BlockDiagonalCausalMask:
        return BlockDiagonalCausalMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_causal_from_bottomright(self) -> BlockDiagonalCausalFromBottomRightMask:
        return BlockDiagonalCausalFromBottomRightMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_local_attention(self, window_size: int) -> BlockDiagonalCausalLocalAttentionMask:
        return BlockDiagonalCausalLocalAttentionMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes, window_size)

    def make_local_attention_from_bottomright(
        self, window_size: int
    ) -> BlockDiagonalCausalLocalAttentionFromBottomRightMask:
        return BlockDiagonalCausalLocalAttentionFromBottomRightMask(
            self.q_seqinfo, self.k_seqinfo, self._batch_sizes, window_size
        )


@dataclass
class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Query i of a block sees its keys j <= i."""


@dataclass
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """Query i of a block sees its keys j <= i + n - m."""


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    """Query i of a block sees the _window_size keys up to i."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        _check_window(window_size=self._window_size - 1)


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    """Query i of a block sees the _window_size keys up to i + n - m."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        _check_window(window_size=self._window_size - 1)


@dataclass
class BlockDiagonalPaddedKeysMask(_Blocks):
    """A query sees the keys of its own block, which has room for more."""

    @classmethod
    def from_seqlens(
        cls: type[Padded],
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        causal_diagonal: Any = None,
        *,
        device: torch.device | None = None,
        **window: int,
    ) -> Padded:
        """causal_diagonal is without meaning, as in xformers."""
        _check_blocks(q_seqlen, kv_seqlen)
        q = SeqLenInfo.from_seqlens(q_seqlen, device=device)
        return cls(q, PaddedSeqLenInfo.from_seqlens_padded(kv_seqlen, kv_padding, device=device), **window)

    def make_local_attention(self, window_left: int, window_right: int) -> BlockDiagonalLocalAttentionPaddedKeysMask:
        return BlockDiagonalLocalAttentionPaddedKeysMask(self.q_seqinfo, self.k_seqinfo, window_left, window_right)


@dataclass
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Query i of a block sees its keys j <= i + n - m."""

    causal_diagonal: Any = None


@dataclass
class BlockDiagonalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Query i of a block sees its keys from i + n - m - window_left to i + n - m + window_right."""

    window_left: int
    window_right: int

    @classmethod
    def from_seqlens_local(
        cls, q_seqlen: Sequence[int], kv_padding: int, kv_seqlen: Sequence[int], window_left: int, window_right: int
    ) -> BlockDiagonalLocalAttentionPaddedKeysMask:
        return cls.from_seqlens(q_seqlen, kv_padding, kv_seqlen, window_left=window_left, window_right=window_right)


@dataclass
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Query i of a block sees the _window_size keys up to i + n - m."""

    _window_size: int

    @classmethod
    def from_seqlens_local(
        cls, q_seqlen: Sequence[int], kv_padding: int, kv_seqlen: Sequence[int], window_size: int
    ) -> BlockDiagonalCausalLocalAttentionPaddedKeysMask:
        return cls.from_seqlens(q_seqlen, kv_padding, kv_seqlen, _window_size=window_size)


def _last_keys(bias: Any) -> Band:
    return Band(bias._window_size - 1, 0)


def _around(bias: Any) -> Band:
    return Band(bias.window_left, bias.window_right)


BANDS: dict[str, Callable[[Any], Band]] = {
    "LowerTriangularMask": lambda _: Band(None, 0, top_left=True),
    "LowerTriangularMaskWithTensorBias": lambda _: Band(None, 0, top_left=True),
    "LowerTriangularFromBottomRightMask": lambda _: Band(None, 0),
    "LowerTriangularFromBottomRightLocalAttentionMask": _last_keys,
    "LocalAttentionFromBottomRightMask": _around,
    "BlockDiagonalMask": lambda _: Band(None, None),
    "BlockDiagonalCausalMask": lambda _: Band(None, 0, top_left=True),
    "BlockDiagonalCausalFromBottomRightMask": lambda _: Band(None, 0),
    "BlockDiagonalCausalLocalAttentionMask": lambda bias: _last_keys(bias)._replace(top_left=True),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": _last_keys,
    "BlockDiagonalPaddedKeysMask": lambda _: Band(None, None),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": lambda _: Band(None, 0),
    "BlockDiagonalLocalAttentionPaddedKeysMask": _around,
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": _last_keys,
}


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _lengths(tensors: Sequence[Tensor]) -> list[int]:
    return [t.shape[1] for t in tensors for _ in range(t.shape[0])]


def _in_a_row(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(1, -1, *t.shape[2:]) for t in tensors], dim=1)


def _check_blocks(q_seqlen: Sequence[int], kv_seqlen: Sequence[int]) -> None:
    if len(kv_seqlen) != len(q_seqlen):
        raise ShapeError(f"kv_seqlen: expected {len(q_seqlen)} blocks, as q_seqlen has, got {len(kv_seqlen)}")


def _check_window(**sides: int) -> None:
    for name, keys in sides.items():
        if keys < 0:
            least = 1 if name == "window_size" else 0
            raise RangeError(f"{name}: expected at least {least}, got {keys + least}")
