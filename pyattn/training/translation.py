"""Translation: pairs of sentences, one vocabulary for both languages, and batches of pairs of similar length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from tokenizers import Tokenizer, decoders, normalizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from pyattn.check import RangeError
from pyattn.tokens import encode_all
from pyattn.training import text
from pyattn.training.task import Task
from pyattn.training.text import Sentences, TextError

MARKS = ("<pad>", "<s>", "</s>")
PAD, START, END = range(len(MARKS))


@dataclass(frozen=True, slots=True)
class Files:
    """Two files of which each line of one translates that line of the other."""

    source: Path
    target: Path


@dataclass(frozen=True, slots=True)
class Pairs:
    """Sentences and their translations, each ending in END."""

    source: Sentences
    target: Sentences

    def __len__(self) -> int:
        return len(self.source)

    @property
    def lengths(self) -> numpy.ndarray:
        """Of the longer sentence of each pair."""
        return torch.maximum(self.source.lengths, self.target.lengths).numpy()


@dataclass(frozen=True, slots=True)
class ParallelCorpus:
    """Pairs for training and validation, in the vocabulary of both languages."""

    train: Pairs
    validation: Pairs
    tokenizer: Tokenizer
    digest: str  # of the sentences and the vocabulary asked for


class PairBatch(NamedTuple):
    """A batch. Rows are filled up with PAD."""

    source: Tensor  # int64 [b, n]
    source_lengths: Tensor  # int64 [b]
    target_in: Tensor  # int64 [b, m]: START and the target without its END
    target_out: Tensor  # int64 [b, m]: the target


class TranslationTask(Task):
    """Predicting each token of a translation from the sentence and the tokens before it:
    `model(source [b, n], target [b, m], source_lengths=[b]) -> logits [b, m, vocab]`.

    An epoch sorts the pairs by length, in random order within a length, and cuts them into batches whose rows, filled
    up to the longest of them, have at most `max_tokens` tokens on either side; the batches come in random order. The
    cuts are the same in each epoch, because the sorted lengths are. Which pairs a step has depends on (seed, step)
    alone.
    """

    def __init__(self, corpus: ParallelCorpus, *, max_tokens: int, seed: int) -> None:
        self.corpus = corpus
        self.tokenizer = corpus.tokenizer
        self.digest = corpus.digest
        self.baselines: dict[str, float] = {}
        self.max_tokens = max_tokens
        self.seed = seed
        self._lengths = corpus.train.lengths
        self._cuts = cuts(numpy.sort(self._lengths), max_tokens)
        self._epoch: tuple[int, list[numpy.ndarray]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        return len(self._cuts) - 1

    def examples(self, step: int) -> Sequence[tuple[Tensor, Tensor]]:
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._batches(epoch))
        pairs = self.corpus.train
        return [(pairs.source[i], pairs.target[i]) for i in self._epoch[1][place].tolist()]

    def collate(self, examples: Sequence[tuple[Tensor, Tensor]]) -> PairBatch:
        sources, targets = ([example[side] for example in examples] for side in (0, 1))
        target_out = pad_sequence(targets, batch_first=True, padding_value=PAD)
        # Shifted by one; what shifts out is PAD, or an END that no longer has anything to predict.
        target_in = F.pad(target_out[:, :-1], (1, 0), value=START)
        target_in[target_in == END] = PAD
        lengths = torch.tensor([len(source) for source in sources])
        return PairBatch(pad_sequence(sources, batch_first=True, padding_value=PAD), lengths, target_in, target_out)

    def size(self, batch: PairBatch) -> int:
        return int(batch.source_lengths.sum()) + self.counts(batch)["loss"]

    def counts(self, batch: PairBatch) -> dict[str, int]:
        return {"loss": int((batch.target_out != PAD).sum())}

    def losses(self, model: nn.Module, batch: PairBatch, smoothing: float) -> dict[str, Tensor]:
        logits = model(batch.source, batch.target_in, source_lengths=batch.source_lengths).float().flatten(0, 1)
        targets = batch.target_out.flatten()
        loss = F.cross_entropy(logits, targets, ignore_index=PAD, reduction="sum", label_smoothing=smoothing)
        return {"loss": loss}

    def validation(self) -> list[PairBatch]:
        pairs = self.corpus.validation
        order = numpy.argsort(pairs.lengths, kind="stable")
        bounds = cuts(pairs.lengths[order], self.max_tokens)
        rows = [order[low:high].tolist() for low, high in pairwise(bounds)]
        return [self.collate([(pairs.source[i], pairs.target[i]) for i in row]) for row in rows]

    def describe(self) -> str:
        return (
            f"{len(self.corpus.train):,} pairs of sentences and {len(self.corpus.validation):,} for validation, "
            f"{self.tokenizer.get_vocab_size():,} tokens in the vocabulary, {self.steps_per_epoch} steps per epoch"
        )

    def _batches(self, epoch: int) -> list[numpy.ndarray]:
        """The pairs of each step of an epoch."""
        generator = numpy.random.default_rng((self.seed, epoch))
        order = numpy.lexsort((generator.random(len(self._lengths)), self._lengths))
        batches = [order[low:high] for low, high in pairwise(self._cuts)]
        return [batches[i] for i in generator.permutation(len(batches))]


def cuts(lengths: numpy.ndarray, max_tokens: int) -> list[int]:
    """Where to cut rows of ascending lengths [rows] so that each part, filled up to its longest row, has at most
    `max_tokens` tokens; a row that is longer stands alone. Starts with 0 and ends with the number of rows."""
    bounds = [0]
    for row, length in enumerate(lengths.tolist()):
        if row > bounds[-1] and length * (row + 1 - bounds[-1]) > max_tokens:
            bounds.append(row)
    return [*bounds, len(lengths)]


def load_parallel(
    training: Files, validation: Files | None, *, vocab: int, context: int, max_tokens: int, cache: Path
) -> ParallelCorpus:
    """Reads and tokenizes pairs of sentences.

    Args:
        validation: None holds out some of the training pairs, always the same ones.
        vocab: size of the joint byte-level BPE vocabulary to learn.
        context: positions of the model; a sentence with its mark must fit them.
    Raises:
        TextError: a file cannot be read, the line counts differ, a line is empty, a sentence is too long.
        RangeError: a batch of `max_tokens` could not hold the longest sentence.
    """
    files = [training] if validation is None else [training, validation]
    sides = [lines for each, kind in zip(files, ("", "validation_"), strict=False) for lines in _read(each, kind)]
    digest = text.digest((line + "\n" for side in sides for line in side), [len(side) for side in sides], vocab)
    tokenizer, stored = text.cached(cache / f"{digest}.safetensors", lambda: _tokenize(sides, vocab))
    pairs = [
        Pairs(*(Sentences(stored[f"{side}.tokens"], stored[f"{side}.ends"]) for side in (2 * i, 2 * i + 1)))
        for i in range(len(files))
    ]
    for each, named in zip(pairs, files, strict=True):
        _check_lengths(each, named, context, max_tokens)
    train, held_out = pairs if validation is not None else _divided(pairs[0], training)
    return ParallelCorpus(train, held_out, tokenizer, digest)


def _read(files: Files, kind: str) -> tuple[list[str], list[str]]:
    """kind: what the arguments' names begin with, for errors."""
    source, target = text.lines(files.source, f"{kind}source"), text.lines(files.target, f"{kind}target")
    if len(source) != len(target):
        raise TextError(
            f"text: expected as many lines in {files.target} as in {files.source}, "
            f"got {len(target):,} for {len(source):,}"
        )
    for path, lines in ((files.source, source), (files.target, target)):
        if not lines:
            raise TextError(f"text: expected some text, {path} is empty")
        _raise_for(path, [i for i, line in enumerate(lines) if not line.strip()], "is empty; remove it from both files")
    return source, target


