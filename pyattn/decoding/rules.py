"""Which tokens may come next, whatever the model says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyattn.check import RangeError

NOTHING = -1  # stands before texts that are shorter than others in their history


@dataclass(frozen=True, slots=True)
class Rules:
    """Restrictions of generated texts. They count a language model's prompt as part of its text.

    Args:
        repetition_penalty: the score of a token that the text has is divided by it where positive and multiplied where
            negative (Keskar et al. 2019, arXiv:1909.05858, section 4.1). 1 does nothing.
        no_repeat_ngram: no run of this many tokens comes twice (Paulus et al. 2018, section 2.5). 0 does nothing.
        min_tokens: the end token may come only after this many new tokens.
        forbidden: tokens that never come.
    Raises:
        RangeError: a penalty that is not positive, a negative count.
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    min_tokens: int = 0
    forbidden: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.repetition_penalty < float("inf"):
            raise RangeError(f"repetition_penalty: expected a positive number, got {self.repetition_penalty}")
        for name in ("no_repeat_ngram", "min_tokens"):
            if getattr(self, name) < 0:
                raise RangeError(f"{name}: expected at least 0, got {getattr(self, name)}")

    def __call__(self, scores: Tensor, history: Tensor, generated: int, end: int | None) -> Tensor:
        """Scores as the rules leave them.

        Args:
            scores: [rows, vocab] logits or log-probabilities.
            history: [rows, t] the texts so far, from `history_of`.
            generated: how many tokens of them are new.
            end: the token that ends a text.
        """
        if self.repetition_penalty != 1:
            seen = torch.where(history == NOTHING, history[:, -1:], history)
            of_seen = scores.gather(1, seen)
            penalty = self.repetition_penalty
            scores = scores.scatter(1, seen, torch.where(of_seen < 0, of_seen * penalty, of_seen / penalty))
        if 0 < self.no_repeat_ngram <= history.shape[1]:
            runs = history.unfold(1, self.no_repeat_ngram, 1)  # [rows, t - n + 1, n]
            tail = history[:, history.shape[1] - self.no_repeat_ngram + 1 :]
            again = (runs[:, :, :-1] == tail[:, None]).all(-1) & (runs[:, :, -1] != NOTHING)
            row, place = again.nonzero(as_tuple=True)
            scores = scores.index_put((row, runs[row, place, -1]), scores.new_tensor(-torch.inf))
        banned = [*self.forbidden, end] if end is not None and generated < self.min_tokens else [*self.forbidden]
        if banned and not 0 <= min(banned) <= max(banned) < scores.shape[1]:
            raise RangeError(f"rules: expected tokens in [0, {scores.shape[1]}), got {banned}")
        if banned:
            scores = scores.index_fill(1, torch.tensor(banned, device=scores.device), -torch.inf)
        return scores


def history_of(texts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Texts as the history that `Rules` reads, int64 [rows, longest]: their ends are in the last column."""
    longest = max(map(len, texts))
    return torch.tensor([[NOTHING] * (longest - len(text)) + [*text] for text in texts], device=device)
