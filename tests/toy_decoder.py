"""A model whose probabilities are known, to hold a search of texts against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Texts:
    read: list[list[int]]  # the prompts
    new: list[tuple[int, ...]]

    def reorder(self, rows: Sequence[int]) -> None:
        self.new = [self.new[row] for row in rows]


class ToyDecoder:
    """Continues every prompt alike: the next token's probabilities are a function of the new text."""

    continues_prompt = True
    config = None

    def __init__(self, probabilities: Callable[[tuple[int, ...]], Sequence[float]]) -> None:
        self.probabilities = probabilities
        self.steps = 0

    @classmethod
    def of_texts(cls, texts: Mapping[tuple[int, ...], float], vocab: int) -> ToyDecoder:
        """The model that gives each of these texts this probability; they sum to 1, and none begins another."""
        beginnings: dict[tuple[int, ...], float] = {}
        for text, p in texts.items():
            for length in range(len(text) + 1):
                beginnings[text[:length]] = beginnings.get(text[:length], 0.0) + p
        return cls(lambda text: [beginnings.get((*text, token), 0.0) / beginnings[text] for token in range(vocab)])

    def prefill(
        self, prompt: Tensor, lengths: Tensor | None = None, *, count: int | Sequence[int], page: int | None = None
    ) -> tuple[Tensor, Texts]:
        state = Texts(prompt.tolist(), [()] * len(prompt))
        return self._logits(state), state

    def step(self, tokens: Tensor, state: Texts) -> Tensor:
        self.steps += 1
        state.new = [(*text, token) for text, token in zip(state.new, tokens.tolist(), strict=True)]
        return self._logits(state)

    def _logits(self, state: Texts) -> Tensor:
        return torch.tensor([self.probabilities(text) for text in state.new], dtype=torch.float64).log()
