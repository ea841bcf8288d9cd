"""One file from which a run goes on exactly as if it had never stopped.

safetensors (no pickle: loading runs no code) with tensors `model.*` and `optimizer.*`, of a task that carries something
from step to step also `carry.*`, and JSON in its header. Random numbers need no state: the loop draws them from the
seed and the step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pyattn.check import PyattnError
from pyattn.files import replacing

FORMAT = "pyattn checkpoint 2"


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
        meta = json.loads(header["meta"])
        whole = isinstance(meta["step"], int) and isinstance(meta["settings"], dict)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint: {path} is damaged ({error!r} in its header)") from error
    if not whole:
        raise CheckpointError(f"checkpoint: {path} is damaged (its header has no step or no settings)")
    return Checkpoint(path, tensors, meta)


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts model and optimizer where the checkpoint was. Changes nothing when it raises.

    Raises:
        CheckpointError: its parameters are not those of `model`.
    """
    model.load_state_dict(_fitting(checkpoint, "model.", _weights(model)), strict=False)  # it is checked already
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _group(checkpoint.tensors, "optimizer.").items():
        index, key = name.split(".")
        state.setdefault(int(index), {})[key] = tensor
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


def _fitting(checkpoint: Checkpoint, prefix: str, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a group, whose names and shapes are those expected."""
    found = _group(checkpoint.tensors, prefix)
    shapes = {name: list(tensor.shape) for name, tensor in found.items()}
    for name, tensor in expected.items():
        if shapes.get(name) != list(tensor.shape):
            raise CheckpointError(
                f"checkpoint: {checkpoint.path} is of another run: {prefix}{name} is "
                f"{shapes.get(name, 'missing')} there and {list(tensor.shape)} here"
            )
    if unknown := found.keys() - expected.keys():
        raise CheckpointError(f"checkpoint: {checkpoint.path} is of another run: it also has {prefix}{min(unknown)}")
    return found


def _group(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
