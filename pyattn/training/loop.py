"""The training loop: batches in, one record per optimizer step out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyattn.check import PyattnError
from pyattn.training.data import Corpus, training_batch, validation_batches
from pyattn.training.schedules import warmup_cosine

_EVALUATIONS = 10  # over a whole run, at most
_VALIDATION_BATCHES = 4
_MAX_GRAD_NORM = 1.0


class DivergedError(PyattnError, ArithmeticError):
    """The loss is no longer a number."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does, apart from the model and the text."""

    steps: int
    batch: int
    context: int
    lr: float
    seed: int
    dtype: torch.dtype = torch.float32  # bfloat16: matrix products and attention in it, weights stay float32


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step. `loss` is that of its batch before the step, `val_loss` (where measured) after it."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    val_loss: float | None = None


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) that decays matrices only, not biases and LayerNorm gains."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, corpus: Corpus, plan: Plan, *, done: int = 0
) -> Iterator[Step]:
    """Runs the steps after `done` up to `plan.steps`. Between two records, model and optimizer may be saved.

    Raises:
        DivergedError: a loss or gradient is NaN or infinite; no record of that step is yielded, so nothing saves it.
    """
    held_out = validation_batches(corpus.validation, batch=plan.batch, context=plan.context, count=_VALIDATION_BATCHES)
    every = math.ceil(plan.steps / _EVALUATIONS)
    model.train()
    for step in range(done + 1, plan.steps + 1):
        began = time.perf_counter()
        lr = warmup_cosine(step, plan.steps, plan.lr, warmup=max(1, plan.steps // 20))
        batch = training_batch(corpus.train, batch=plan.batch, context=plan.context, seed=plan.seed, step=step)
        loss, grad_norm = _optimize(model, optimizer, batch, plan.dtype, lr)
        seconds = time.perf_counter() - began
        val_loss = evaluate(model, held_out, plan.dtype) if step % every == 0 or step == plan.steps else None
        if val_loss is not None and not math.isfinite(val_loss):
            raise DivergedError(f"training: the validation loss became {val_loss}; try a lower --lr")
        yield Step(step, loss, lr, grad_norm, plan.batch * plan.context, seconds, val_loss)


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> float:
    """Mean loss per token over batches of equal context, without dropout."""
    model.eval()
    total = sum(float(_loss(model, batch, dtype)) * len(batch[0]) for batch in batches)
    model.train()
    return total / sum(len(inputs) for inputs, _ in batches)


def _optimize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    lr: float,
) -> tuple[float, float]:
    loss = _loss(model, batch, dtype)
    if not math.isfinite(value := loss.item()):
        raise DivergedError(f"training: the loss became {value}; try a lower --lr")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRAD_NORM)
    if not math.isfinite(grad_norm.item()):
        raise DivergedError(f"training: the gradient became {grad_norm.item()}; try a lower --lr")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return value, grad_norm.item()


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    device = next(model.parameters()).device
    inputs, targets = (tokens.to(device) for tokens in batch)
    with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
        logits = model(inputs)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
