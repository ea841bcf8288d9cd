"""Language modelling from one step to the next: truncated backpropagation through time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyattn.training import parallel
from pyattn.training.language import Corpus, Windows, token_loss, windows
from pyattn.training.task import Task

_LEAST_SEGMENTS = 8  # in a row of held-out text, so that the missing state at its start weighs little


class Segments(NamedTuple):
    """A batch: the next `context` tokens of some streams."""

    inputs: Tensor  # int64 [b, context]
    targets: Tensor  # int64 [b, context]: the token after each input
    streams: Tensor  # int64 [b]
    places: Tensor  # int64 [b]: how much of the stream is before them

    @property
    def begins(self) -> Tensor:
        """bool [b]: the stream is read from its beginning."""
        return self.places == 0


class CarryingTask(Task):
    """What tasks share that read `batch` streams of a text side by side, each step from the states that the step before
    has left. A state is one tensor [parts, layers, b, ...]."""

    def __init__(self, corpus: Corpus, batch: int) -> None:
        self.corpus = corpus
        self.tokenizer = corpus.tokenizer
        self.digest = corpus.digest
        self.baselines: dict[str, float] = {}
        self.batch = batch
        self.stream_tokens = (len(corpus.train) - 1) // batch
        self._states: Tensor | None = None  # [parts, layers, batch, ...]
        self._own = torch.zeros(batch, dtype=torch.bool)  # the streams that this process has read

    def carried(self, model: nn.Module) -> dict[str, Tensor]:
        """The states of all streams, each from the first process that has read it."""
        whole = self._states_of(model)
        everyones = zip(parallel.gathered(whole), parallel.gathered(self._own.to(whole.device)), strict=True)
        for states, own in reversed(list(everyones)):
            whole = _chosen(own, states, whole)
        return {"states": whole}

    def restore_carried(self, model: nn.Module, carried: dict[str, Tensor]) -> None:
        self._states_of(model).copy_(carried["states"])

    def _states_of(self, model: nn.Module) -> Tensor:
        """Where the streams' states are kept, [parts, layers, batch, ...]; at first the initial ones."""
        raise NotImplementedError

    def _read_here(self, streams: Tensor) -> None:
        """Notes that this process has read these streams [b]."""
        self._own = self._own.to(streams.device).index_fill(0, streams, True)


