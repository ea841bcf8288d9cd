"""Pre-training of XLNet (Yang et al. 2019, arXiv:1906.08237, sections 2.3 to 2.5 and 3.1): predict tokens in permuted
orders. Rows, spans and orders are those of the authors' data_utils.py, on streams of plain text.

A row has two parts, which are permuted apart:

    tokens      the next tokens of a stream    A  <sep>  B  <sep>  <cls>
    segments    0 ...                          0    0    1    1      2
    order       -1, targets 0, 1, ...          one place for all but targets, which have the places after it

The first part is what the stream goes on by in a step, and what enters its memory. So nothing in it sees the second
part, whereas that sees all of the first. A is what follows, and B what follows A, or every other time anything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, cast

import numpy
import torch
from tokenizers import Tokenizer, processors
from torch import Tensor, nn

from pyattn.training import parallel
from pyattn.training.language import Corpus, token_loss
from pyattn.training.masked import unigram_loss
from pyattn.training.streams import CarryingTask

SEP, CLS = "<sep>", "<cls>"
_MARKS = 3  # of a row: two <sep>, and <cls>
_SPANS = numpy.arange(1, 6)  # lengths of spans of targets
_SPAN_PROBABILITIES = (1 / _SPANS) / (1 / _SPANS).sum()
_FOLLOWS = 0.5  # how often B follows A
_LEAST_ROWS = 8  # one after the other in held-out text, so that the missing memory at the first weighs little


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many tokens a row has."""

    context: int  # in all
    predicted: int  # targets

    @property
    def first(self) -> int:
        """Of the first part."""
        return self.context // 2

    @property
    def second(self) -> int:
        return self.context - self.first

    @property
    def pair(self) -> int:
        """Of A and B together."""
        return self.second - _MARKS


class Row(NamedTuple):
    """An example."""

    tokens: Tensor  # int64 [context]
    segments: Tensor  # int64 [context]
    order: Tensor  # int64 [context]: places, as `XLNet` reads them
    targets: Tensor  # int64 [predicted]: positions whose tokens are to be predicted


class Rows(NamedTuple):
    """A batch: the next row of some streams."""

    tokens: Tensor  # int64 [b, context]
    segments: Tensor  # int64 [b, context]
    order: Tensor  # int64 [b, context]
    targets: Tensor  # int64 [b, predicted]
    streams: Tensor  # int64 [b]
    places: Tensor  # int64 [b]: how much of the stream is before them


class HeldOutRows(NamedTuple):
    """A batch of held-out text: n rows, one after the other, of b places in it."""

    tokens: Tensor  # int64 [n, b, context]
    segments: Tensor  # int64 [n, b, context]
    order: Tensor  # int64 [n, b, context]
    targets: Tensor  # int64 [n, b, predicted]


