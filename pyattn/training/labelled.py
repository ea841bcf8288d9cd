"""Words with tags, and texts with labels: reading, tokens, batches, and what a model says of new ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from pyattn.tokens import encode
from pyattn.training import text
from pyattn.training.task import Task
from pyattn.training.text import Sentences, TextError


class Example(NamedTuple):
    """A sentence's words and the tag of each; or a text, as if it were one word, and its label."""

    words: list[str]
    labels: list[str]


@dataclass(frozen=True, slots=True)
class Labelled:
    """Examples as numbers."""

    tokens: Sentences  # bytes joined to tokens, of each word behind a space
    places: Sentences  # of each word's first token in its example
    labels: Sentences  # each word's label

    def __len__(self) -> int:
        return len(self.tokens)

    def example(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.tokens[row], self.places[row], self.labels[row]

    def chosen(self, rows: list[int]) -> Labelled:
        sides = (self.tokens, self.places, self.labels)
        return Labelled(*(Sentences.of([side[row].tolist() for row in rows]) for side in sides))


@dataclass(frozen=True, slots=True)
class LabelledCorpus:
    """Examples for training and validation."""

    train: Labelled
    validation: Labelled
    labels: tuple[str, ...]  # the names of the labels, in alphabetical order
    by_word: bool  # else one label for each text
    tokenizer: Tokenizer
    digest: str  # of the examples and the vocabulary asked for


class LabelledBatch(NamedTuple):
    """A batch. Rows are filled up with 0."""

    tokens: Tensor  # int64 [b, m]
    lengths: Tensor  # int64 [b]
    rows: Tensor  # int64 [p]: which of the model's logits, flattened to [*, labels], have labels
    labels: Tensor  # int64 [p]


class LabelTask(Task):
    """Telling the label of each word, from the logits at its first token, or of each text:
    `model(tokens [b, m], lengths=[b]) -> logits [b, m, labels]` or `[b, labels]`.

    An epoch has every example once, in random order, `batch` in a step and the rest in the last one. Which ones a step
    has depends on (seed, step) alone.
    """

    measures = ("accuracy",)

    def __init__(self, corpus: LabelledCorpus, *, batch: int, seed: int) -> None:
        self.corpus = corpus
        self.tokenizer = corpus.tokenizer
        self.digest = corpus.digest
        self.batch = batch
        self.seed = seed
        most_frequent = corpus.train.labels.tokens.bincount().argmax()
        # Of a guesser who always says the training's most frequent label.
        self.baselines = {"accuracy": (corpus.validation.labels.tokens == most_frequent).float().mean().item()}

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.corpus.train) // self.batch)

    def examples(self, step: int) -> Sequence[tuple[Tensor, ...]]:
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        order = numpy.random.default_rng((self.seed, epoch)).permutation(len(self.corpus.train))
        rows = order[place * self.batch : (place + 1) * self.batch].tolist()
        return [self.corpus.train.example(row) for row in rows]

    def collate(self, examples: Sequence[tuple[Tensor, ...]]) -> LabelledBatch:
        tokens, places, labels = zip(*examples, strict=True)
        padded = pad_sequence(list(tokens), batch_first=True)
        stride = padded.shape[1] if self.corpus.by_word else 1
        rows = [place + i * stride for i, place in enumerate(places)]
        return LabelledBatch(padded, torch.tensor([len(row) for row in tokens]), torch.cat(rows), torch.cat(labels))

    def size(self, batch: LabelledBatch) -> int:
        return int(batch.lengths.sum())

    def counts(self, batch: LabelledBatch) -> dict[str, int]:
        return {"loss": len(batch.labels), "accuracy": len(batch.labels)}

    def losses(self, model: nn.Module, batch: LabelledBatch, smoothing: float) -> dict[str, Tensor]:
        logits = model(batch.tokens, lengths=batch.lengths).float().flatten(0, -2)[batch.rows]
        return {
            "loss": F.cross_entropy(logits, batch.labels, reduction="sum", label_smoothing=smoothing),
            "accuracy": (logits.argmax(-1) == batch.labels).sum().float(),
        }

    def validation(self) -> list[LabelledBatch]:
        held_out = self.corpus.validation
        examples = [held_out.example(row) for row in range(len(held_out))]
        return [self.collate(examples[low : low + self.batch]) for low in range(0, len(examples), self.batch)]

    def describe(self) -> str:
        return (
            f"{len(self.corpus.train):,} {'sentences' if self.corpus.by_word else 'texts'} and "
            f"{len(self.corpus.validation):,} for validation, {len(self.corpus.labels):,} labels, "
            f"{self.steps_per_epoch:,} steps per epoch"
        )


