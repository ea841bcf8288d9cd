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
    """A continuation, without its end token. `score` is `log_prob` (natural, end included) normalized by length.

    ended: whether the end token came, and not only the count of tokens.
    """

    score: float
    log_prob: float
    tokens: list[int]
    ended: bool = True


def by_length(alpha: float = 1.0) -> Callable[[int], float]:
    """Scores divided by length**alpha, alpha in [-10, 10]. 0: the log-probability."""
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
    choices: int | None = None,
    finished: int | None = None,
    lengths: Tensor | None = None,
    normalize: Callable[[int], float] = by_length(),  # noqa: B008 (a pure function)
    count_end: bool = True,
    rules: Rules = Rules(),  # noqa: B008 (it is frozen)
    end: int | None = None,
    early_stopping: bool | Literal["never"] = "never",
) -> list[list[Hypothesis]]:
    """The best continuations of each prompt, best first: at most `beams`, or `finished`. Put the model into eval mode.

    Each step, every path (a text that goes on) proposes its most probable next tokens. The most probable `beams` of the
    texts that go on are the next paths; those that end are saved, never go on, and compete by score.

    The best of all texts are found if `choices` is the size M of the vocabulary and `beams` is M**(count - 1). If not,
    the search may lose them: with fewer choices, texts with a token that is not among the best of its path, however
    many beams there are; with fewer beams, texts whose beginning is not among the best. Both at 1 are greedy.

    Args:
        prompt: [b, m] integer, m >= 1, padded behind.
        count: the most tokens of a continuation, its end token included; one number, or one for each prompt. One that
            has not ended by then ends there.
        beams: how many paths are kept.
        choices: how many tokens a path proposes; all that end are saved. None: 2 * beams, so that texts that end take
            no place of those that go on; only those are saved that are among the best `beams` texts of their step.
        finished: a prompt is done when so many of its continuations have ended, or at its count; the best so many are
            returned. None: `beams`, and `early_stopping` says when it is done.
        lengths: integer [b], tokens of each prompt; all m by default.
        normalize: by what a log-probability is divided, given the length; positive, and either never falls with the
            length or never rises.
        count_end: whether the end token counts in the length, which decides what is best: sentences of 6, 4 and 9 words
            with log-probabilities -4.5, -3.2 and -7.2 score -0.75, -0.80 and -0.80 without it; with it -0.643, -0.640
            and -0.720. A text without a token has length 1 either way.
        rules: which tokens may come.
        end: the token that ends a text.
        early_stopping: when a prompt is done that has `beams` ended continuations: "never" before no text that goes on
            can reach a better score, however long it becomes; False when none would if it ended now; True at once.
            (The names are those of transformers.)
    Raises:
        RangeError: an argument out of range; both `finished` and `early_stopping` are given; a prompt and its count
            exceed the model's context; logits are NaN.
    Source: Sutskever et al. 2014, arXiv:1409.3215, section 3.2.
    """
    check_prompt(prompt, lengths)
    counts = [count] * len(prompt) if isinstance(count, int) else list(count)
    if len(counts) != len(prompt):
        raise RangeError(f"count: expected one number, or {len(prompt)}, got {len(counts)}")
    _check_at_least_1(count=min(counts, default=1), beams=beams, choices=choices, finished=finished)
    if not (isinstance(early_stopping, bool) or early_stopping == "never"):
        raise RangeError(f"early_stopping: expected True, False or 'never', got {early_stopping!r}")
    if finished is not None and early_stopping != "never":
        raise RangeError(f"finished: expected None with early_stopping={early_stopping}, got {finished}")
    plan = _Plan(
        beams=beams,
        proposals=2 * beams if choices is None else choices,
        saved=beams if choices is None else None,
        wanted=beams if finished is None else finished,
        stop=early_stopping if finished is None else True,
        length_of_end=int(count_end),
        normalize=normalize,
        end=end,
    )
    searches = [_Search(plan, most) for most in counts]
    if not searches:
        return []
    logits, state = model.prefill(prompt, lengths, count=[most - 1 for most in counts], page=_PAGE)
    if end is not None and not 0 <= end < logits.shape[1]:
        raise RangeError(f"end: expected a token of the model's {logits.shape[1]}, got {end}")
    history = history_of(state.read, prompt.device)
    running = searches
    for generated in range(max(counts)):
        log_probs = rules(logits.float().log_softmax(-1), history, generated, end)
        check_numbers(logits)
        best, tokens = (t.tolist() for t in log_probs.topk(min(plan.proposals, log_probs.shape[1])))
        rows: list[int] = []  # of each path: the row it continues
        first = 0
        for search in running:
            last = first + len(search.paths)
            rows += [first + path for path in search.advance(best[first:last], tokens[first:last])]
            first = last
        running = [search for search in running if search.paths]
        if not running:
            break
        if rows != list(range(len(logits))):
            state.reorder(rows)
        new = torch.tensor([path.tokens[-1] for search in running for path in search.paths], device=prompt.device)
        history = torch.cat([history[rows], new[:, None]], 1)
        logits = model.step(new, state)
    return [search.ended for search in searches]