def _check_lengths(pairs: Pairs, files: Files, context: int, max_tokens: int) -> None:
    for path, sentences in ((files.source, pairs.source), (files.target, pairs.target)):
        long = (sentences.lengths > context).nonzero().flatten().tolist()
        count = int(sentences.lengths[long[0]]) if long else 0
        _raise_for(path, long, f"has {count} tokens with its end mark, more than the {context} positions of --context")
        if (longest := int(sentences.lengths.max())) > max_tokens:
            raise RangeError(
                f"max_tokens: expected at least {longest}, the longest sentence of {path}, got {max_tokens}"
            )


def _raise_for(path: Path, found: list[int], what: str) -> None:
    """Names the first of the lines found, counted from 0, and how many more there are."""
    if found:
        more = f" ({len(found) - 1:,} more lines like it)" if len(found) > 1 else ""
        raise TextError(f"text: {path}, line {found[0] + 1:,} {what}{more}")


def _divided(pairs: Pairs, files: Files) -> tuple[Pairs, Pairs]:
    if len(pairs) < 2:
        raise TextError(f"text: expected at least 2 lines, one for validation, got 1 in {files.source}")
    kept, held_out = text.held_out(len(pairs))
    return _chosen(pairs, kept), _chosen(pairs, held_out)


def _chosen(pairs: Pairs, rows: list[int]) -> Pairs:
    return Pairs(*(Sentences.of([side[i].tolist() for i in rows]) for side in (pairs.source, pairs.target)))


def _tokenize(sides: list[list[str]], vocab: int) -> tuple[Tokenizer, dict[str, Tensor]]:
    """Learns the vocabulary from the training pair of `sides` and encodes all of them."""
    tokenizer = learn_tokenizer(sides[0] + sides[1], vocab)
    stored: dict[str, Tensor] = {}
    for i, side in enumerate(sides):
        sentences = Sentences.of(encode_all(tokenizer, side))
        stored |= {f"{i}.tokens": sentences.tokens, f"{i}.ends": sentences.ends}
    return tokenizer, stored


def learn_tokenizer(sentences: list[str], vocab: int) -> Tokenizer:
    """A byte-level BPE, MARKS first, whose `encode` ends a sentence with END and whose `decode` gives it back."""
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
    tokenizer = text.byte_pairs(sentences, vocab, MARKS, prefix_space=True, normalizer=normalizer)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {MARKS[END]}", special_tokens=[(MARKS[END], END)]
    )
    return tokenizer
