"""Everything that decides what a training run computes, with defaults, limits and help: one list for Python, the
command line and its configuration files."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, get_args, get_type_hints

import torch
from torch import nn

from pyattn.check import RangeError
from pyattn.files import KINDS, is_kind
from pyattn.training.schedules import SCHEDULES

if TYPE_CHECKING:
    from pyattn.training.task import Task

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MOST = 10**12  # of whatever is counted: no run comes so far, and floats hold such numbers exactly
_EVALUATIONS = 10  # over a whole run, where `evaluate_every` does not say otherwise


def optional_kind(annotation: Any) -> Any:
    """The type T of T and of `T | None`."""
    return next((part for part in get_args(annotation) if part is not type(None)), annotation)


class Limit(NamedTuple):
    """What a value must be: in words, and as a predicate."""

    words: str
    holds: Callable[[Any], bool]


def at_least(least: int) -> Limit:
    return Limit(f"at least {least} and at most {_MOST:,}", lambda value: least <= value <= _MOST)


def between(least: int, most: int) -> Limit:
    return Limit(f"a number from {least} to {most}", lambda value: least <= value <= most)


def one_of(*names: str) -> Limit:
    return Limit(f"one of {', '.join(names)}", lambda value: value in names)


SIZE = between(1, 2**20)  # of a vector: what is larger is a mistake that would only end when memory does
POSITIVE = Limit("a positive number", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Limit("0 or a positive number", lambda value: 0 <= value < math.inf)
PROBABILITY = Limit("a number in [0, 1)", lambda value: 0 <= value < 1)
PART = Limit("a number in [0, 1]", lambda value: 0 <= value <= 1)


def option(default: Any, help: str, limit: Limit | None = None, *, shown: str | None = None, path: bool = False) -> Any:
    """A field of settings.

    Args:
        default: None where the settings themselves work the value out; `limit` then does not look at it.
        shown: what help says the default is.
        path: the value is a path, kept as an absolute one.
    """
    return field(default=default, metadata={"help": help, "limit": limit, "shown": shown, "path": path})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the settings of every model share."""

    kind: ClassVar[str]  # its name on the command line

    attention: str = option("pyattn", "pyattn, or torch: what there is without pyattn.", one_of("pyattn", "torch"))
    layers: int = option(6, "Transformer blocks, or layers of a recurrent network.", between(1, 2**12))
    width: int = option(128, "Size of a token's vector.", SIZE)
    context: int = option(1024, "Positions: how many tokens the model sees at once.", between(1, 2**24))
    vocab: int = option(2048, "Size of the vocabulary to learn.", between(257, 2**24))
    dropout: float = option(0.0, "Probability of dropout.", PROBABILITY)

    steps: int = option(200, "Optimizer steps.", at_least(1))
    accumulate: int = option(
        1, "Parts that a step is computed in, to save memory: the step stays as it is.", at_least(1)
    )
    lr: float = option(1.5e-3, "Peak of the learning rate.", POSITIVE)
    schedule: str = option("cosine", f"Learning rate after the warm-up: {', '.join(SCHEDULES)}.", one_of(*SCHEDULES))
    warmup: int | None = option(
        None, "Steps over which the learning rate rises to its peak.", at_least(1), shown="5 % of steps"
    )
    min_lr_rate: float = option(0.1, "Where the cosine ends, as a part of lr.", PART)
    clip: float = option(1.0, "Largest norm of the gradient.", POSITIVE)
    weight_decay: float = option(0.1, "Of matrices; vectors do not decay.", NOT_NEGATIVE)
    beta1: float = option(0.9, "AdamW's memory of the gradient.", PROBABILITY)
    beta2: float = option(0.95, "AdamW's memory of its square.", PROBABILITY)
    label_smoothing: float = option(
        0.0, "Part of a target's probability that all tokens share, in the training loss.", PROBABILITY
    )
    dtype: str = option("float32", "float32, or bfloat16 for matrix products and attention.", one_of(*_DTYPES))
    compile: bool = option(False, "Let torch.compile make the model faster; the first steps take long.")
    evaluate_every: int | None = option(
        None, "Steps between evaluations, each of which leaves a checkpoint.", at_least(1), shown="a tenth of steps"
    )
    patience: int = option(0, "Stop after so many evaluations without a better one; 0: never.", at_least(0))
    seed: int = option(0, "Of weights, batches and dropout.", between(0, 2**63 - 1))

    def __post_init__(self) -> None:
        types = get_type_hints(type(self))
        for item in fields(self):
            value, limit = getattr(self, item.name), item.metadata["limit"]
            kind = optional_kind(types[item.name])
            if not is_kind(value, kind) and not (value is None and kind is not types[item.name]):
                raise RangeError(f"{item.name}: expected {KINDS[kind][1]}, got {value!r}")
            if limit is not None and value is not None and not limit.holds(value):
                raise RangeError(f"{item.name}: expected {limit.words}, got {value}")
        self.config(self.vocab)

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    @property
    def warmup_steps(self) -> int:
        return self.warmup or max(1, self.steps // 20)

    @property
    def steps_between_evaluations(self) -> int:
        return self.evaluate_every or math.ceil(self.steps / _EVALUATIONS)

    @property
    def attends(self) -> bool:
        """Whether the model has attention."""
        return True

    def config(self, vocab: int) -> Any:
        """The model's configuration, over the vocabulary that the tokenizer really has."""
        raise NotImplementedError

    def model(self, task: Task) -> nn.Module:
        """A new model for the task."""
        raise NotImplementedError

    def task(self, cache: Path) -> Task:
        """Reads the data. `cache` is a folder that keeps its tokens, so that a second run on the same data starts at
        once."""
        raise NotImplementedError


def shared(name: str, default: Any) -> Any:
    """The field `name` of all settings, with another default."""
    return field(default=default, metadata={**Settings.__dataclass_fields__[name].metadata, "shown": None})
