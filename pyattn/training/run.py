"""One training run of a GPT in one folder, from a text to a checkpoint, a loss curve and a sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from pyattn.check import RangeError
from pyattn.decoding.sampling import generate
from pyattn.models.gpt import GPT, GPTConfig
from pyattn.training import checkpoint, metrics, plot
from pyattn.training.checkpoint import Checkpoint, CheckpointError
from pyattn.training.data import END_OF_TEXT, load_corpus
from pyattn.training.files import replacing
from pyattn.training.loop import Plan, Step, adamw, train

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides what a run computes. `text` is an absolute path, or None for the standard library."""

    text: str | None
    attention: str
    seed: int
    steps: int
    layers: int
    heads: int
    width: int
    context: int
    batch: int
    vocab: int
    lr: float
    dropout: float
    dtype: str

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("context", 1), ("vocab", 257), ("seed", 0)):
            if getattr(self, name) < least:
                raise RangeError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name, most in (("seed", 2**63 - 1), ("vocab", 2**24)):
            if getattr(self, name) > most:
                raise RangeError(f"{name}: expected at most {most}, got {getattr(self, name)}")
        if not 0 < self.lr < float("inf"):
            raise RangeError(f"lr: expected a positive number, got {self.lr}")
        if self.dtype not in _DTYPES:
            raise RangeError(f"dtype: expected one of {', '.join(_DTYPES)}, got {self.dtype}")
        self.model(self.vocab)

    def model(self, vocab: int) -> GPTConfig:
        """The model's configuration over the vocabulary that the tokenizer really has."""
        return GPTConfig(
            vocab, self.context, self.layers, self.heads, self.width, dropout=self.dropout, attention=self.attention
        )


class Run:
    """A run that can be stopped after any step and gone on with.

    Nothing in `folder` is written before `steps()`: not by a text, a checkpoint or settings that raise here.

    Args:
        folder: gets checkpoint.safetensors, metrics.jsonl, loss.png and sample.txt.
        before: the checkpoint to go on from, read by `checkpoint.load` from `folder`.
    """

    def __init__(self, folder: Path, settings: Settings, device: str, before: Checkpoint | None = None) -> None:
        self.folder = folder
        self.settings = settings
        self.corpus = load_corpus(
            None if settings.text is None else Path(settings.text),
            vocab=settings.vocab,
            context=settings.context,
            batch=settings.batch,
            cache=folder.parent / ".pyattn-cache",
        )
        self.device = device
        torch.manual_seed(settings.seed)
        # Made on the CPU whatever the device: every device then starts from the same weights.
        self.model = GPT(settings.model(self.corpus.tokenizer.get_vocab_size())).to(device)
        self.optimizer = adamw(self.model)
        self.step = 0
        if before is not None:
            if before.meta["digest"] != self.corpus.digest:
                raise CheckpointError(f"checkpoint: the text is no longer the one {before.path} was trained on")
            checkpoint.restore(before, self.model, self.optimizer)
            self.step = before.step

    @property
    def checkpoint_path(self) -> Path:
        return checkpoint_path(self.folder)

    def steps(self) -> Iterator[Step]:
        """Trains. Each step is in the metrics before it is yielded; each evaluation also leaves a checkpoint."""
        s = self.settings
        plan = Plan(s.steps, s.batch, s.context, s.lr, s.seed, _DTYPES[s.dtype])
        metrics.start(self.folder, self.step)
        for done in train(self.model, self.optimizer, self.corpus, plan, done=self.step):
            self.step = done.step
            metrics.append(self.folder, **{name: value for name, value in asdict(done).items() if value is not None})
            if done.val_loss is not None:
                self.save()
            yield done

    def save(self) -> None:
        """Writes the checkpoint of the last step and the loss curve up to it."""
        meta = {
            "settings": asdict(self.settings),
            "digest": self.corpus.digest,
            "tokenizer": self.corpus.tokenizer.to_str(),
        }
        checkpoint.save(self.checkpoint_path, self.model, self.optimizer, step=self.step, meta=meta)
        plot.loss_curve(self.folder)

    def sample(self, count: int) -> str:
        """Text of `count` tokens that the model makes up from the start of a document; also in sample.txt."""
        start = torch.tensor([[self.corpus.tokenizer.token_to_id(END_OF_TEXT)]], device=self.device)
        generator = torch.Generator(self.device).manual_seed(self.settings.seed)
        self.model.eval()
        tokens = generate(self.model, start, count, temperature=0.8, top_p=0.95, generator=generator)
        text = self.corpus.tokenizer.decode(tokens[0].tolist())
        with replacing(self.folder / "sample.txt") as path:
            path.write_text(text, encoding="utf-8")
        return text


def checkpoint_path(folder: Path) -> Path:
    """Where a run in `folder` keeps its checkpoint."""
    return folder / "checkpoint.safetensors"


def open_run(
    folder: Path, settings: dict[str, Any], given: set[str], device: str, *, resume: bool, overwrite: bool
) -> Run:
    """A new run, or the one that `folder` holds.

    Args:
        settings: a value for each field of `Settings`.
        given: those that the user named. A resumed run takes the others from its checkpoint.
    Raises:
        CheckpointError: a new run would overwrite a checkpoint; or there is none to resume, or not of this run.
    """
    path = checkpoint_path(folder)
    if resume:
        before = checkpoint.load(path)
        return Run(folder, _resumed(before, {name: settings[name] for name in given}), device, before)
    if path.exists() and not overwrite:
        raise CheckpointError(
            f"checkpoint: {path} exists; --resume goes on with it, --overwrite starts anew, --out names another folder"
        )
    return Run(folder, Settings(**settings), device)


def _resumed(before: Checkpoint, given: dict[str, Any]) -> Settings:
    """The settings of a checkpoint's run. `given` may change the number of steps and must agree in all else."""
    stored = before.meta.get("settings", {})
    if stored.keys() != {field.name for field in fields(Settings)}:
        raise CheckpointError(f"checkpoint: {before.path} is not of a GPT trained by this version of pyattn")
    for name, value in given.items():
        if name != "steps" and value != stored[name]:
            raise CheckpointError(
                f"checkpoint: {before.path} is of another run: {name} is {stored[name]} there and {value} here"
            )
    steps = given.get("steps", stored["steps"])
    if steps < before.step:
        raise CheckpointError(f"checkpoint: {before.path} is already at step {before.step}, beyond --steps {steps}")
    return Settings(**(stored | {"steps": steps}))
