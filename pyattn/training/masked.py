"""Pre-training of BERT (Devlin et al. 2019, sections 3.1 and A.1): guess masked tokens, and whether one passage follows
another. The steps are those of the authors' create_pretraining_data.py."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from pyattn.tokens import encode_all
from pyattn.training import text
from pyattn.training.task import Task
from pyattn.training.text import Sentences, TextError

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNKNOWN, CLS, SEP, MASK = range(len(SPECIALS))
_CHOSEN, _MASKED, _RANDOM = 0.15, 0.8, 0.1  # part of the tokens to guess; of these, masked and replaced by any token
_SHORT = 0.1  # part of the examples that are of random length, so that a model meets short texts, too
_HELD_OUT_PART = 20
_INSIDE = "##"  # before a piece that does not begin a word
_CHARACTERS = 1000  # in the vocabulary at most; others are unknown


class Documents:
    """Documents of sentences: document i has the sentences from ends[i - 1] to ends[i]."""

    def __init__(self, sentences: Sentences, ends: numpy.ndarray) -> None:
        self.tokens = sentences.tokens.numpy()
        self.bounds = numpy.concatenate([[0], sentences.ends.numpy()])  # of sentences in tokens
        self.ends = ends
        lasts = numpy.zeros(len(sentences), dtype=bool)
        lasts[ends - 1] = True
        self.starts = numpy.flatnonzero(~lasts)  # sentences with another one behind them

    def __len__(self) -> int:
        return len(self.ends)

    def span(self, document: int) -> tuple[int, int]:
        """Its sentences, from and to."""
        return int(self.ends[document - 1]) if document else 0, int(self.ends[document])

    def passage(self, first: int, end: int) -> numpy.ndarray:
        """The tokens of the sentences from `first` to `end`."""
        return self.tokens[self.bounds[first] : self.bounds[end]]

    def around(self, document: int, sentence: int, length: int, *, least: int) -> tuple[int, int]:
        """Sentences of a document, from and to, that have `length` tokens and begin with `sentence`: `least` of them.

        Where the document ends too soon, they begin earlier, so that a passage's length says nothing of its place.
        """
        low, high = self.span(document)
        after = numpy.searchsorted(self.bounds[: high + 1], self.bounds[sentence] + length)
        end = max(min(int(after), high), sentence + least)
        before = numpy.searchsorted(self.bounds[:end], self.bounds[end] - length, "right") - 1
        return min(sentence, max(int(before), low)), end


@dataclass(frozen=True, slots=True)
class DocumentCorpus:
    """Documents for training and validation."""

    train: Documents
    validation: Documents
    tokenizer: Tokenizer
    digest: str  # of the text and the vocabulary asked for


class Example(NamedTuple):
    """[CLS] a [SEP] b [SEP], with some of the tokens changed."""

    tokens: Tensor  # int64 [m]
    segments: Tensor  # int64 [m]: 0 up to the first [SEP], then 1
    positions: Tensor  # int64 [chosen]
    labels: Tensor  # int64 [chosen]: the tokens that stood there
    is_random: bool  # b is of another document


class MaskedBatch(NamedTuple):
    """A batch. Rows are filled up with PAD."""

    tokens: Tensor  # int64 [b, m]
    segments: Tensor  # int64 [b, m]
    lengths: Tensor  # int64 [b]
    positions: Tensor  # int64 [p], in b * m
    labels: Tensor  # int64 [p]
    is_random: Tensor  # int64 [b]: 0 where b follows a, transformers' label


class MaskedTask(Task):
    """Guessing masked tokens and next passages: `model(tokens [b, m], segments=[b, m], lengths=[b], positions=[p]) ->
    (logits [p, vocab], logits [b, 2])`."""

    def __init__(self, corpus: DocumentCorpus, *, batch: int, context: int, validation_tokens: int, seed: int) -> None:
        self.corpus = corpus
        self.tokenizer = corpus.tokenizer
        self.digest = corpus.digest
        self.batch = batch
        self.context = context
        self.seed = seed
        self._validation = self._held_out(max(1, validation_tokens // context))
        labels = torch.cat([part.labels for part in self._validation])
        # A guesser who knows how frequent each token is, and one who tosses a coin.
        self.baselines = {
            "masked": unigram_loss(corpus.train.tokens, labels, corpus.tokenizer.get_vocab_size()),
            "next": math.log(2),
        }

    def examples(self, step: int) -> Sequence[Example]:
        return self._drawn(self.corpus.train, self.batch, numpy.random.default_rng((self.seed, step)))

    def collate(self, examples: Sequence[Example]) -> MaskedBatch:
        tokens = pad_sequence([e.tokens for e in examples], batch_first=True, padding_value=PAD)
        starts = range(0, tokens.numel(), tokens.shape[1])
        return MaskedBatch(
            tokens,
            pad_sequence([e.segments for e in examples], batch_first=True),
            torch.tensor([len(e.tokens) for e in examples]),
            torch.cat([e.positions + start for e, start in zip(examples, starts, strict=True)]),
            torch.cat([e.labels for e in examples]),
            torch.tensor([int(e.is_random) for e in examples]),
        )

    def size(self, batch: MaskedBatch) -> int:
        return int(batch.lengths.sum())

    def counts(self, batch: MaskedBatch) -> dict[str, int]:
        return {"masked": len(batch.labels), "next": len(batch.tokens)}

    def losses(self, model: nn.Module, batch: MaskedBatch, smoothing: float) -> dict[str, Tensor]:
        masked, following = model(
            batch.tokens, segments=batch.segments, lengths=batch.lengths, positions=batch.positions
        )
        return {
            "masked": F.cross_entropy(masked.float(), batch.labels, reduction="sum", label_smoothing=smoothing),
            "next": F.cross_entropy(following.float(), batch.is_random, reduction="sum"),
        }

    def validation(self) -> list[MaskedBatch]:
        return self._validation

    def describe(self) -> str:
        parts = (self.corpus.train, self.corpus.validation)
        documents, tokens = sum(map(len, parts)), sum(len(part.tokens) for part in parts)
        return f"{documents:,} documents of {tokens:,} tokens, {self.batch} pairs of passages in a step"

    def _held_out(self, count: int) -> list[MaskedBatch]:
        examples = self._drawn(self.corpus.validation, count, numpy.random.default_rng(0))
        return [self.collate(examples[i : i + self.batch]) for i in range(0, count, self.batch)]

    def _drawn(self, documents: Documents, count: int, generator: numpy.random.Generator) -> list[Example]:
        vocab = self.tokenizer.get_vocab_size()
        pairs = [draw_pair(documents, self.context - 3, generator) for _ in range(count)]
        return [masked(*pair, vocab, generator) for pair in pairs]


def draw_pair(
    documents: Documents, room: int, generator: numpy.random.Generator
) -> tuple[numpy.ndarray, numpy.ndarray, bool]:
    """Two passages of at most `room` tokens together, and whether the second one is of another document: every other
    time, by chance. Otherwise it is what follows the first one."""
    length = int(generator.integers(2, room + 1)) if generator.random() < _SHORT else room
    sentence = int(generator.choice(documents.starts))
    document = int(numpy.searchsorted(documents.ends, sentence, "right"))
    first, end = documents.around(document, sentence, length, least=2)  # a sentence for each passage
    cut = int(generator.integers(first + 1, end))
    a, b = documents.passage(first, cut), documents.passage(cut, end)
    if is_random := bool(generator.random() < 0.5):
        other = int(generator.integers(len(documents) - 1))
        other += other >= document
        sentence = int(generator.integers(*documents.span(other)))
        b = documents.passage(*documents.around(other, sentence, max(1, length - len(a)), least=1))
    return *_shortened(a, b, room, generator), is_random


def masked(
    a: numpy.ndarray, b: numpy.ndarray, is_random: bool, vocab: int, generator: numpy.random.Generator
) -> Example:
    """Joins two passages and changes the tokens to guess: 80 % to [MASK], 10 % to any token, 10 % not at all."""
    tokens = numpy.concatenate([[CLS], a, [SEP], b, [SEP]]).astype(numpy.int64)
    segments = numpy.repeat([0, 1], [len(a) + 2, len(b) + 1])
    words = numpy.flatnonzero(tokens >= len(SPECIALS))
    count = min(len(words), max(1, round(len(words) * _CHOSEN)))
    positions = numpy.sort(generator.choice(words, count, replace=False))
    labels = tokens[positions]
    fate = generator.random(count)
    replaced = numpy.where(fate < _MASKED, MASK, generator.integers(len(SPECIALS), vocab, count))
    tokens[positions] = numpy.where(fate < _MASKED + _RANDOM, replaced, labels)
    changed, sides, places, originals = map(torch.from_numpy, (tokens, segments, positions, labels))
    return Example(changed, sides, places, originals, is_random)


def unigram_loss(tokens: numpy.ndarray, labels: Tensor, vocab: int) -> float:
    """Mean loss on labels of guessing by the frequencies in tokens; each token counts one more, so that none is 0."""
    counts = numpy.bincount(tokens, minlength=vocab) + 1.0
    return float(-numpy.log(counts / counts.sum())[labels.numpy()].mean())


def load_documents(source: Path, *, vocab: int, cased: bool, cache: Path) -> DocumentCorpus:
    """Reads text with a sentence in each line and an empty line between documents, tokenizes and divides it.

    Args:
        source: a file, or a folder of which every file that is not hidden is read.
        vocab: size of the WordPiece vocabulary to learn.
        cased: whether letters keep their case and their accents.
    Raises:
        TextError: nothing to read, not UTF-8, or too few documents to hold some out.
    """
    documents = [document for whole in text.documents(source) for document in _divide(whole)]
    digest = text.digest(("\n".join(document) for document in documents), "masked", vocab, cased)
    tokenizer, stored = text.cached(cache / f"{digest}.safetensors", lambda: _tokenize(documents, vocab, cased))
    sentences, ends = Sentences(stored["tokens"], stored["ends"]), stored["documents"].numpy()
    parts = _held_out(sentences, ends)
    for part in parts:
        if len(part) < 2 or not len(part.starts):
            raise TextError(
                f"text: expected a sentence per line and empty lines between documents, for training and for "
                f"validation 2 documents at least and one of 2 sentences, got {len(documents)} documents in {source}"
            )
    return DocumentCorpus(*parts, tokenizer, digest)


def _divide(whole: str) -> list[list[str]]:
    """The documents of a text, as sentences."""
    documents: list[list[str]] = [[]]
    for line in whole.split("\n"):
        if line.strip():
            documents[-1].append(line.strip())
        elif documents[-1]:
            documents.append([])
    return documents if documents[-1] else documents[:-1]


def _tokenize(documents: list[list[str]], vocab: int, cased: bool) -> tuple[Tokenizer, dict[str, Tensor]]:
    lines = [line for document in documents for line in document]
    tokenizer = _learn(lines, vocab, cased)
    sentences = Sentences.of(encode_all(tokenizer, lines, add_special_tokens=False))
    ends = torch.tensor([len(document) for document in documents]).cumsum(0)
    return tokenizer, {"tokens": sentences.tokens, "ends": sentences.ends, "documents": ends}


def _learn(lines: list[str], vocab: int, cased: bool) -> Tokenizer:
    """A WordPiece whose `encode` puts [CLS] and [SEP] around a text or two. The same lines give the same one."""
    trained = _word_piece(models.WordPiece(unk_token=SPECIALS[UNKNOWN]), cased)
    # Named in order, because the trainer finds the characters inside of words in another order each time, and would
    # number them, and choose between equally frequent pairs, by that.
    characters = _characters(trained, lines)
    first = [*SPECIALS, *characters, *(_INSIDE + character for character in characters)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab, special_tokens=first, continuing_subword_prefix=_INSIDE, show_progress=False
    )
    trained.train_from_iterator(lines, trainer)
    # Anew from its vocabulary: the characters are no special tokens.
    tokenizer = _word_piece(models.WordPiece(trained.get_vocab(), unk_token=SPECIALS[UNKNOWN]), cased)
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.post_processor = processors.BertProcessing((SPECIALS[SEP], SEP), (SPECIALS[CLS], CLS))
    tokenizer.encode_special_tokens = True  # "[MASK]" in a text is text
    return tokenizer


def _word_piece(model: models.WordPiece, cased: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=_INSIDE)
    return tokenizer


def _characters(tokenizer: Tokenizer, lines: list[str]) -> list[str]:
    """The most frequent characters of the lines as the tokenizer sees them, in alphabetical order."""
    counts = Counter(character for line in lines for character in tokenizer.normalizer.normalize_str(line))
    words = [character for character in counts if not character.isspace()]
    return sorted(sorted(words, key=lambda character: (-counts[character], character))[:_CHARACTERS])


def _held_out(sentences: Sentences, ends: numpy.ndarray) -> tuple[Documents, Documents]:
    """Documents for training, and for validation some of them, always the same ones: two at least."""
    shuffled = random.Random(0).sample(range(len(ends)), len(ends))
    count = max(2, len(ends) // _HELD_OUT_PART)
    return _chosen(sentences, ends, sorted(shuffled[count:])), _chosen(sentences, ends, sorted(shuffled[:count]))


def _chosen(sentences: Sentences, ends: numpy.ndarray, documents: list[int]) -> Documents:
    starts = numpy.concatenate([[0], ends])
    rows = [range(starts[i], ends[i]) for i in documents]
    kept = Sentences.of([sentences[row].tolist() for span in rows for row in span])
    return Documents(kept, numpy.cumsum([len(span) for span in rows], dtype=numpy.int64))


def _shortened(
    a: numpy.ndarray, b: numpy.ndarray, room: int, generator: numpy.random.Generator
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Takes tokens off the longer passage, in front or behind by chance, until both fit."""
    while (surplus := len(a) + len(b) - room) > 0:
        longer = a if len(a) > len(b) else b
        # Down to the other one's length at once, then in turn.
        off = min(surplus, max(1, abs(len(a) - len(b))))
        front = int(generator.binomial(off, 0.5))
        kept = longer[front : len(longer) - (off - front)]
        a, b = (kept, b) if longer is a else (a, kept)
    return a, b
