"""The training loop: a task's batches in, one record per optimizer step out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from pyattn.check import PyattnError
from pyattn.training import parallel
from pyattn.training.schedules import learning_rate
from pyattn.training.settings import Settings
from pyattn.training.task import Task, micro_batches


class DivergedError(PyattnError, ArithmeticError):
    """The loss is no longer a number."""


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step. `losses` are those of its examples before the step, `val_losses` (where measured) after it.

    Both are by the task's terms, with the sum of those that are no measures as "loss".
    """

    step: int
    losses: dict[str, float]
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    val_losses: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        return self.losses["loss"]

    @property
    def val_loss(self) -> float | None:
        return self.val_losses.get("loss")


def adamw(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) that decays matrices only, not biases and LayerNorm gains."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), fused=True)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, settings: Settings, *, done: int = 0
) -> Iterator[Step]:
    """Runs the steps after `done` up to `settings.steps`. Between two records, model and optimizer may be saved.

    Each step seeds torch's random generator from (seed, step), so that dropout, too, goes on as if never stopped.

    Raises:
        DivergedError: a loss or gradient is NaN or infinite; no record of that step is yielded, so nothing saves it.
    """
    held_out = task.validation()
    every = settings.steps_between_evaluations
    forward: Any = torch.compile(model) if settings.compile else model
    replica = parallel.replicated(forward)
    model.train()
    for step in range(done + 1, settings.steps + 1):
        began = time.perf_counter()
        lr = _set_learning_rate(optimizer, step, settings)
        torch.manual_seed(_seed(settings.seed, step, parallel.rank()))
        batches = micro_batches(task, step, settings.accumulate * parallel.world())
        losses, grad_norm = _optimize(replica, optimizer, task, batches, settings)
        seconds = time.perf_counter() - began
        val_losses = {}
        if step % every == 0 or step == settings.steps:
            model.eval()
            val_losses = evaluate(forward, task, held_out, settings.torch_dtype)
            model.train()
        yield Step(step, losses, lr, grad_norm, sum(map(task.size, batches)), seconds, val_losses)


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, batches: list[Any], dtype: torch.dtype) -> dict[str, float]:
    """Mean losses over batches, by term and together. Put the model into eval mode first."""
    totals = _totals(task, batches)
    device = next(model.parameters()).device
    sums = torch.zeros(len(totals), dtype=torch.float64, device=device)
    for batch in batches[parallel.rank() :: parallel.world()]:
        losses = _losses(model, task, batch, dtype, 0.0)
        sums += torch.stack([losses[name] for name in totals])
    return _checked(task, totals, parallel.summed(sums), "validation loss")


def _optimize(
    model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, batches: list[Any], settings: Settings
) -> tuple[dict[str, float], float]:
    """One step on this process's share of the batches; the losses and the gradient are those of all of them."""
    totals = _totals(task, batches)
    own = batches[parallel.rank() :: parallel.world()]
    # A process without a batch still takes part: with another's, at no weight.
    weight, own = (parallel.world(), own) if own else (0, batches[:1])
    sums = torch.zeros(len(totals), dtype=torch.float64, device=next(model.parameters()).device)
    optimizer.zero_grad(set_to_none=True)
    for batch in own[:-1]:
        with parallel.unsynced(model):
            sums += _backward(model, task, batch, totals, weight, settings)
    sums += _backward(model, task, own[-1], totals, weight, settings)
    losses = _checked(task, totals, parallel.summed(sums), "loss")
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip).item()
    if not math.isfinite(grad_norm):
        raise DivergedError(f"training: the gradient became {grad_norm}; try a lower --lr")
    optimizer.step()
    return losses, grad_norm


def _backward(
    model: nn.Module, task: Task, batch: Any, totals: dict[str, int], weight: int, settings: Settings
) -> Tensor:
    """Adds the gradients of one batch. Returns its summed losses, [terms].

    The sums are divided by what the whole step counts, so that the parts add up to its mean whatever their sizes;
    measures among them are constants. `weight` undoes the mean that several processes take of their gradients.
    """
    sums = _losses(model, task, batch, settings.torch_dtype, settings.label_smoothing)
    stacked = torch.stack([sums[name] for name in totals])
    divisors = stacked.new_tensor([max(1, total) for total in totals.values()])
    (stacked / divisors).sum().mul(weight).backward()
    return stacked.detach() * (weight > 0)


def _losses(model: nn.Module, task: Task, batch: Any, dtype: torch.dtype, smoothing: float) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
        return task.losses(model, type(batch)(*(tensor.to(device) for tensor in batch)), smoothing)


def _totals(task: Task, batches: list[Any]) -> dict[str, int]:
    counts = [task.counts(batch) for batch in batches]
    return {name: sum(count[name] for count in counts) for name in counts[0]}


def _checked(task: Task, totals: dict[str, int], sums: Tensor, what: str) -> dict[str, float]:
    """Means by term and together, if they are numbers."""
    means = {name: value / max(1, total) for (name, total), value in zip(totals.items(), sums.tolist(), strict=True)}
    if not math.isfinite(together := sum(value for name, value in means.items() if name not in task.measures)):
        raise DivergedError(f"training: the {what} became {together}; try a lower --lr")
    return means | {"loss": together}


def _set_learning_rate(optimizer: torch.optim.Optimizer, step: int, settings: Settings) -> float:
    lr = learning_rate(
        settings.schedule,
        step,
        steps=settings.steps,
        peak=settings.lr,
        warmup=settings.warmup_steps,
        floor=settings.min_lr_rate,
    )
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def _seed(*numbers: int) -> int:
    return int(numpy.random.SeedSequence(numbers).generate_state(1, numpy.uint64)[0])