class StreamTask(CarryingTask):
    """Predicting each token of a text from all before it: `model(tokens [b, m], state=state) -> (logits [b, m, vocab],
    state)`, where `model.initial(b)` is the state before a text. A state is one tensor [parts, layers, b, ...].

    The text is cut into `batch` streams, and a step reads the next `context` tokens of each of them, from the states
    that the step before left. Gradients end at a step's beginning (Williams and Peng 1990, "An Efficient
    Gradient-Based Algorithm for On-Line Training of Recurrent Network Trajectories"). An epoch reads every stream once,
    without the tokens at its end that fill no step, and begins with initial states. Which tokens a step reads depends
    on the step alone.

    Held-out text is cut into few long rows, which are read from initial states, `context` tokens at a time, within one
    call of `losses`: the states of the training streams stay as they are.
    """

    argument: ClassVar[str] = "state"  # the model's, for what the step before has left

    def __init__(self, corpus: Corpus, *, batch: int, context: int, validation_tokens: int) -> None:
        super().__init__(corpus, batch)
        self.context = context
        self.validation_tokens = validation_tokens

    @property
    def steps_per_epoch(self) -> int:
        return self.stream_tokens // self.context

    def examples(self, step: int) -> Sequence[tuple[int, int]]:
        """Pairs of a stream and a place in it."""
        place = (step - 1) % self.steps_per_epoch * self.context
        return [(stream, place) for stream in range(self.batch)]

    def collate(self, examples: Sequence[tuple[int, int]]) -> Segments:
        streams, places = torch.tensor(examples).unbind(1)
        found = windows(self.corpus.train, streams * self.stream_tokens + places, self.context)
        return Segments(*found, streams, places)

    def size(self, batch: Segments | Windows) -> int:
        return batch.inputs.numel()

    def counts(self, batch: Segments | Windows) -> dict[str, int]:
        return {"loss": batch.targets.numel()}

    def losses(self, model: nn.Module, batch: Segments | Windows, smoothing: float) -> dict[str, Tensor]:
        if isinstance(batch, Windows):
            return {"loss": self._held_out_loss(model, batch, smoothing)}
        logits = self._read(model, batch, self._states_of(model))
        self._read_here(batch.streams)
        return {"loss": token_loss(logits, batch.targets, smoothing)}

    def validation(self) -> list[Windows]:
        """Rows spread evenly over the held-out text: of `validation_tokens` tokens together at most, or one segment; a
        batch for each process, as far as there are rows."""
        tokens, context = self.corpus.validation, self.context
        segments = max(1, min(len(tokens) - 1, self.validation_tokens) // context)
        rows = max(1, min(self.batch, segments // _LEAST_SEGMENTS))
        length = segments // rows * context
        starts = torch.linspace(0, len(tokens) - 1 - length, rows, dtype=torch.float64).long()
        return [windows(tokens, part, length) for part in starts.tensor_split(min(rows, parallel.world()))]

    def describe(self) -> str:
        tokens = len(self.corpus.train) + len(self.corpus.validation)
        return (
            f"{tokens:,} tokens of text, {self.batch} streams with {self.context} tokens of each in a step, "
            f"{self.steps_per_epoch:,} steps per epoch"
        )

    def _states_of(self, model: nn.Module) -> Tensor:
        """Where the streams' states are kept, [parts, layers, batch, ...]."""
        if self._states is None:
            self._states = parallel.original(model).initial(self.batch)
        return self._states

    def _read(self, model: nn.Module, batch: Segments, states: Tensor) -> Tensor:
        """The logits of a step's tokens, which leave the streams other states."""
        initial = parallel.original(model).initial(len(batch.streams))
        before = _chosen(batch.begins, initial, states[:, :, batch.streams])
        logits, after = model(batch.inputs, **{self.argument: before})
        states[:, :, batch.streams] = after.detach()
        return logits

    def _held_out_loss(self, model: nn.Module, text: Windows, smoothing: float) -> Tensor:
        state = parallel.original(model).initial(len(text.inputs))
        losses = []
        for inputs, targets in zip(*(side.split(self.context, 1) for side in text), strict=True):
            logits, state = model(inputs, **{self.argument: state})
            losses.append(token_loss(logits, targets, smoothing))
        return torch.stack(losses).sum()


class MemoryTask(StreamTask):
    """Streams for a model that remembers positions: `model(tokens [b, m], memory=memory) -> (logits [b, m, vocab],
    memory)`, memory [layers, b, M, width], where `model.initial(b)` is M = 0, and `model.config.memory` the largest M.

    The states of the streams have room for that, and M positions are the last ones in it. M is how much of the stream
    has been read, as far as there is room, so that a checkpoint need not say it.
    """

    argument = "memory"

    def _states_of(self, model: nn.Module) -> Tensor:
        """Where the streams' memory is kept, [1, layers, batch, room, width]."""
        if self._states is None:
            source = parallel.original(model)
            self._states = F.pad(source.initial(self.batch)[None], (0, 0, source.config.memory, 0))
        return self._states

    def _read(self, model: nn.Module, batch: Segments, states: Tensor) -> Tensor:
        kept, room = states[0], states.shape[3]
        held = min(int(batch.places[0]), room)  # the streams of a step are all at one place
        logits, after = model(batch.inputs, memory=kept[:, batch.streams, room - held :])
        kept[:, batch.streams, room - after.shape[2] :] = after
        return logits


def _chosen(where: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    """Our states [parts, layers, b, ...] in rows where [b] says so, theirs elsewhere."""
    return torch.where(where.view(-1, *[1] * (ours.ndim - 3)), ours, theirs)
