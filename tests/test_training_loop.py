"""The loop and the run around it, whatever the model: parts of a step, early stopping, the best model, a full disk."""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pyattn
from pyattn.files import WriteError, append_line, replacing
from pyattn.training import checkpoint, metrics, run
from pyattn.training.loop import Step, adamw, evaluate, train
from pyattn.training.recipes import GPTSettings
from pyattn.training.run import Run, open_run
from pyattn.training.task import micro_batches

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {
    "text": argparse.__file__, "attention": "torch", "steps": 6, "layers": 2, "heads": 2, "width": 32, "context": 32,
    "batch": 6, "vocab": 300, "lr": 1e-2,
}  # fmt: skip


def _open(folder: Path, resume: bool = False, **given: Any) -> Run:
    return open_run(folder, GPTSettings, TINY | given, set(given), "cpu", resume=resume, overwrite=False)


def _losses(run: Run) -> list[float]:
    return [loss for step in run.steps() for loss in (step.loss, step.val_loss) if loss is not None]


@pytest.mark.parametrize("parts", [2, 4, 6, 100])
def test_accumulated_parts_are_the_whole_step(tmp_path: Path, parts: int) -> None:
    whole = _open(tmp_path / "whole")
    divided = _open(tmp_path / "divided", accumulate=parts)  # 4 parts of 6 windows are of unequal size
    assert _losses(divided) == pytest.approx(_losses(whole), rel=1e-5)
    for ours, theirs in zip(divided.model.parameters(), whole.model.parameters(), strict=True):
        # Of the last step; Adam would show a rounding of a tiny gradient as a step of full size.
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_micro_batches_are_the_examples_of_the_step_in_their_order(tmp_path: Path) -> None:
    task = _open(tmp_path / "run").task
    (whole,) = micro_batches(task, 3, 1)
    parts = micro_batches(task, 3, 4)
    assert [len(part.inputs) for part in parts] == [1, 2, 1, 2]
    assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
    assert len(micro_batches(task, 3, 100)) == 6


def test_step_does_not_depend_on_what_drew_random_numbers_before(tmp_path: Path) -> None:
    expected = _losses(_open(tmp_path / "a", dropout=0.3))
    disturbed = _open(tmp_path / "b", dropout=0.3)
    found = []
    for step in disturbed.steps():
        torch.rand(7)
        found += [loss for loss in (step.loss, step.val_loss) if loss is not None]
    assert found == expected
    assert _losses(_open(tmp_path / "c", dropout=0.3, seed=1)) != expected


def test_clip_bounds_the_gradient_and_weight_decay_spares_vectors(tmp_path: Path) -> None:
    tiny = _open(tmp_path / "run", clip=1e-3, weight_decay=0.5)
    step = next(tiny.steps())
    assert step.grad_norm > 1e-3
    norms = torch.stack([p.grad.norm() for p in tiny.model.parameters() if p.grad is not None])
    assert norms.norm().item() == pytest.approx(1e-3, rel=1e-2)
    decays = {group["weight_decay"]: {p.ndim for p in group["params"]} for group in tiny.optimizer.param_groups}
    assert decays == {0.5: {2}, 0.0: {1}}


def test_label_smoothing_is_in_the_training_loss_alone(tmp_path: Path) -> None:
    plain, smooth = (_open(tmp_path / str(s), label_smoothing=s, lr=1e-9) for s in (0.0, 0.3))
    (first, *_), (second, *_) = (list(run.steps()) for run in (plain, smooth))
    assert second.loss != first.loss
    assert second.val_loss == pytest.approx(first.val_loss, rel=1e-6)