def load_labelled(source: Path, *, by_word: bool, vocab: int, cache: Path) -> LabelledCorpus:
    """Reads examples, tokenizes them and holds some out.

    Args:
        by_word: the file is one of `read_tagged`, else of `read_labelled`.
        vocab: size of the byte-level BPE vocabulary to learn.
    Raises:
        TextError: the file cannot be read or has another form, fewer than two examples, or one label alone.
    """
    argument = "tagged" if by_word else "labelled"
    examples = (read_tagged if by_word else read_labelled)(source, argument)
    labels = tuple(sorted({label for example in examples for label in example.labels}))
    for count, what in ((len(examples), "examples, one for validation"), (len(labels), "different labels")):
        if count < 2:
            raise TextError(f"{argument}: expected at least 2 {what}, got {count} in {source}")
    digest = text.digest((repr(tuple(example)) for example in examples), vocab)
    tokenizer, stored = text.cached(cache / f"{digest}.safetensors", lambda: _tokenize(examples, labels, vocab))
    ends = stored["word_ends"]
    whole = Labelled(
        Sentences(stored["tokens"], stored["ends"]),
        Sentences(stored["places"], ends),
        Sentences(stored["labels"], ends),
    )
    kept, held_out = text.held_out(len(whole))
    return LabelledCorpus(whole.chosen(kept), whole.chosen(held_out), labels, by_word, tokenizer, digest)


def read_tagged(path: Path, argument: str) -> list[Example]:
    """Sentences of a file that has a word, a tab and its tag in each line, and an empty line between sentences.

    Raises:
        TextError: the file cannot be read, or a line is of another form; `argument` is what has named the file.
    """
    examples = [Example([], [])]
    for number, line in enumerate(text.lines(path, argument), 1):
        if not line.strip():
            examples.append(Example([], []))
            continue
        expected = f"{argument}: expected a word, a tab and its tag in {path}, line {number:,}"
        if line.count("\t") > 1:
            raise TextError(f"{expected}, got several tabs in {line[:80]!r}")
        word, tag = _halves(line, expected)
        examples[-1].words.append(word)
        examples[-1].labels.append(tag)
    return [example for example in examples if example.words]


def read_labelled(path: Path, argument: str) -> list[Example]:
    """Texts of a file that has a label, a tab and a text in each line. Raises TextError as `read_tagged`."""
    examples = []
    for number, line in enumerate(text.lines(path, argument), 1):
        label, content = _halves(line, f"{argument}: expected a label, a tab and a text in {path}, line {number:,}")
        examples.append(Example([content], [label]))
    return examples


@torch.no_grad()
def predict(model: Any, tokenizer: Tokenizer, sentences: Sequence[Sequence[str]]) -> list[list[str]]:
    """The names of the most probable labels.

    Args:
        model: in eval mode, with the logits that `LabelTask` trains; names are its configuration's, or numbers.
        sentences: words, one at least; a text to be labelled is one word.
    Returns:
        a label for each word.
    Raises:
        TextError: the tokenizer has nothing for a word.
    """
    if not sentences:
        return []
    found = [_encode(tokenizer, words) for words in sentences]
    device = next(model.parameters()).device
    tokens = pad_sequence([torch.tensor(ids) for ids, _ in found], batch_first=True).to(device)
    best = model(tokens, lengths=torch.tensor([len(ids) for ids, _ in found])).argmax(-1)  # [b, m] or [b]
    names = model.config.label_names or tuple(map(str, range(model.config.labels)))
    rows = best.view(len(best), -1).tolist()
    return [[names[row[place]] for place in places] for row, (_, places) in zip(rows, found, strict=True)]


def _halves(line: str, expected: str) -> tuple[str, str]:
    """What is before and behind the line's tab."""
    first, _, second = (part.strip(" ") for part in line.partition("\t"))
    if not first or not second:
        raise TextError(f"{expected}, got {line[:80]!r}")
    return first, second


def _tokenize(examples: list[Example], labels: tuple[str, ...], vocab: int) -> tuple[Tokenizer, dict[str, Tensor]]:
    tokenizer = text.byte_pairs((" ".join(example.words) for example in examples), vocab, prefix_space=True)
    found = [_encode(tokenizer, example.words) for example in examples]
    numbers = {label: i for i, label in enumerate(labels)}
    tokens, places = (Sentences.of(rows) for rows in zip(*found, strict=True))
    named = Sentences.of([[numbers[label] for label in example.labels] for example in examples])
    stored = {"tokens": tokens.tokens, "ends": tokens.ends, "places": places.tokens, "labels": named.tokens}
    return tokenizer, stored | {"word_ends": named.ends}


def _encode(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[list[int], list[int]]:
    """Tokens of words, and the place of each word's first one."""
    found = encode(tokenizer, list(words))
    places = {word: place for place, word in reversed(list(enumerate(found.word_ids))) if word is not None}
    if len(places) != len(words):
        raise TextError(f"text: the tokenizer has no token for a word of {' '.join(words)[:80]!r}")
    return found.ids, [places[word] for word in range(len(words))]