class PermutationTask(CarryingTask):
    """Predicting tokens of a text in permuted orders: `model(tokens [b, m], segments, order=, targets=[b, p], memory=,
    remember=True) -> (logits [b, p, vocab], memory)`, as `XLNetLMHead` does it.

    The text is cut into `batch` streams. A step reads a row of each of them, with the memory that the steps before have
    left, and goes on by the row's first part. An epoch reads every stream once, without the tokens at its end that fill
    no row, and begins without memory. What a row has beside the text depends on (seed, step) alone.

    The streams' memory has room for `model.config.memory` positions, of which the last ones are filled: as many as have
    been read, so that a checkpoint need not say it.

    The tokenizer of the corpus gets the marks <sep> and <cls>.
    """

    def __init__(
        self, corpus: Corpus, *, batch: int, context: int, predicted: int, validation_tokens: int, seed: int
    ) -> None:
        super().__init__(corpus, batch)
        self.sizes = Sizes(context, predicted)
        self.seed = seed
        self.marks = add_marks(corpus.tokenizer)
        self._validation = self._held_out(validation_tokens)
        labels = torch.cat([held.tokens.gather(2, held.targets).flatten() for held in self._validation])
        # A guesser who knows how frequent each token is.
        vocab = corpus.tokenizer.get_vocab_size()
        self.baselines = {"permuted": unigram_loss(corpus.train.numpy(), labels, vocab)}

    @property
    def steps_per_epoch(self) -> int:
        return (self.stream_tokens - self.sizes.second) // self.sizes.first

    def examples(self, step: int) -> Sequence[tuple[Row, int, int]]:
        """Rows, each with its stream and the place in that."""
        place = (step - 1) % self.steps_per_epoch * self.sizes.first
        generator = numpy.random.default_rng((self.seed, step))
        text = self.corpus.train.numpy()
        starts = range(place, place + self.batch * self.stream_tokens, self.stream_tokens)
        rows = [draw_row(text, start, self.sizes, self.marks, generator) for start in starts]
        return [(row, stream, place) for stream, row in enumerate(rows)]

    def collate(self, examples: Sequence[tuple[Row, int, int]]) -> Rows:
        rows, streams, places = zip(*examples, strict=True)
        return Rows(*_stacked(rows), torch.tensor(streams), torch.tensor(places))

    def size(self, batch: Rows | HeldOutRows) -> int:
        return batch.tokens.numel()

    def counts(self, batch: Rows | HeldOutRows) -> dict[str, int]:
        return {"permuted": batch.targets.numel()}

    def losses(self, model: nn.Module, batch: Rows | HeldOutRows, smoothing: float) -> dict[str, Tensor]:
        if isinstance(batch, HeldOutRows):
            return {"permuted": self._held_out_loss(model, batch, smoothing)}
        kept = self._states_of(model)[0]
        room = kept.shape[2]
        held = min(int(batch.places[0]), room)  # the streams of a step are all at one place
        loss, after = _predict(model, Row(*batch[:4]), kept[:, batch.streams, room - held :], smoothing)
        kept[:, batch.streams, room - after.shape[2] :] = after
        self._read_here(batch.streams)
        return {"permuted": loss}

    def validation(self) -> list[HeldOutRows]:
        """Rows one after the other, from places spread evenly over the held-out text, with the same orders whatever the
        seed: of `validation_tokens` tokens of it at most, or one row; a batch for each process, as far as there are
        places."""
        return self._validation

    def describe(self) -> str:
        tokens = len(self.corpus.train) + len(self.corpus.validation)
        return (
            f"{tokens:,} tokens of text, {self.batch} streams with a row of {self.sizes.context} tokens in a step, "
            f"{self.sizes.predicted} of them to predict, {self.steps_per_epoch:,} steps per epoch"
        )

    def _states_of(self, model: nn.Module) -> Tensor:
        """Where the streams' memory is kept, [1, layers, batch, room, width]."""
        if self._states is None:
            self._states = _empty_memory(model, self.batch, parallel.original(model).config.memory)[None]
        return self._states

    def _held_out(self, most: int) -> list[HeldOutRows]:
        """As `validation` says, of `most` tokens at most."""
        text, sizes = self.corpus.validation.numpy(), self.sizes
        tokens = min(len(text), most)
        places = max(1, min(self.batch, tokens // (_LEAST_ROWS * sizes.first + sizes.second)))
        rows = max(1, (tokens // places - sizes.second) // sizes.first)
        length = rows * sizes.first + sizes.second
        generator = numpy.random.default_rng(0)
        drawn = []
        for start in numpy.linspace(0, len(text) - length, places).astype(int).tolist():
            starts = range(start, start + rows * sizes.first, sizes.first)
            drawn.append(_stacked([draw_row(text, at, sizes, self.marks, generator) for at in starts]))
        parts = [part.tensor_split(min(places, parallel.world()), 1) for part in _stacked(drawn, 1)]
        return [HeldOutRows(*batch) for batch in zip(*parts, strict=True)]

    def _held_out_loss(self, model: nn.Module, batch: HeldOutRows, smoothing: float) -> Tensor:
        memory = _empty_memory(model, batch.tokens.shape[1], 0)
        losses = []
        for row in zip(*batch, strict=True):
            loss, memory = _predict(model, Row(*row), memory, smoothing)
            losses.append(loss)
        return torch.stack(losses).sum()


def add_marks(tokenizer: Tokenizer) -> tuple[int, int]:
    """Gives a tokenizer <sep> and <cls>, behind all other tokens, and lets its `encode` put them where XLNet has them:
    A <sep> <cls>, or A <sep> B <sep> <cls>. Returns both tokens."""
    tokenizer.add_special_tokens([SEP, CLS])
    tokenizer.encode_special_tokens = True  # "<sep>" in a text is text
    sep, cls = (cast(int, tokenizer.token_to_id(mark)) for mark in (SEP, CLS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A:0 {SEP}:0 {CLS}:2",
        pair=f"$A:0 {SEP}:0 $B:1 {SEP}:1 {CLS}:2",
        special_tokens=[(SEP, sep), (CLS, cls)],
    )
    return sep, cls


def draw_row(
    text: numpy.ndarray, start: int, sizes: Sizes, marks: tuple[int, int], generator: numpy.random.Generator
) -> Row:
    """The row whose first token is text[start].

    Args:
        text: integers, `sizes.first + sizes.second` of them from start on.
        marks: the tokens <sep> and <cls>.
    """
    behind = start + sizes.first
    cut = int(generator.integers(1, sizes.pair))  # tokens of A
    rest = sizes.pair - cut
    follows = generator.random() < _FOLLOWS
    other = behind + cut if follows else int(generator.integers(len(text) - rest + 1))
    sep, cls = marks
    tokens = numpy.concatenate([text[start : behind + cut], [sep], text[other : other + rest], [sep, cls]])
    segments = numpy.repeat([0, 1, 2], [sizes.first + cut + 1, rest + 1, 1])
    is_mark = numpy.zeros(sizes.context, bool)
    is_mark[[sizes.first + cut, -2, -1]] = True
    order, targets = draw_order(is_mark, sizes, generator)
    parts = (tokens.astype(numpy.int64), segments, order, targets)
    return Row(*map(torch.from_numpy, parts))


def draw_order(
    is_mark: numpy.ndarray, sizes: Sizes, generator: numpy.random.Generator
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Draws what to predict, and in which order, where is_mark [context] is not.

    Each part has half of the targets, one more the first part; among them any order is as likely as another.

    Returns:
        order [context]: places, as the top of this file has them.
        targets [predicted]: positions, ascending.
    """
    words = numpy.flatnonzero(~is_mark)
    parts = words[words < sizes.first], words[words >= sizes.first]
    counts = sizes.predicted - sizes.predicted // 2, sizes.predicted // 2
    first, second = (part[draw_spans(len(part), count, generator)] for part, count in zip(parts, counts, strict=True))
    order = numpy.full(sizes.context, -1)
    order[sizes.first :] = counts[0]
    order[first] = generator.permutation(counts[0])
    order[second] = counts[0] + 1 + generator.permutation(counts[1])
    return order, numpy.concatenate([first, second])


def draw_spans(length: int, count: int, generator: numpy.random.Generator) -> numpy.ndarray:
    """Which `count` of `length` tokens to predict, bool [length]: spans of 1 to 5 tokens, a shorter one more often.

    Each is at random within a context of `length / count` times its own length, and these fill the whole (section 2.3).
    """
    spans: list[int] = []
    while (left := count - sum(spans)) > 0:
        spans.append(min(int(generator.choice(_SPANS, p=_SPAN_PROBABILITIES)), left))
    ends = [total * length // count for total in accumulate(spans)]
    chosen = numpy.zeros(length, bool)
    for span, begin, end in zip(spans, [0, *ends], ends, strict=False):
        start = int(generator.integers(begin, end - span + 1))
        chosen[start : start + span] = True
    return chosen


def _predict(model: nn.Module, row: Row, memory: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """The summed loss of rows [b, ...] behind a memory [layers, b, M, width], and the memory behind them."""
    tokens, segments, order, targets = row
    logits, after = model(tokens, segments, order=order, targets=targets, memory=memory, remember=True)
    return token_loss(logits, tokens.gather(1, targets), smoothing), torch.stack(after)


def _stacked(rows: Sequence[Row], dim: int = 0) -> Row:
    return Row(*(torch.stack(parts, dim) for parts in zip(*rows, strict=True)))


def _empty_memory(model: nn.Module, rows: int, room: int) -> Tensor:
    """[layers, rows, room, width]"""
    config, like = parallel.original(model).config, next(model.parameters())
    return like.new_zeros(config.layers, rows, room, config.width)
