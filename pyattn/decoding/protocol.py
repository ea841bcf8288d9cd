"""What decoding asks of a model: read prompts, read one more token of each text, put texts in another order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from pyattn.check import RangeError


class State(Protocol):
    """The texts of a batch, one row each, as far as the model has read them."""

    @property
    def read(self) -> list[list[int]]:
        """What `prefill` read as each row's own text: the prompt, or the start token of a translation."""

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what rows[i] is now. Rows may be left out and may come several times."""


class Decoder(Protocol):
    """A model that continues prompts (a language model) or answers them (encoder and decoder)."""

    continues_prompt: ClassVar[bool]
    config: Any  # its `context` is the most tokens of a text

    def prefill(
        self,
        prompt: Tensor,
        lengths: Tensor | None = None,
        *,
        count: int | Sequence[int],
        page: int | None = None,
    ) -> tuple[Tensor, Any]:
        """Reads prompts [b, m], padded behind lengths [b]; room for `count` steps, one number or one for each prompt,
        in a cache with pages of `page`.

        Returns the logits [b, vocab] of the next token, and a State."""

    def step(self, tokens: Tensor, state: Any) -> Tensor:
        """Reads tokens [rows]; returns the logits [rows, vocab] of the next ones."""


def check_prompt(prompt: Tensor, lengths: Tensor | None) -> None:
    """Raises RangeError for prompts that are not [b, m] with m >= 1, or lengths outside 1 to m."""
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise RangeError(f"prompt: expected [b, m] with m >= 1, got {list(prompt.shape)}")
    if lengths is None:
        return
    if lengths.shape != prompt.shape[:1]:
        raise RangeError(f"lengths: expected [{len(prompt)}], got {list(lengths.shape)}")
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= prompt.shape[1]:
        raise RangeError(f"lengths: expected 1 to {prompt.shape[1]}, got {int(lengths.min())} to {int(lengths.max())}")


def check_numbers(logits: Tensor) -> None:
    """Raises RangeError for logits that are NaN: whatever would be chosen by them means nothing."""
    if bool(logits.amax().isnan()):
        raise RangeError("logits: expected numbers, got NaN: the model's weights are damaged, or overflow in its dtype")


def pad_batch(texts: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Token lists as prompts: int64 [b, longest], padded behind with 0, and their lengths, int64 [b]."""
    longest = max(map(len, texts))
    padded = [[*text, *[0] * (longest - len(text))] for text in texts]
    return torch.tensor(padded, device=device), torch.tensor([len(text) for text in texts], device=device)