def _check_at_least_1(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise RangeError(f"{name}: expected at least 1, got {value}")


@dataclass(frozen=True, slots=True)
class _Plan:
    """How the searches of all prompts go."""

    beams: int
    proposals: int
    saved: int | None  # texts that end are saved among so many best ones of a step; None: among all
    wanted: int
    stop: bool | Literal["never"]  # `early_stopping`, for `wanted` ended texts
    length_of_end: int
    normalize: Callable[[int], float]
    end: int | None


@dataclass(slots=True)
class _Path:
    log_prob: float
    tokens: list[int]


@dataclass(slots=True)
class _Search:
    """The search for one prompt: its paths, none when it is done, and the best of the texts that ended, best first."""

    plan: _Plan
    most: int
    paths: list[_Path] = field(default_factory=lambda: [_Path(0.0, [])])
    ended: list[Hypothesis] = field(default_factory=list)

    def advance(self, log_probs: list[list[float]], tokens: list[list[int]]) -> list[int]:
        """One step. Gets the tokens that each path proposes; returns which path each of the next ones continues."""
        plan, length = self.plan, len(self.paths[0].tokens) + 1
        candidates = [
            (path.log_prob + log_prob, i, token)
            for i, path in enumerate(self.paths)
            for log_prob, token in zip(log_probs[i], tokens[i], strict=True)
            if log_prob > float("-inf")
        ]
        candidates.sort(key=lambda candidate: -candidate[0])
        for log_prob, i, token in candidates[: plan.saved]:
            if token == plan.end:
                self._save(log_prob, self.paths[i].tokens, ended=True)
        going_on = [candidate for candidate in candidates if candidate[2] != plan.end][: plan.beams]
        if candidates:
            self.paths = [_Path(log_prob, [*self.paths[i].tokens, token]) for log_prob, i, token in going_on]
        if not candidates or length == self.most:  # the rules let nothing come, or the count is reached: all end here
            for path in self.paths:
                if path.tokens:
                    self._save(path.log_prob, path.tokens, ended=False)
            self.paths = []
        self.ended = sorted(self.ended, reverse=True)[: plan.wanted]
        if self.paths and self._is_done(length):
            self.paths = []
        return [i for _, i, _ in going_on] if self.paths else []

    def _save(self, log_prob: float, tokens: list[int], ended: bool) -> None:
        length = max(1, len(tokens) + (self.plan.length_of_end if ended else 0))
        self.ended.append(Hypothesis(log_prob / self.plan.normalize(length), log_prob, tokens, ended))

    def _is_done(self, length: int) -> bool:
        """Whether enough texts have ended, given the length of the paths."""
        plan = self.plan
        if len(self.ended) < plan.wanted:
            return False
        if plan.stop is True:
            return True
        # A log-probability only falls; dividing it by the shortest or the longest text gives the best it can reach. The
        # shortest is no longer than now where the end does not count, or where the rules let nothing come.
        lengths = (length, self.most) if plan.stop == "never" else (length,)
        return all(self.paths[0].log_prob / plan.normalize(at) <= self.ended[-1].score for at in lengths)
