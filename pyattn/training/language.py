"""Language modelling: a text as one row of tokens, and windows of it whose next tokens are to be predicted."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F

from pyattn.decoding.sampling import Sampling, generate
from pyattn.files import replacing
from pyattn.tokens import encode_document, pieces
from pyattn.training import text
from pyattn.training.task import Task
from pyattn.training.text import TextError

END_OF_TEXT = "<|endoftext|>"
# By kind of token: which part of the text is held out. nanoGPT's character models hold out a tenth.
_VALIDATION_PART = {"bpe": 20, "characters": 10}
TOKENS = tuple(_VALIDATION_PART)


@dataclass(frozen=True, slots=True)
class Corpus:
    """A text as tokens, divided for training and validation."""

    train: Tensor  # int32 [tokens]
    validation: Tensor  # int32 [tokens]
    tokenizer: Tokenizer
    digest: str  # of the text and the vocabulary asked for


class Windows(NamedTuple):
    """A batch."""

    inputs: Tensor  # int64 [b, context]
    targets: Tensor  # int64 [b, context]: the token after each input


class LanguageTask(Task):
    """Predicting each token of a text from those before it: `model(tokens [b, m]) -> logits [b, m, vocab]`."""

    def __init__(self, corpus: Corpus, *, batch: int, context: int, validation_tokens: int, seed: int) -> None:
        self.corpus = corpus
        self.tokenizer = corpus.tokenizer
        self.digest = corpus.digest
        self.baselines: dict[str, float] = {}
        self.batch = batch
        self.context = context
        self.validation_tokens = validation_tokens
        self.seed = seed

    def examples(self, step: int) -> Sequence[int]:
        return training_starts(len(self.corpus.train), self.batch, self.context, self.seed, step)

    def collate(self, examples: Sequence[int]) -> Windows:
        return windows(self.corpus.train, torch.tensor(examples), self.context)

    def size(self, batch: Windows) -> int:
        return batch.inputs.numel()

    def counts(self, batch: Windows) -> dict[str, int]:
        return {"loss": batch.targets.numel()}

    def losses(self, model: nn.Module, batch: Windows, smoothing: float) -> dict[str, Tensor]:
        return {"loss": token_loss(model(batch.inputs), batch.targets, smoothing)}

    def validation(self) -> list[Windows]:
        """Windows spread evenly over the held-out text: one at least, of `validation_tokens` tokens at most."""
        tokens, context = self.corpus.validation, self.context
        count = min((len(tokens) - 1) // context, max(1, self.validation_tokens // context))
        starts = torch.linspace(0, len(tokens) - 1 - context, count, dtype=torch.float64).long()
        return [windows(tokens, part, context) for part in starts.split(self.batch)]

    def describe(self) -> str:
        tokens = len(self.corpus.train) + len(self.corpus.validation)
        return f"{tokens:,} tokens of text, {self.batch} x {self.context} of them in a step"


def load_corpus(source: Path | None, *, tokens: str, vocab: int, context: int, batch: int, cache: Path) -> Corpus:
    """Reads, tokenizes and divides a text.

    Args:
        source: a file, or a folder of which every file that is not hidden is read; None is the source text of the
            running Python's standard library.
        tokens: bpe, byte-level and learned from the text; or characters, one token for each.
        vocab: size of the vocabulary to learn for bpe; small texts may give a smaller one.
    Raises:
        TextError: nothing to read, not UTF-8, or fewer tokens than one batch and one validation window take.
    """
    documents = text.standard_library() if source is None else text.documents(source)
    digest = text.digest(documents, tokens, vocab)
    tokenize = _bpe if tokens == "bpe" else _characters
    tokenizer, stored = text.cached(cache / f"{digest}.safetensors", lambda: tokenize(documents, vocab))
    row = stored["tokens"]
    held_out = max(len(row) // _VALIDATION_PART[tokens], context + 1)
    needed = batch * context + 1
    if len(row) - held_out < needed:
        raise TextError(
            f"text: expected at least {needed + held_out:,} tokens, {needed:,} for one batch of {batch} x {context} "
            f"and {held_out:,} for validation, got {len(row):,}; lower batch or context, or give more text"
        )
    return Corpus(row[:-held_out], row[-held_out:], tokenizer, digest)


def training_starts(count: int, batch: int, context: int, seed: int, step: int) -> list[int]:
    """Where the windows of a step begin in a text of `count` tokens, at random: a function of (seed, step) alone, so
    that a resumed run needs no state to go on with the batches it would have seen."""
    return numpy.random.default_rng((seed, step)).integers(0, count - context, batch).tolist()


def windows(tokens: Tensor, starts: Tensor, context: int) -> Windows:
    """Windows of tokens [count] that begin at starts [b]."""
    found = tokens[starts[:, None] + torch.arange(context + 1)].long()
    return Windows(found[:, :-1], found[:, 1:])


def token_loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """The summed loss of logits [b, m, vocab] for targets [b, m]."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=smoothing)


def first_token(tokenizer: Tokenizer) -> int:
    """What a text made up from nothing begins after: a document's mark, or in characters a line's end."""
    for mark in (END_OF_TEXT, "\n"):
        if (token := tokenizer.token_to_id(mark)) is not None:
            return token
    return 0


def _bpe(documents: list[str], vocab: int) -> tuple[Tokenizer, dict[str, Tensor]]:
    """Bytes joined to tokens. The documents are shuffled, always in the same way, so that the part for validation, at
    the end, is like the rest."""
    tokenizer = text.byte_pairs(documents, vocab, [END_OF_TEXT], prefix_space=False)
    shuffled = random.Random(0).sample(documents, len(documents))
    end = cast(int, tokenizer.token_to_id(END_OF_TEXT))
    tokens = array("i")
    for document in shuffled:
        tokens.append(end)
        tokens.extend(encode_document(tokenizer, document))
    return tokenizer, {"tokens": torch.from_numpy(numpy.array(tokens))}


def _characters(documents: list[str], vocab: int) -> tuple[Tokenizer, dict[str, Tensor]]:
    """One token per character, as many as the text has different ones; documents follow in their order."""
    whole = "\n".join(documents)
    characters = sorted(set(whole))
    tokenizer = Tokenizer(models.WordLevel({character: i for i, character in enumerate(characters)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    known = [ord(character) for character in characters]
    parts = [numpy.frombuffer(piece.encode("utf-32-le"), numpy.uint32) for piece in pieces(whole)]
    tokens = numpy.concatenate([numpy.searchsorted(known, part).astype(numpy.int32) for part in parts])
    return tokenizer, {"tokens": torch.from_numpy(tokens)}


def write_sample(model: Any, tokenizer: Tokenizer, path: Path, count: int, seed: int) -> str:
    """Writes to `path`, and returns, a text of `count` tokens that the model makes up from nothing."""
    device = next(model.parameters()).device
    start = torch.tensor([[first_token(tokenizer)]], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    model.eval()
    (tokens,) = generate(model, start, count, sampling=Sampling(temperature=0.8, top_p=0.95), generator=generator)
    sample = tokenizer.decode(tokens)
    with replacing(path) as temporary:
        temporary.write_text(sample, encoding="utf-8")
    return sample
