"""Training of hard attention by REINFORCE: the gradient of a step, its baseline, and runs that go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stream_runs import results
from torch import Tensor
from torch.nn import functional as F

from pyattn.models.seq2seq import Seq2Seq
from pyattn.nn import reinforcement
from pyattn.training import checkpoint
from pyattn.training.hard import HardTranslationTask
from pyattn.training.recurrent_recipes import Seq2SeqSettings
from pyattn.training.run import Run, open_run
from pyattn.training.task import micro_batches
from pyattn.training.translation import PAD, TranslationTask

pytestmark = pytest.mark.usefixtures("one_thread")
LINES = 60
TINY: dict[str, Any] = {
    "hard": True, "layers": 1, "width": 12, "hidden": 12, "vocab": 300, "max_tokens": 150, "steps": 6, "warmup": 1,
    "evaluate_every": 3, "schedule": "constant", "dropout": 0.1, "entropy": 0.1,
}  # fmt: skip


def _settings(folder: Path, **given: Any) -> dict[str, Any]:
    for name, words in (("source", "das Haus {} ist alt"), ("target", "house {} is {}old")):
        lines = (words.format(i % 10, "very " * (i % 3)) + "\n" for i in range(LINES))
        (folder / name).write_text("".join(lines))
    return TINY | {"source": str(folder / "source"), "target": str(folder / "target")} | given


def _task(folder: Path, **given: Any) -> tuple[HardTranslationTask, Seq2Seq]:
    settings = Seq2SeqSettings(**_settings(folder, **given))
    task = settings.task(folder / "cache")
    torch.manual_seed(0)
    model = settings.model(task)
    assert isinstance(task, HardTranslationTask) and isinstance(model, Seq2Seq)
    return task, model


def _gradients(loss: Tensor, model: Seq2Seq) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_loss_is_the_likelihood_and_its_gradient_also_that_of_the_choices(tmp_path: Path) -> None:
    task, model = _task(tmp_path, reinforce=0.5)
    task.restore_carried(model, {"baseline": torch.tensor(-3.0, dtype=torch.float64)})
    batch = task.collate([example for step in range(1, 4) for example in task.examples(step)])
    assert (batch.target_out == PAD).any()  # its choices count for nothing
    torch.manual_seed(1)
    loss = task.losses(model, batch, 0.0)["loss"]
    torch.manual_seed(1)
    logits, choices = model(batch.source, batch.target_in, batch.source_lengths, return_choices=True)
    nll = F.cross_entropy(logits.mT, batch.target_out, ignore_index=PAD, reduction="none")
    torch.testing.assert_close(loss, nll.sum())
    held = batch.target_out != PAD
    advantage = -nll.detach().sum(1) + 3.0
    wanted = nll.sum() - (0.5 * advantage * (choices.log_prob * held).sum(1)).sum() - 0.1 * choices.entropy[held].sum()
    found = _gradients(loss, model)
    for ours, theirs in zip(found, _gradients(wanted, model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_baseline_moves_when_a_step_is_over_by_all_its_parts(tmp_path: Path) -> None:
    task, model = _task(tmp_path, dropout=0.0)
    expected = 0.0
    for step, parts in ((1, 1), (2, 3)):
        found: list[Tensor] = []
        for batch in micro_batches(task, step, parts):
            torch.manual_seed(step)
            assert task.reinforcement.baseline.item() == pytest.approx(expected)
            task.losses(model, batch, 0.0)
            torch.manual_seed(step)
            logits, _ = model(batch.source, batch.target_in, batch.source_lengths, return_choices=True)
            nll = F.cross_entropy(logits.mT, batch.target_out, ignore_index=PAD, reduction="none")
            found += nll.detach().sum(1).unbind()
        expected = 0.9 * expected - 0.1 * float(torch.stack(found).mean())
    for _ in range(2):  # to look at it moves nothing
        assert task.carried(model)["baseline"].item() == pytest.approx(expected)


def test_without_gradient_nothing_is_drawn_and_nothing_learned(tmp_path: Path) -> None:
    task, model = _task(tmp_path)
    model.eval()
    (batch,) = task.validation()
    with torch.no_grad():
        losses = [task.losses(model, batch, 0.0) for _ in range(2)]
        plain = TranslationTask.losses(task, model, batch, 0.0)
    assert losses[0] == losses[1] == plain
    assert task.carried(model)["baseline"] == 0


def _open(folder: Path, resume: bool = False, **given: Any) -> Run:
    folder.parent.mkdir(exist_ok=True)
    settings = _settings(folder.parent, **given)
    return open_run(folder, Seq2SeqSettings, settings, set(given), "cpu", resume=resume, overwrite=False)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("last", [1, 3, 4])
def test_resumed_run_equals_uninterrupted_bitwise(tmp_path: Path, last: int, accumulate: int) -> None:
    whole = _open(tmp_path / "whole", accumulate=accumulate)
    expected = results(whole)
    found = results(_open(tmp_path / "parts", accumulate=accumulate), last)
    torch.manual_seed(999)
    second = _open(tmp_path / "parts", resume=True)
    assert found + results(second) == expected
    ours, theirs = (run.model.state_dict() | run.task.carried(run.model) for run in (second, whole))
    assert ours["baseline"] < -1
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_baseline_is_part_of_the_checkpoint_and_matters(tmp_path: Path) -> None:
    whole = _open(tmp_path / "whole")
    expected = results(whole)
    results(_open(tmp_path / "parts"), 3)
    carried = checkpoint.load(tmp_path / "parts" / "checkpoint.safetensors").tensors["carry.baseline"]
    assert carried.dtype is torch.float64 and carried.shape == ()
    run = _open(tmp_path / "parts", resume=True)
    run.task.restore_carried(run.model, {"baseline": torch.zeros((), dtype=torch.float64)})
    assert results(run) != expected[3:]


def test_straight_through_learns_by_the_likelihood_alone(tmp_path: Path) -> None:
    settings = Seq2SeqSettings(**_settings(tmp_path, temperature=1.0, entropy=None))
    assert type(settings.task(tmp_path / "cache")) is TranslationTask


def test_weights_of_reinforcement_are_the_settings(tmp_path: Path) -> None:
    for given, expected in (({"entropy": None}, (0.1, 0.001)), ({"reinforce": 0.0, "entropy": 2.0}, (0.0, 2.0))):
        task, _ = _task(tmp_path, **given)
        assert (task.reinforcement.weight, task.reinforcement.entropy_weight) == expected
    assert not reinforcement(torch.ones(1), torch.ones(1, 2), torch.ones(1, 2), torch.zeros(()), weight=0.0).any()
