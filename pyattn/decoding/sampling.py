"""Greedy and random continuation of texts, one token after another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyattn.check import RangeError
from pyattn.decoding.protocol import Decoder, State, check_numbers, check_prompt, pad_batch
from pyattn.decoding.rules import Rules, history_of


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn from its logits. The restrictions act one after the other, in this order.

    Args:
        temperature: divides the logits; 0 takes the most probable token (greedy).
        top_k: draw from the k most probable tokens only.
        top_p: draw from the smallest set of tokens whose probabilities reach p (Holtzman et al. 2020, section 3.1).
        min_p: draw from tokens at least min_p times as probable as the first one (Nguyen et al. 2024, section 3).
    Raises:
        RangeError: a negative temperature, top_k below 1, top_p outside (0, 1], min_p outside [0, 1].
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise RangeError(f"temperature: expected 0 (greedy) or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise RangeError(f"top_k: expected at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise RangeError(f"top_p: expected a probability in (0, 1], got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise RangeError(f"min_p: expected a probability in [0, 1], got {self.min_p}")

    def draw(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One token for each row of logits [rows, vocab]: int64 [rows]."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        p = logits.softmax(-1)
        if self.top_p is not None:
            p_sorted, order = p.sort(descending=True)
            # A token stays when those before it have not reached top_p yet, so the first one always does.
            outside = p_sorted.cumsum(-1) - p_sorted >= self.top_p
            p = p.masked_fill(outside.scatter(-1, order, outside), 0.0)
        if self.min_p is not None:
            p = p.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), 0.0)
        return torch.multinomial(p, 1, generator=generator)[:, 0]


GREEDY = Sampling(temperature=0)


def generate(model: Decoder, prompt: Tensor, count: int, **options: Any) -> list[list[int]]:
    """What `stream` yields, as one list of new tokens for each prompt."""
    texts: list[list[int]] = [[] for _ in prompt]
    for tokens in stream(model, prompt, count, **options):
        for text, token in zip(texts, tokens, strict=True):
            text += [] if token is None else [token]
    return texts


@torch.no_grad()
def stream(
    model: Decoder,
    prompt: Tensor,
    count: int,
    *,
    lengths: Tensor | None = None,
    sampling: Sampling = GREEDY,
    rules: Rules = Rules(),  # noqa: B008 (it is frozen)
    end: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[list[int | None]]:
    """Continues each prompt by at most `count` tokens, yielded as they come. Put the model into eval mode first.

    A language model's text that outgrows the context goes on from its last half.

    Args:
        prompt: [b, m] integer, m >= 1, padded behind.
        lengths: integer [b], tokens of each prompt; all m by default.
        sampling: how tokens are drawn; the most probable ones by default.
        rules: which tokens may come.
        end: the token that ends a text; it is not yielded.
        generator: source of randomness, on the prompt's device.
    Yields:
        The next token of each prompt's text, None for texts that have ended.
    Raises:
        RangeError: an empty prompt, lengths that do not fit it; a model that does not continue its prompt (a
            translation) is asked for more tokens than it has positions; logits are NaN.
    """
    check_prompt(prompt, lengths)
    if count < 1 or not len(prompt):
        return
    counts = [prompt.shape[1]] * len(prompt) if lengths is None else lengths.tolist()
    texts = [row[:held] for row, held in zip(prompt.tolist(), counts, strict=True)]
    logits, state, steps = _begin(model, texts, prompt.device, count - 1)
    history = history_of(state.read, prompt.device)
    running = list(range(len(prompt)))  # the prompt of each row
    for generated in range(count):
        check_numbers(logits)
        scores = rules(logits.float(), history, generated, end)
        open_rows = scores.amax(-1) > -torch.inf  # the others' texts end, because the rules let nothing come
        tokens = sampling.draw(scores.where(open_rows[:, None], 0.0), generator)
        chosen = tokens.tolist()
        alive = [row for row, is_open in enumerate(open_rows.tolist()) if is_open and chosen[row] != end]
        if alive:
            by_prompt = {running[row]: chosen[row] for row in alive}
            yield [by_prompt.get(i) for i in range(len(prompt))]
        if not alive or generated + 1 == count:
            return
        texts = [[*texts[row], chosen[row]] for row in alive]
        if len(alive) < len(running):
            state.reorder(alive)
            tokens, history, running = tokens[alive], history[alive], [running[row] for row in alive]
        history = torch.cat([history, tokens[:, None]], 1)
        if steps:
            logits, steps = model.step(tokens, state), steps - 1
        else:
            half = max(1, model.config.context // 2)
            texts = [text[-half:] if len(text) > model.config.context else text for text in texts]
            logits, state, steps = _begin(model, texts, prompt.device, count - generated - 2)


def _begin(model: Decoder, texts: list[list[int]], device: torch.device, steps: int) -> tuple[Tensor, State, int]:
    """Prefills for `steps` steps, or as many as a language model's context has room for, and says how many."""
    if model.continues_prompt:
        texts = [text[-model.config.context :] for text in texts]
        steps = min(steps, model.config.context - max(map(len, texts)))
    return *model.prefill(*pad_batch(texts, device), count=steps), steps
