"""Beam search: the most probable continuations that a search of a fixed width finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from pyattn.check import RangeError
from pyattn.decoding.protocol import Decoder, check_numbers, check_prompt
from pyattn.decoding.rules import Rules, history_of

_PAGE = 32  # tokens; reordering copies half of one per beam that moved, and attention is slower over smaller ones


@dataclass(frozen=True, slots=True, order=True)
class Hypothesis:
    """A continuation, without its end token. `score` is `log_prob` (natural, end included) divided by its length."""

    score: float
    log_prob: float
    tokens: list[int]


def by_length(alpha: float = 1.0) -> Callable[[int], float]:
    """Scores divided by length**alpha, the length with the end token; alpha in [-10, 10]. 0: the log-probability."""
    _check_alpha(alpha)
    return lambda length: length**alpha


def gnmt(alpha: float = 0.6) -> Callable[[int], float]:
    """Scores divided by ((5 + length) / 6)**alpha, alpha in [-10, 10] (Wu et al. 2016, arXiv:1609.08144, eq. 14)."""
    _check_alpha(alpha)
    return lambda length: ((5 + length) / 6) ** alpha


def _check_alpha(alpha: float) -> None:
    if not -10 <= alpha <= 10:
        raise RangeError(f"alpha: expected a number from -10 to 10, got {alpha}")


@torch.no_grad()
def beam_search(
    model: Decoder,
    prompt: Tensor,
    count: int | Sequence[int],
    *,
    beams: int = 4,
    lengths: Tensor | None = None,
    normalize: Callable[[int], float] = by_length(),  # noqa: B008 (a pure function)
    rules: Rules = Rules(),  # noqa: B008 (it is frozen)
    end: int | None = None,
    early_stopping: bool | Literal["never"] = "never",
) -> list[list[Hypothesis]]:
    """The best `beams` continuations of each prompt, best first. Put the model into eval mode first.

    Each step keeps the most probable `beams` texts that go on; those that end are kept apart, and compete by score.

    Args:
        prompt: [b, m] integer, m >= 1, padded behind.
        count: the most tokens of a continuation, its end token included; one number, or one for each prompt. One that
            has not ended by then ends there.
        beams: width of the search.
        lengths: integer [b], tokens of each prompt; all m by default.
        normalize: by what a log-probability is divided, given the number of tokens.
        rules: which tokens may come.
        end: the token that ends a text.
        early_stopping: when a prompt is done that has `beams` ended continuations: "never" before no text that goes on
            can reach a better score, however long it becomes; False when none would if it ended now; True at once.
            (The names are those of transformers.)
    Raises:
        RangeError: an argument out of range; a prompt and its count exceed the model's context; logits are NaN.
    """
    check_prompt(prompt, lengths)
    counts = [count] * len(prompt) if isinstance(count, int) else list(count)
    if len(counts) != len(prompt):
        raise RangeError(f"count: expected one number, or {len(prompt)}, got {len(counts)}")
    for name, value in (("count", min(counts, default=1)), ("beams", beams)):
        if value < 1:
            raise RangeError(f"{name}: expected at least 1, got {value}")
    if not (isinstance(early_stopping, bool) or early_stopping == "never"):
        raise RangeError(f"early_stopping: expected True, False or 'never', got {early_stopping!r}")
    searches = [_Search(beams, most, end, normalize, early_stopping) for most in counts]
    if not searches:
        return []
    logits, state = model.prefill(prompt, lengths, count=[most - 1 for most in counts], page=_PAGE)
    history = history_of(state.read, prompt.device)
    running = searches
    for generated in range(max(counts)):
        log_probs = rules(logits.float().log_softmax(-1), history, generated, end)
        check_numbers(logits)
        best, tokens = (t.tolist() for t in log_probs.topk(min(2 * beams, log_probs.shape[1])))
        rows: list[int] = []  # of each beam that goes on: the row it continues
        first = 0
        for search in running:
            last = first + len(search.beams)
            rows += [first + beam for beam in search.advance(best[first:last], tokens[first:last])]
            first = last
        running = [search for search in running if search.beams]
        if not running:
            break
        if rows != list(range(len(logits))):
            state.reorder(rows)
        new = torch.tensor([beam.tokens[-1] for search in running for beam in search.beams], device=prompt.device)
        history = torch.cat([history[rows], new[:, None]], 1)
        logits = model.step(new, state)
    return [sorted(search.ended, reverse=True) for search in searches]


@dataclass(slots=True)
class _Beam:
    log_prob: float
    tokens: list[int]


@dataclass(slots=True)
class _Search:
    """The search for one prompt: the texts that go on, none when it is done, and the best of those that ended."""

    width: int
    most: int
    end: int | None
    normalize: Callable[[int], float]
    early_stopping: bool | Literal["never"]
    beams: list[_Beam] = field(default_factory=lambda: [_Beam(0.0, [])])
    ended: list[Hypothesis] = field(default_factory=list)

    def advance(self, log_probs: list[list[float]], tokens: list[list[int]]) -> list[int]:
        """One step. Gets the most probable tokens of each beam; returns which beam each of the next ones continues."""
        candidates = [
            (beam.log_prob + log_prob, i, token)
            for i, beam in enumerate(self.beams)
            for log_prob, token in zip(log_probs[i], tokens[i], strict=True)
            if log_prob > float("-inf")
        ]
        if not candidates:  # the rules let nothing come: the texts end here
            length = len(self.beams[0].tokens)
            scored = [(beam.log_prob / self.normalize(max(1, length)), beam) for beam in self.beams if length]
            self.ended += [Hypothesis(score, beam.log_prob, beam.tokens) for score, beam in scored]
            self.ended, self.beams = sorted(self.ended, reverse=True)[: self.width], []
            return []
        candidates.sort(key=lambda candidate: -candidate[0])
        length = len(self.beams[0].tokens) + 1
        next_beams: list[_Beam] = []
        parents: list[int] = []
        for rank, (log_prob, i, token) in enumerate(candidates[: 2 * self.width]):
            if token == self.end or length == self.most:
                if rank < self.width:  # beyond, it stands for a text that the search would have dropped
                    kept = self.beams[i].tokens + ([] if token == self.end else [token])
                    self.ended.append(Hypothesis(log_prob / self.normalize(length), log_prob, kept))
            elif len(next_beams) < self.width:
                next_beams.append(_Beam(log_prob, [*self.beams[i].tokens, token]))
                parents.append(i)
        self.ended = sorted(self.ended, reverse=True)[: self.width]
        self.beams = next_beams
        if self._is_done(length):
            self.beams = []
        return parents if self.beams else []

    def _is_done(self, length: int) -> bool:
        if len(self.ended) < self.width or not self.beams:
            return not self.beams
        if self.early_stopping is True:
            return True
        lengths = {length} if self.early_stopping is False else {length + 1, self.most}
        # A log-probability only falls; dividing it by the shortest or the longest text gives the best it can reach.
        return all(self.beams[0].log_prob / self.normalize(at) <= self.ended[-1].score for at in lengths)
