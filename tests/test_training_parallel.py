"""Training by two processes, as torchrun starts them: the steps are those of one process."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pyattn.training import metrics, parallel
from pyattn.training.recipes import BertSettings, GPTSettings, TransformerSettings, TransformerXLSettings, XLNetSettings
from pyattn.training.recurrent_recipes import RNNSettings, Seq2SeqSettings
from pyattn.training.run import Run
from pyattn.training.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
RECURRENT = {"layers": 1, "width": 32, "vocab": 300, "steps": 4, "evaluate_every": 2}
SMALL = RECURRENT | {"attention": "torch", "heads": 2}


def _cases(folder: Path) -> dict[str, Settings]:
    """Runs of every kind; those called idle have less to do than there are processes."""
    source, target = folder / "source", folder / "target"
    source.write_text("".join(f"das Haus {i} ist {'sehr ' * (i % 7)}alt\n" for i in range(60)))
    target.write_text("".join(f"house {i} is {'very ' * (i % 7)}old\n" for i in range(60)))
    text = folder / "text"
    text.write_text("".join(f"part {i} begins .\nit goes on .\nit ends .\n\n" for i in range(50)))
    gpt: dict[str, Any] = SMALL | {"text": argparse.__file__, "context": 32, "validation_tokens": 5 * 32}
    translation: dict[str, Any] = SMALL | {"source": str(source), "target": str(target), "hidden": 32, "dropout": 0.0}
    rnn: dict[str, Any] = RECURRENT | {"text": argparse.__file__, "hidden": 32, "context": 16}
    bert: dict[str, Any] = SMALL | {"text": str(text), "context": 32, "batch": 5, "hidden": 32, "dropout": 0.0}
    return {
        "gpt": GPTSettings(**gpt, batch=5),
        "accumulated": GPTSettings(**gpt, batch=7, accumulate=2),
        "transformer": TransformerSettings(**translation, max_tokens=120, context=64),
        "bert": BertSettings(**bert, validation_tokens=300),
        "rnn": RNNSettings(**rnn, batch=5, accumulate=2),
        "idle rnn": RNNSettings(**rnn, batch=1),
        "transformer-xl": TransformerXLSettings(**rnn, heads=2, memory=24, batch=5, accumulate=2),
        "xlnet": XLNetSettings(**rnn, heads=2, memory=24, batch=5, accumulate=2),
        "idle": GPTSettings(**gpt, batch=1),
    }


def _train(folder: Path) -> None:
    """What each process does: every run to its end, then some that stop and go on; leaves its weights behind."""
    torch.set_num_threads(1)
    with parallel.group("cpu"):
        weights = {}
        for name, settings in _cases(folder).items():
            run = Run(folder / "two" / name, settings, "cpu")
            list(run.steps())
            weights |= {f"{name}.{key}": tensor for key, tensor in run.model.state_dict().items()}
        torch.save(weights, folder / f"weights.{parallel.rank()}")
        options: dict[str, Any] = {"text": argparse.__file__, "context": 32, "batch": 5, "dropout": 0.2}
        _stop_and_go_on(folder / "gpt", GPTSettings(**SMALL, **options))
        _stop_and_go_on(folder / "rnn", RNNSettings(**RECURRENT, **options, hidden=32, accumulate=2))
        memory: dict[str, Any] = {"heads": 2, "hidden": 32, "memory": 48, "accumulate": 2}
        _stop_and_go_on(folder / "transformer-xl", TransformerXLSettings(**RECURRENT, **options, **memory))
        _stop_and_go_on(folder / "xlnet", XLNetSettings(**RECURRENT, **options, **memory))
        pairs = {"source": str(folder / "source"), "target": str(folder / "target"), "max_tokens": 120, "hard": True}
        _stop_and_go_on(folder / "hard", Seq2SeqSettings(**RECURRENT, **pairs, hidden=32, accumulate=2))
        _stop_and_go_on(folder / "idle rnn", RNNSettings(**RECURRENT, **(options | {"batch": 1}), hidden=32))


def _stop_and_go_on(folder: Path, settings: Settings) -> None:
    from pyattn.training import checkpoint

    list(Run(folder / "whole", settings, "cpu").steps())
    first = Run(folder / "parts", settings, "cpu")
    for step in first.steps():
        if step.step == 3:
            first.save()
            break
    parallel.summed(torch.zeros(1))  # the file is there for the second process, too, when the first one has come here
    list(Run(folder / "parts", settings, "cpu", checkpoint.load(first.checkpoint_path)).steps())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    _cases(folder)
    code = f"import test_training_parallel as t, pathlib; t._train(pathlib.Path({str(folder)!r}))"
    command = [*TORCHRUN, "--no-python", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    "name", ["gpt", "accumulated", "transformer", "bert", "rnn", "idle rnn", "transformer-xl", "xlnet", "idle"]
)
def test_two_processes_train_like_one(trained: Path, name: str) -> None:
    run = Run(trained / "one" / name, _cases(trained)[name], "cpu")
    list(run.steps())
    ours, theirs = (metrics.read(trained / count / name) for count in ("two", "one"))
    assert len(ours) == 4
    for line, expected in zip(ours, theirs, strict=True):
        seconds = line.pop("seconds"), expected.pop("seconds")
        assert min(seconds) > 0
        assert line == pytest.approx(expected, rel=1e-4)
    weights = [torch.load(trained / f"weights.{rank}") for rank in range(2)]
    for key, tensor in run.model.state_dict().items():
        first, second = (each[f"{name}.{key}"] for each in weights)
        assert torch.equal(first, second)
        assert (first - tensor).abs().max() < 1e-3  # far below what four steps change


@pytest.mark.parametrize("name", ["gpt", "rnn", "idle rnn", "transformer-xl", "xlnet", "hard"])
def test_two_processes_resumed_equal_uninterrupted_bitwise(trained: Path, name: str) -> None:
    whole, parts = (metrics.read(trained / name / run) for run in ("whole", "parts"))
    for line in whole + parts:
        del line["seconds"]
    assert parts == whole


def test_two_processes_leave_the_states_of_one(trained: Path) -> None:
    from pyattn.training import checkpoint

    for name in ("rnn", "idle rnn", "transformer-xl", "xlnet"):
        run = Run(trained / "alone" / name, _cases(trained)[name], "cpu")
        list(run.steps())
        states = checkpoint.load(trained / "two" / name / "checkpoint.safetensors").tensors["carry.states"]
        torch.testing.assert_close(states, run.task.carried(run.model)["states"], rtol=1e-3, atol=1e-4)


def test_command_by_torchrun_speaks_and_writes_once(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    options = SMALL | {"text": argparse.__file__, "context": 32, "batch": 5, "out": str(tmp_path / "run")}
    config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in options.items()))
    code = "import torch; torch.set_num_threads(1); from pyattn.cli import main; main()"
    command = [*TORCHRUN, "--no-python", sys.executable, "-c", code, "train", "gpt", "--config", str(config)]
    done = subprocess.run(
        [*command, "--device", "cpu", "--sample-tokens", "3"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("in 2 processes") == 1
    assert done.stdout.count("step     4/4  validation") == 1
    assert [line["step"] for line in metrics.read(tmp_path / "run")] == [1, 2, 3, 4]
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
