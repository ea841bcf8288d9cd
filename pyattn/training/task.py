"""What the training loop needs to know of a model's data; everything else about training is the same for all models."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

from tokenizers import Tokenizer
from torch import Tensor, nn


class Task(Protocol):
    """Batches and losses of one kind of model, for classes that derive from it. A batch is a NamedTuple of tensors.

    A loss is a sum of named terms, each of them a mean over everything of its kind in the step: `losses` gives the
    sums and `counts` what to divide them by. So a step may be cut into any number of batches, and computed by any
    number of processes, and stays the same step.

    A task may carry tensors from each step to the next, such as the states of recurrent networks, which `losses` of a
    training batch replaces. They are part of a checkpoint.
    """

    tokenizer: Tokenizer
    digest: str  # of the data: what a resumed run must find unchanged
    baselines: dict[str, float]  # what a model without any insight would reach in validation, by term
    measures: tuple[str, ...] = ()  # terms that are no part of the loss, only shown, such as an accuracy

    def examples(self, step: int) -> Sequence[Any]:
        """The examples of one optimizer step: a function of the step (and the task's seed) alone."""
        ...

    def collate(self, examples: Sequence[Any]) -> Any:
        """Some of them as one batch."""
        ...

    def size(self, batch: Any) -> int:
        """Tokens that the model reads."""
        ...

    def counts(self, batch: Any) -> dict[str, int]:
        """Predictions by term."""
        ...

    def losses(self, model: nn.Module, batch: Any, smoothing: float) -> dict[str, Tensor]:
        """Summed losses by term, of a batch on the model's device.

        Args:
            smoothing: part of each target's probability that goes to all tokens alike (Szegedy et al. 2016, section 7).
        """
        ...

    def validation(self) -> list[Any]:
        """Batches of held-out examples, the same ones at every call."""
        ...

    def describe(self) -> str:
        """The data in a few words, for people."""
        ...

    def carried(self, model: nn.Module) -> dict[str, Tensor]:
        """What the last step left to the next one beside weights and optimizer, by name: the same in every process.
        All of them have to ask together."""
        return {}

    def restore_carried(self, model: nn.Module, carried: dict[str, Tensor]) -> None:
        """Goes on with what `carried` was: names and shapes are those that it has now."""
        return


def micro_batches(task: Task, step: int, parts: int) -> list[Any]:
    """The batches of one optimizer step: `parts` of nearly equal size, or fewer where there are fewer examples."""
    examples = task.examples(step)
    parts = min(parts, len(examples))
    bounds = [len(examples) * part // parts for part in range(parts + 1)]
    return [task.collate(examples[low:high]) for low, high in pairwise(bounds)]