def test_evaluate_is_the_mean_over_tokens_of_unequal_batches(tmp_path: Path) -> None:
    tiny = _open(tmp_path / "run")
    tiny.model.eval()
    batches = tiny.task.validation()
    assert len({len(batch.inputs) for batch in batches}) == 2
    inputs, targets = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    expected = nn.functional.cross_entropy(tiny.model(inputs).flatten(0, 1), targets.flatten())
    found = evaluate(tiny.model, tiny.task, batches, torch.float32)
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_compiled_model_trains_like_the_plain_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced and differentiated as ever, but not turned into C++, which would take half a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    settings = {"steps": 2, "layers": 1, "attention": "pyattn"}
    assert _losses(_open(tmp_path / "b", compile=True, **settings)) == pytest.approx(
        _losses(_open(tmp_path / "a", **settings)), rel=1e-4
    )


def _fake_train(val_losses: list[float]) -> Any:
    def fake(model: nn.Module, optimizer: Any, task: Any, settings: Any, *, done: int = 0) -> Iterator[Step]:
        for step in range(done + 1, settings.steps + 1):
            with torch.no_grad():
                next(model.parameters()).fill_(step)
            for p in model.parameters():  # as a step leaves them, for the checkpoint
                zeros = torch.zeros_like(p)
                optimizer.state[p] = {"step": torch.tensor(float(step)), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
            yield Step(step, {"loss": 1.0}, 0.1, 0.1, 10, 0.1, {"loss": val_losses[step - 1]})

    return fake


def test_run_without_progress_stops_and_keeps_the_best_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyattn.models.gpt import GPT

    monkeypatch.setattr(run, "train", _fake_train([5, 4, 4.5, 3, 3, 3.5, 2, 1, 1, 1]))
    tiny = _open(tmp_path / "run", steps=10, patience=2)
    assert [step.step for step in tiny.steps()] == [1, 2, 3, 4, 5, 6]
    assert tiny.out_of_patience
    assert tiny.best_loss == 3
    assert (GPT.from_pretrained(tiny.model_path).wte.weight == 4).all()
    assert (tiny.model_path / "tokenizer.json").read_text("utf-8") == tiny.task.tokenizer.to_str(pretty=True)


def test_resumed_run_remembers_its_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "train", _fake_train([3, 4, 4, 4, 4, 2, 1, 1, 1, 1]))
    for step in _open(tmp_path / "run", steps=10, patience=4).steps():
        if step.step == 4:
            break
    resumed = _open(tmp_path / "run", resume=True)
    assert (resumed.best_loss, resumed.evaluations_since_best) == (3, 3)
    assert [step.step for step in resumed.steps()] == [5]
    assert not list(_open(tmp_path / "run", resume=True).steps())
    assert [step.step for step in _open(tmp_path / "run", resume=True, patience=5).steps()] == [6, 7, 8, 9, 10]


