"""Sentences in, translations out: a model, its tokenizer and beam search together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pyattn.check import RangeError
from pyattn.decoding.beam import beam_search, by_length
from pyattn.decoding.protocol import Decoder, pad_batch
from pyattn.decoding.rules import Rules
from pyattn.tokens import encode


@dataclass(frozen=True, slots=True)
class Translation:
    """One translation of a sentence, the normalized log-probability that the model gives it, and its tokens.

    ended: whether its end came, and not only the most tokens that it may have.
    """

    text: str
    score: float
    tokens: list[int]
    ended: bool = True


def translate(
    model: Decoder,
    tokenizer: Any,
    sentences: Sequence[str],
    *,
    beams: int = 4,
    batch: int = 64,
    normalize: Callable[[int], float] = by_length(),  # noqa: B008 (a pure function)
    rules: Rules = Rules(),  # noqa: B008 (it is frozen)
    first: int = 1,
    watch: Callable[[list[list[int]]], Iterable[list[int]]] = iter,
) -> list[list[Translation]]:
    """The best `beams` translations of each sentence, best first; none of a sentence without text.

    Sentences of similar length are translated together, `batch` at a time. A translation has at most twice the tokens
    of its source, and 10 more. The search ends where none would improve by ending at once, as transformers'.

    Args:
        model: in eval mode; its config has pad, start and end.
        tokenizer: whose `encode` gives a source with its end token.
        first: the number of the first sentence, for errors.
        watch: gets the list of batches and yields them again, as `rich.progress.track` does.
    Raises:
        RangeError: a sentence has more tokens than the model has positions; says which.
    """
    c = model.config
    device = next(model.parameters()).device  # type: ignore[attr-defined]
    sources = [encode(tokenizer, sentence).ids if sentence.strip() else [] for sentence in sentences]
    for number, source in enumerate(sources, first):
        if len(source) > c.context:
            raise RangeError(f"line {number:,}: expected at most context={c.context} tokens, got {len(source)}")
    found: list[list[Translation]] = [[] for _ in sentences]
    for places in watch(_by_length(sources, batch)):
        prompt, lengths = pad_batch([sources[place] for place in places], device)
        counts = [min(2 * len(sources[place]) + 10, c.context) for place in places]
        hypotheses = beam_search(
            model, prompt, counts, beams=beams, lengths=lengths, end=c.end, normalize=normalize, rules=rules,
            early_stopping=False,
        )  # fmt: skip
        for place, best in zip(places, hypotheses, strict=True):
            found[place] = [Translation(tokenizer.decode(h.tokens), h.score, h.tokens, h.ended) for h in best]
    return found


def _by_length(sources: Sequence[Sequence[int]], batch: int) -> list[list[int]]:
    """Places of the sources that are not empty, in groups of similar length."""
    order = sorted((place for place, source in enumerate(sources) if source), key=lambda place: len(sources[place]))
    return [order[first : first + batch] for first in range(0, len(order), batch)]
