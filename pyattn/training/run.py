"""One training run in one folder, from data to a checkpoint, a loss curve and the best model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from pyattn.check import RangeError
from pyattn.files import remove, replacing, replacing_folder
from pyattn.training import checkpoint, metrics, parallel, plot
from pyattn.training.checkpoint import Checkpoint, CheckpointError
from pyattn.training.loop import Step, adamw, train
from pyattn.training.settings import Settings

# What a run leaves in its folder. The checkpoint first: without it there is nothing to resume.
_LEFT = ("checkpoint.safetensors", metrics.FILE, "loss.png", "sample.txt", "model", "model.before")
# What a resumed run may change: when it ends.
_CHANGEABLE = ("steps", "patience")


class Run:
    """A run that can be stopped after any step and gone on with.

    Nothing in `folder` is written before `steps()`: not by data, a checkpoint or settings that raise here.

    Args:
        folder: gets checkpoint.safetensors, metrics.jsonl, loss.png, and in model/ the model that did best so far.
        before: the checkpoint to go on from, read by `checkpoint.load` from `folder`.
    """

    def __init__(self, folder: Path, settings: Settings, device: str, before: Checkpoint | None = None) -> None:
        self.folder = folder
        self.settings = settings
        self.device = device
        with parallel.first_process_first():
            self.task = settings.task(folder.parent / ".pyattn-cache")
        torch.manual_seed(settings.seed)
        # Made on the CPU whatever the device: every device then starts from the same weights.
        self.model = settings.model(self.task).to(device)
        self.optimizer = adamw(self.model, settings)
        self.step = 0
        self.best_loss = math.inf  # of the evaluations so far
        self.evaluations_since_best = 0
        if before is not None:
            self._restore(before)

    @property
    def checkpoint_path(self) -> Path:
        return checkpoint_path(self.folder)

    @property
    def model_path(self) -> Path:
        """The folder of the best model and its tokenizer.json, once there was an evaluation."""
        return self.folder / "model"

    @property
    def out_of_patience(self) -> bool:
        return 0 < self.settings.patience <= self.evaluations_since_best

    def steps(self) -> Iterator[Step]:
        """Trains. Each step is in the metrics before it is yielded; each evaluation also leaves a checkpoint.

        Of several processes the first one alone writes.
        """
        if parallel.rank() == 0:
            if self.step == 0:
                for name in _LEFT:  # of the run that this one overwrites
                    remove(self.folder / name)
            if metrics.start(self.folder, self.step):
                plot.loss_curve(self.folder)  # a run that was killed may have stopped before its last one
        if self.out_of_patience:
            return
        for done in train(self.model, self.optimizer, self.task, self.settings, done=self.step):
            self.step = done.step
            if parallel.rank() == 0:
                metrics.append(self.folder, **_line(done, self.task.baselines))
            if done.val_loss is not None:
                self._judge(done.val_loss)
            yield done
            if self.out_of_patience:
                return

    def save(self) -> None:
        """Writes the checkpoint of the last step and the loss curve up to it. Every process has to come here."""
        carried = self.task.carried(self.model)
        if parallel.rank() != 0:
            return
        meta = {
            "kind": self.settings.kind,
            "settings": asdict(self.settings),
            "digest": self.task.digest,
            "tokenizer": self.task.tokenizer.to_str(),
            # JSON has no infinity.
            "best_loss": None if self.best_loss == math.inf else self.best_loss,
            "evaluations_since_best": self.evaluations_since_best,
        }
        checkpoint.save(self.checkpoint_path, self.model, self.optimizer, carried, step=self.step, meta=meta)
        plot.loss_curve(self.folder)

    def _judge(self, val_loss: float) -> None:
        """Keeps the model if no evaluation was better, and the checkpoint in any case."""
        if val_loss < self.best_loss:
            self.best_loss, self.evaluations_since_best = val_loss, 0
            if parallel.rank() == 0:
                self._save_model()
        else:
            self.evaluations_since_best += 1
        self.save()

    def _save_model(self) -> None:
        """Weights, configuration and tokenizer belong together: a folder holds all of one evaluation, whoever reads it
        and whenever the process ends."""
        with replacing_folder(self.model_path) as folder:
            self.model.save_pretrained(folder)  # type: ignore[operator]
            with replacing(folder / "tokenizer.json") as path:
                path.write_text(self.task.tokenizer.to_str(pretty=True), encoding="utf-8")

    def _restore(self, before: Checkpoint) -> None:
        if before.meta["digest"] != self.task.digest:
            raise CheckpointError(f"checkpoint: the text is no longer the one {before.path} was trained on")
        if before.meta["tokenizer"] != self.task.tokenizer.to_str():
            raise CheckpointError(f"checkpoint: the tokenizer is no longer the one {before.path} was trained with")
        checkpoint.restore(before, self.model, self.optimizer)
        carried = checkpoint.carried(before, self.task.carried(self.model))
        self.task.restore_carried(self.model, carried)
        self.step = before.step
        if before.meta["best_loss"] is not None:
            self.best_loss = before.meta["best_loss"]
        self.evaluations_since_best = before.meta["evaluations_since_best"]


def checkpoint_path(folder: Path) -> Path:
    """Where a run in `folder` keeps its checkpoint."""
    return folder / "checkpoint.safetensors"


def open_run(
    folder: Path,
    recipe: type[Settings],
    settings: dict[str, Any],
    given: set[str],
    device: str,
    *,
    resume: bool,
    overwrite: bool,
) -> Run:
    """A new run, or the one that `folder` holds.

    Args:
        settings: a value for each field of the recipe that has none, and for others.
        given: those that the user named. A resumed run takes the others from its checkpoint.
    Raises:
        CheckpointError: a new run would overwrite a checkpoint; or there is none to resume, or not of this run.
    """
    path = checkpoint_path(folder)
    if resume:
        before = checkpoint.load(path)
        return Run(folder, _resumed(before, recipe, {name: settings[name] for name in given}), device, before)
    if path.exists() and not overwrite:
        raise CheckpointError(
            f"checkpoint: {path} exists; --resume goes on with it, --overwrite starts anew, --out names another folder"
        )
    return Run(folder, recipe(**settings), device)


def _resumed(before: Checkpoint, recipe: type[Settings], given: dict[str, Any]) -> Settings:
    """The settings of a checkpoint's run. `given` may change when it ends and must agree in all else."""
    stored = before.meta["settings"]
    if before.meta["kind"] != recipe.kind or stored.keys() != {item.name for item in fields(recipe)}:
        raise CheckpointError(f"checkpoint: {before.path} is not of a {recipe.kind} trained by this version of pyattn")
    for name, value in given.items():
        if name not in _CHANGEABLE and value != stored[name]:
            raise CheckpointError(
                f"checkpoint: {before.path} is of another run: {name} is {stored[name]} there and {value} here"
            )
    try:
        settings = recipe(**(stored | {name: given[name] for name in _CHANGEABLE if name in given}))
    except RangeError as error:
        raise CheckpointError(f"checkpoint: the settings in {before.path} cannot be: {error}") from error
    if settings.steps < before.step:
        steps = f"step {before.step}, beyond --steps {settings.steps}"
        raise CheckpointError(f"checkpoint: {before.path} is already at {steps}")
    return settings


def _line(done: Step, baselines: dict[str, float]) -> dict[str, float]:
    """A step as a line of the metrics: a loss by its name, at an evaluation with val_ before, and what it must beat."""
    line = {"step": done.step, **done.losses, "lr": done.lr, "grad_norm": done.grad_norm}
    line |= {"tokens": done.tokens, "seconds": done.seconds}
    line |= {f"val_{name}": value for name, value in done.val_losses.items()}
    return line | ({f"baseline_{name}": value for name, value in baselines.items()} if done.val_losses else {})
