"""Greedy and random continuation of a text, one token after another, with a key/value cache."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from pyattn.check import RangeError


class Cache(Protocol):
    """What a model remembers of the tokens it has read."""

    length: int
    context: int


class LanguageModel(Protocol):
    """What `generate` needs from a model: logits [b, m, vocab] of tokens [b, m] that follow those in the cache."""

    def __call__(self, tokens: Tensor, cache: Any) -> Tensor: ...

    def new_cache(self) -> Cache: ...


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Tensor,
    count: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continues each prompt by `count` tokens. Put the model into eval mode first.

    A text that outgrows the model's context goes on from its last half: the cache is filled anew with that.

    Args:
        prompt: [b, m] integer, m >= 1.
        temperature: divides the logits; 0 takes the most probable token (greedy).
        top_k: draw from the k most probable tokens only.
        top_p: draw from the smallest set of tokens whose probabilities reach p (Holtzman et al. 2020, section 3.1).
        generator: source of randomness, on the prompt's device.
    Returns:
        [b, m + count], dtype of prompt.
    Raises:
        RangeError: an empty prompt, a negative temperature, top_k below 1, top_p outside (0, 1].
    """
    _check(prompt, temperature, top_k, top_p)
    tokens, cache = prompt, model.new_cache()
    unread = prompt[:, -cache.context :]
    for _ in range(count):
        if cache.length + unread.shape[1] > cache.context:
            cache = model.new_cache()
            unread = tokens[:, -max(1, cache.context // 2) :]
        logits = model(unread, cache)[:, -1].float()
        unread = choose(logits, temperature, top_k, top_p, generator)
        tokens = torch.cat([tokens, unread.to(tokens.dtype)], 1)
    return tokens


def choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One token per row of logits [b, vocab]; the arguments are `generate`'s. Returns int64 [b, 1]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    p = logits.softmax(-1)
    if top_p is not None:
        p_sorted, order = p.sort(descending=True)
        # A token stays when those before it have not reached top_p yet, so the first one always does.
        outside = p_sorted.cumsum(-1) - p_sorted >= top_p
        p = p.masked_fill(outside.scatter(-1, order, outside), 0.0)
    return torch.multinomial(p, 1, generator=generator)


def _check(prompt: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise RangeError(f"prompt: expected [b, m] with m >= 1, got {list(prompt.shape)}")
    if temperature < 0:
        raise RangeError(f"temperature: expected 0 (greedy) or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise RangeError(f"top_k: expected at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise RangeError(f"top_p: expected a probability in (0, 1], got {top_p}")