def test_run_that_overwrites_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    for name in ("checkpoint.safetensors", "metrics.jsonl", "loss.png", "sample.txt", "model/weights", "model.before"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("old")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    next(open_run(tmp_path / "run", GPTSettings, TINY, set(), "cpu", resume=False, overwrite=True).steps())
    found = _bytes(tmp_path / "run")
    assert found.pop("notes.txt") == b"mine"
    assert not [name for name, data in found.items() if data == b"old"]


def test_resumed_run_draws_the_curve_that_a_killed_one_did_not(tmp_path: Path) -> None:
    tiny = _open(tmp_path / "run", steps=2)
    assert len(list(tiny.steps())) == 2
    picture = tmp_path / "run" / "loss.png"
    whole = picture.read_bytes()
    picture.write_text("of an earlier step")
    assert not list(_open(tmp_path / "run", resume=True).steps())
    assert picture.read_bytes() == whole


def test_metrics_line_names_every_term_and_its_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {"loss": 3.0, "masked": 2.0, "next": 1.0}
    steps = [Step(1, losses, 0.1, 0.2, 10, 0.5), Step(2, losses, 0.1, 0.2, 10, 0.5, losses)]
    monkeypatch.setattr(run, "train", lambda *_, **__: iter(steps))
    tiny = _open(tmp_path / "run")
    tiny.task.baselines = {"next": 0.7}
    list(tiny.steps())
    first, second = metrics.read(tmp_path / "run")
    assert first == {"step": 1, **losses, "lr": 0.1, "grad_norm": 0.2, "tokens": 10, "seconds": 0.5}
    assert second == first | {"step": 2, "val_loss": 3.0, "val_masked": 2.0, "val_next": 1.0, "baseline_next": 0.7}


@contextmanager
def _disk_full_beyond(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes: the system refuses, as it does when a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", ["checkpoint", "model"])
def test_full_disk_leaves_the_old_files_and_names_the_new_one(tmp_path: Path, what: str) -> None:
    tiny = _open(tmp_path / "run", steps=4, evaluate_every=2)
    steps = tiny.steps()
    next(steps)
    next(steps)
    before = _bytes(tmp_path / "run")
    if what == "checkpoint":
        tiny.best_loss = 0.0  # no better model, which would be written first
    size = 30_000  # more than the metrics, less than either file
    with _disk_full_beyond(size), pytest.raises(WriteError, match=f"cannot write .*{what}.safetensors: .*too large"):
        list(steps)
    after = _bytes(tmp_path / "run")
    assert after.pop("metrics.jsonl").startswith(before.pop("metrics.jsonl"))
    assert after == before
    resumed = _open(tmp_path / "run", resume=True)
    assert [step.step for step in resumed.steps()] == [3, 4]


def test_full_disk_keeps_the_metrics_readable(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    metrics.start(tmp_path / "run", 0)
    metrics.append(tmp_path / "run", step=1, loss=2.0)
    size = (tmp_path / "run" / metrics.FILE).stat().st_size
    with _disk_full_beyond(size + 5), pytest.raises(WriteError, match=r"cannot write .*metrics\.jsonl: File too large"):
        metrics.append(tmp_path / "run", step=2, loss=1.0)
    assert metrics.read(tmp_path / "run") == [{"step": 1, "loss": 2.0}]


def test_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"cannot write .*file/x: "), replacing(tmp_path / "file" / "x"):
        pass
    with pytest.raises(WriteError, match=r"cannot write .*file/x: Not a directory"):
        append_line(tmp_path / "file" / "x", "")


def test_checkpoint_of_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    list(_open(tmp_path / "run").steps())
    path = tmp_path / "run" / "checkpoint.safetensors"
    saved = checkpoint.load(path)
    meta = {name: value for name, value in saved.meta.items() if name != "step"} | {"kind": "bert"}
    tiny = _open(tmp_path / "other")
    checkpoint.save(path, tiny.model, adamw(tiny.model, tiny.settings), {}, step=6, meta=meta)
    with pytest.raises(checkpoint.CheckpointError, match="is not of a gpt"):
        _open(tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("schedule", "linear"), ("warmup", 0), ("clip", 0.0), ("clip", float("nan")), ("patience", -1), ("beta1", 1.0),
        ("weight_decay", -0.1), ("label_smoothing", 1.0), ("min_lr_rate", 2.0), ("evaluate_every", 0),
        ("accumulate", 0), ("tokens", "words"), ("validation_tokens", 0), ("attention", "flash"), ("dropout", 1.0),
    ],
)  # fmt: skip
def test_settings_out_of_limits_are_named(name: str, value: object) -> None:
    with pytest.raises(pyattn.RangeError, match=f"^{name}: expected .*, got "):
        GPTSettings(**{name: value})


def test_settings_are_what_a_checkpoint_can_keep() -> None:
    from dataclasses import asdict

    settings = GPTSettings(warmup=7)
    assert GPTSettings(**json.loads(json.dumps(asdict(settings)))) == settings


def test_train_goes_on_after_the_steps_done(tmp_path: Path) -> None:
    tiny = _open(tmp_path / "run")
    assert [step.step for step in train(tiny.model, tiny.optimizer, tiny.task, tiny.settings, done=4)] == [5, 6]
