"""One file from which a run goes on exactly as if it had never stopped.

safetensors (no pickle: loading runs no code) with tensors `model.*` and `optimizer.*`, of a task that carries something
from step to step also `carry.*`, and JSON in its header. Random numbers need no state: the loop draws them from the
seed and the step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pyattn.check import PyattnError
from pyattn.files import is_kind, json_object, replacing
from pyattn.spec import dtype_name

FORMAT = "pyattn checkpoint 2"
# What the header says: the kinds of each value, and what else it must be, in words and as a test.
_META: dict[str, tuple[tuple[type, ...], str, Callable[[Any], bool]]] = {
    "step": ((int,), "a whole number of at least 1", lambda value: value >= 1),
    "kind": ((str,), "a string", bool),
    "digest": ((str,), "a string", bool),
    "tokenizer": ((str,), "a string", bool),
    "settings": ((dict,), "an object", lambda _: True),
    "best_loss": ((float, NoneType), "a number of at least 0 or null", lambda value: 0 <= (value or 0) < math.inf),
    "evaluations_since_best": ((int,), "a whole number of at least 0", lambda value: value >= 0),
}
_MISSING = object()


class CheckpointError(PyattnError, ValueError):
    """A checkpoint is missing, damaged, or belongs to another run."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a file holds."""

    path: Path
    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        return self.meta["step"]


def save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    carried: dict[str, Tensor],
    *,
    step: int,
    meta: dict[str, Any],
) -> None:
    """Writes the state after `step`, in place of an older one in one step: there is a whole checkpoint at any time."""
    tensors = {f"model.{name}": tensor for name, tensor in _weights(model).items()}
    tensors |= {f"carry.{name}": tensor for name, tensor in carried.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(contiguous, temporary, metadata={"format": FORMAT, "meta": json.dumps({"step": step} | meta)})


def load(path: Path) -> Checkpoint:
    """Reads a whole file into memory.

    Raises:
        CheckpointError: no such file, truncated or damaged, or written by something else.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint: expected a file, {path} {'is none' if path.exists() else 'does not exist'}")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint: {path} is truncated or damaged ({error})") from error
    if header.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint: {path} was not written by this version of pyattn's training")
    try:
        meta = json_object(header.get("meta", ""))
    except ValueError as error:
        raise CheckpointError(f"checkpoint: {path} is damaged ({error} in its header)") from error
    for name, (kinds, words, holds) in _META.items():
        value = meta.get(name, _MISSING)
        if not any(is_kind(value, kind) for kind in kinds) or not holds(value):
            found = "nothing" if value is _MISSING else repr(value)[:60]
            raise CheckpointError(f"checkpoint: {path} is damaged: expected {words} for its {name}, got {found}")
    if meta["evaluations_since_best"] > meta["step"]:
        counts = f"{meta['evaluations_since_best']} evaluations in {meta['step']} steps"
        raise CheckpointError(f"checkpoint: {path} is damaged: it counts {counts[:80]}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"checkpoint: {path} is damaged: {name} has numbers that are none (NaN, infinity)")
        if name.endswith(".exp_avg_sq") and (tensor < 0).any():
            raise CheckpointError(f"checkpoint: {path} is damaged: {name}, a mean of squares, has negative numbers")
    return Checkpoint(path, tensors, meta)


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts model and optimizer where the checkpoint was. Changes nothing when it raises.

    Raises:
        CheckpointError: its parameters, or the optimizer's moments of them, are not those of `model`.
    """
    weights = _fitting(checkpoint, "model.", _weights(model))
    moments = _fitting(checkpoint, "optimizer.", _moments(optimizer))
    known = "model.", "optimizer.", "carry."
    if unknown := [name for name in checkpoint.tensors if not name.startswith(known)]:
        raise CheckpointError(f"checkpoint: {checkpoint.path} is of another run: it also has {min(unknown)}")
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in moments.items():
        index, key = name.split(".")
        if key == "step" and tensor != checkpoint.step:
            steps = f"{tensor.item():g} at step {checkpoint.step}"
            raise CheckpointError(f"checkpoint: {checkpoint.path} is damaged: optimizer.{name} is {steps}")
        state.setdefault(int(index), {})[key] = tensor
    model.load_state_dict(weights, strict=False)  # it is checked already
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def carried(checkpoint: Checkpoint, now: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the run's task carried, with the names and shapes of what it carries now.

    Raises:
        CheckpointError: it has others.
    """
    return _fitting(checkpoint, "carry.", now)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors; one that is in several places, such as a tied matrix, by its first name alone."""
    names: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), name)
    return {name: tensors[name].detach() for name in names.values()}


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What AdamW keeps of every parameter, by the names of a checkpoint, in its shapes and dtypes alone.

    torch's fused AdamW believes them: a moment that is smaller than its parameter would be read beyond its end.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    step = torch.empty((), device="meta")
    return {
        f"{index}.{name}": tensor
        for index, p in enumerate(parameters)
        for name, tensor in (("step", step), ("exp_avg", p.detach()), ("exp_avg_sq", p.detach()))
    }


def _fitting(checkpoint: Checkpoint, prefix: str, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a group, whose names, dtypes and shapes are those expected."""
    found = _group(checkpoint.tensors, prefix)
    for name, tensor in expected.items():
        there, here = (_form(found[name]) if name in found else "missing"), _form(tensor)
        if there != here:
            raise CheckpointError(
                f"checkpoint: {checkpoint.path} is of another run: {prefix}{name} is {there} there and {here} here"
            )
    if unknown := found.keys() - expected.keys():
        raise CheckpointError(f"checkpoint: {checkpoint.path} is of another run: it also has {prefix}{min(unknown)}")
    return found


def _form(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"


def _group(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
