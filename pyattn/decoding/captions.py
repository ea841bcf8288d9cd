"""Images in, captions out, with where the model looked for each word: a model, its tokenizer and beam search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyattn.decoding.beam import beam_search, by_length
from pyattn.decoding.rules import Rules

_WORD = "\u0120"  # begins the byte-level tokens that begin a word


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption and the normalized log-probability that the model gives it.

    words: its parts between spaces.
    weights: [words, L], where the model looked for each: the mean of its tokens.
    ended: whether its end came, and not only the most tokens that it may have.
    """

    text: str
    score: float
    words: list[str]
    weights: Tensor
    ended: bool = True


@torch.no_grad()
def tell(
    model: Any,
    tokenizer: Any,
    images: Tensor,
    *,
    beams: int = 4,
    batch: int = 64,
    most: int | None = None,
    normalize: Callable[[int], float] = by_length(),  # noqa: B008 (a pure function)
) -> list[Caption]:
    """The best caption of each image, `batch` images at a time.

    Args:
        model: a `pyattn.models.ShowAttendTell` in eval mode.
        tokenizer: the byte-level one that it was trained with.
        images: as the model takes them, on any device.
        most: tokens of a caption, its end included; as many as the model's context has by default.
    Raises:
        ShapeError, DtypeError, RangeError: as the model.
    """
    c, device = model.config, model.embedding.weight.device
    count = c.context if most is None else min(most, c.context)
    found = []
    for part in images.split(batch):
        part = part.to(device)
        decoder = model.decoder(part)
        hypotheses = beam_search(
            decoder, decoder.start, count, beams=beams, end=c.end, normalize=normalize, early_stopping=False,
            rules=Rules(forbidden=(c.pad, c.start)),
        )  # fmt: skip
        best = [each[0] for each in hypotheses]
        longest = max((len(each.tokens) for each in best), default=0)
        rows = [[c.start, *each.tokens, *[c.pad] * (longest - len(each.tokens))][:longest] for each in best]
        tokens = torch.tensor(rows, dtype=torch.long, device=device).view(len(rows), longest)
        _, looks = model(part, tokens, return_looks=True)
        for each, weights in zip(best, looks.weights.float().cpu(), strict=True):
            text = tokenizer.decode(each.tokens)
            words, of_words = _by_word(tokenizer, each.tokens, weights)
            found.append(Caption(text, each.score, words, of_words, each.ended))
    return found


def _by_word(tokenizer: Any, tokens: Sequence[int], weights: Tensor) -> tuple[list[str], Tensor]:
    """The words of a caption, and the mean of the weights [m, L] of each one's tokens."""
    pieces = [tokenizer.id_to_token(token) or "" for token in tokens]  # a model may have more tokens than are used
    begins = [i for i, piece in enumerate(pieces) if i == 0 or piece.startswith(_WORD)]
    ends = [*begins, len(tokens)][1:]
    words = [tokenizer.decode(tokens[begin:end]).strip() for begin, end in zip(begins, ends, strict=True)]
    means = [weights[begin:end].mean(0) for begin, end in zip(begins, ends, strict=True)]
    return words, torch.stack(means) if means else weights[:0]
