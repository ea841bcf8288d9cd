"""Training of Transformer-XL: what a step remembers of those before it, checkpoints, and the command."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stream_runs import command, open_on_text, results
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.nn import functional as F

import pyattn
from pyattn.decoding.sampling import GREEDY, generate
from pyattn.models.transformer_xl import TransformerXL, TransformerXLConfig
from pyattn.training import checkpoint, metrics
from pyattn.training.checkpoint import CheckpointError
from pyattn.training.language import Corpus, windows
from pyattn.training.loop import evaluate
from pyattn.training.recipes import TransformerXLSettings
from pyattn.training.run import Run
from pyattn.training.streams import MemoryTask
from pyattn.training.task import micro_batches

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB = 11
# 4 streams of 8 tokens a step; the text of 160 characters is 4 steps long.
TINY = {
    "tokens": "characters", "layers": 2, "heads": 2, "width": 8, "hidden": 12, "context": 8, "memory": 12, "batch": 4,
    "steps": 10, "lr": 1e-2, "dropout": 0.2, "attention_dropout": 0.2, "validation_tokens": 24, "evaluate_every": 5,
}  # fmt: skip


def _task(**options: int) -> MemoryTask:
    """Streams of 33 tokens: 6 steps of 5, and 3 tokens that fill no step."""
    drawn = torch.randint(VOCAB, (300,), generator=torch.Generator().manual_seed(0)).int()
    corpus = Corpus(drawn[:100], drawn[100:], Tokenizer(models.BPE()), "")
    return MemoryTask(corpus, **({"batch": 3, "context": 5, "validation_tokens": 90} | options))


def _model(memory: int, **options: Any) -> TransformerXL:
    torch.manual_seed(0)
    sizes = {"vocab": VOCAB, "layers": 2, "heads": 2, "width": 6, "head_size": 3, "hidden": 7}
    model = TransformerXL(TransformerXLConfig(**sizes, memory=memory, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.double()


def _open(folder: Path, resume: bool = False, **given: Any) -> Run:
    return open_on_text(folder, TransformerXLSettings, TINY, resume, **given)


def _losses(task: MemoryTask, model: TransformerXL, steps: int, parts: int = 1) -> list[float]:
    found = []
    with torch.no_grad():
        for step in range(1, steps + 1):
            sums = [task.losses(model, batch, 0.0)["loss"].item() for batch in micro_batches(task, step, parts)]
            found.append(sum(sums))
    return found


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    "options", [{"memory": 25}, {"memory": 40}, {"memory": 3, "same_length": True}, {"memory": 7, "same_length": True}]
)
def test_steps_read_a_stream_as_if_at_once_and_an_epoch_begins_anew(options: dict[str, Any], parts: int) -> None:
    task, model = _task(), _model(**options)
    with torch.no_grad():
        inputs, targets = windows(task.corpus.train, torch.arange(3) * 33, 30)
        each = F.cross_entropy(model(inputs)[0].transpose(1, 2).float(), targets, reduction="none")
    expected = each.view(3, 6, 5).sum((0, 2)).tolist()
    assert _losses(task, model, 8, parts) == pytest.approx(expected + expected[:2], rel=1e-6)


@pytest.mark.parametrize("memory", [0, 2, 5, 7])
def test_steps_remember_as_much_as_the_model(memory: int) -> None:
    task, model, expected, remembered = _task(), _model(memory), [], None
    for step in range(1, 7):
        (batch,) = micro_batches(task, step, 1)
        with torch.no_grad():
            logits, remembered = model(batch.inputs, remembered)
        expected.append(F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), reduction="sum").item())
    assert _losses(task, model, 6) == pytest.approx(expected, rel=1e-6)
    kept = task.carried(model)["states"]
    assert kept.shape == (1, 2, 3, memory, 6) and torch.equal(kept[0], remembered)


def test_first_step_of_an_epoch_sees_nothing_of_the_last() -> None:
    """Although the room for memory still holds it."""
    task, model = _task(), _model(7)
    losses = _losses(task, model, 12)
    assert losses[:6] == losses[6:] and len({*losses}) == 6


def test_gradients_end_where_a_step_begins() -> None:
    task, model = _task(), _model(7)
    (first,), (second,) = (micro_batches(task, step, 1) for step in (1, 2))
    task.losses(model, first, 0.0)["loss"].backward()
    model.zero_grad()
    task.losses(model, second, 0.0)["loss"].backward()
    with torch.no_grad():
        _, memory = model(first.inputs)
    logits, _ = model(second.inputs, memory)
    loss = F.cross_entropy(logits.float().flatten(0, 1), second.targets.flatten(), reduction="sum")
    theirs = torch.autograd.grad(loss, list(model.parameters()))
    for parameter, expected in zip(model.parameters(), theirs, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-12)


def test_evaluation_reads_rows_in_segments_and_leaves_the_streams_alone(tmp_path: Path) -> None:
    task, model = _task(), _model(50)
    (held_out,) = task.validation()
    assert held_out.inputs.shape == (2, 45)
    with torch.no_grad():
        expected = F.cross_entropy(model(held_out.inputs)[0].flatten(0, 1), held_out.targets.flatten())
    assert evaluate(model, task, [held_out], torch.float32) == {"loss": pytest.approx(expected.item(), rel=1e-6)}
    often = [result[:2] for result in results(_open(tmp_path / "a", evaluate_every=1))]
    assert often == [result[:2] for result in results(_open(tmp_path / "b", evaluate_every=100))]


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"same_length": True, "norm": "pre"}], ids=str)
@pytest.mark.parametrize("last", [1, 3, 4, 5, 9])
def test_resumed_run_equals_uninterrupted_bitwise(tmp_path: Path, last: int, options: dict[str, Any]) -> None:
    whole = _open(tmp_path / "whole", **options)
    assert whole.task.steps_per_epoch == 4
    expected = results(whole)
    found = results(_open(tmp_path / "parts", **options), last)
    torch.manual_seed(999)
    second = _open(tmp_path / "parts", resume=True)
    assert found + results(second) == expected
    ours, theirs = (run.model.state_dict() | run.task.carried(run.model) for run in (second, whole))
    assert ours["states"].any()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_resumed_run_needs_the_memory_of_its_checkpoint(tmp_path: Path) -> None:
    """A run that went on with another memory would not be the same."""
    expected = results(_open(tmp_path / "whole"))
    results(_open(tmp_path / "parts"), 3)
    run = _open(tmp_path / "parts", resume=True)
    run.task.restore_carried(run.model, {"states": torch.zeros(1, 2, 4, 12, 8)})
    assert results(run) != expected[3:]


def test_accumulated_parts_are_the_whole_step(tmp_path: Path) -> None:
    options = {"dropout": 0.0, "attention_dropout": 0.0}
    whole, parts = (_open(tmp_path / str(n), accumulate=n, **options) for n in (1, 3))
    for ours, theirs in zip(results(parts), results(whole), strict=True):
        assert ours[:2] == pytest.approx(theirs[:2], rel=1e-4)


def test_checkpoint_holds_the_memory(tmp_path: Path) -> None:
    run = _open(tmp_path / "run")
    results(run, 3)
    carried = {name: t for name, t in checkpoint.load(run.checkpoint_path).tensors.items() if name.startswith("carry")}
    assert {name: tensor.shape for name, tensor in carried.items()} == {"carry.states": (1, 2, 4, 12, 8)}
    assert torch.equal(carried["carry.states"], run.task.carried(run.model)["states"])
    with pytest.raises(CheckpointError, match="memory is 12 there and 13 here"):
        _open(tmp_path / "run", resume=True, memory=13)


def test_bfloat16_and_torchs_attention_train_and_resume(tmp_path: Path) -> None:
    for options in ({"dtype": "bfloat16"}, {"attention": "torch"}):
        folder = tmp_path / "".join(options)
        expected = results(_open(folder / "whole", **options))
        results(_open(folder / "parts", **options), 3)
        assert results(_open(folder / "parts", resume=True)) == expected[3:]
        assert all(math.isfinite(loss) for loss, *_ in expected)


def test_network_learns_what_only_the_steps_before_tell(tmp_path: Path) -> None:
    # Whether a letter has come once or twice is more than the one token of a step can show.
    source = tmp_path / "letters"
    source.write_text("aabb" * 100)
    settings = {"text": str(source), "context": 1, "steps": 200, "evaluate_every": 200, "lr": 0.02, "layers": 1}
    losses = {}
    for memory in (4, 0):
        run = _open(tmp_path / str(memory), **settings, dropout=0.0, attention_dropout=0.0, memory=memory)
        losses[memory] = results(run)[-1][0]
    assert losses[4] < 0.1
    assert losses[0] == pytest.approx(math.log(2), abs=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads: expected a divisor of width=128 without head_size, got 3"),
        ({"width": 127, "heads": 1}, "width: expected an even number"),
        ({"memory": -1}, "memory: expected a number from 0 to"),
        ({"memory": 0, "same_length": True}, "memory: expected at least 1 with same_length"),
        ({"clamp": 0}, "clamp: expected a number from 1 to"),
        ({"norm": "none"}, "norm: expected one of pre, post, got none"),
    ],
)
def test_settings_that_do_not_go_together_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pyattn.RangeError, match=message):
        TransformerXLSettings(**options)


def test_settings_reach_the_model() -> None:
    given = {"layers": 3, "heads": 3, "width": 10, "head_size": 5, "hidden": 7, "memory": 9, "clamp": 4}
    switches = {"same_length": True, "norm": "pre", "tie_biases": True, "attention": "torch"}
    dropout = {"dropout": 0.25, "attention_dropout": 0.5}
    expected = TransformerXLConfig(vocab=300, **given, **switches, **dropout, end=0)
    assert TransformerXLSettings(**given, **switches, **dropout).config(300) == expected
    assert TransformerXLSettings(tokens="characters").config(300).end is None
    assert TransformerXLSettings(width=64, heads=4).config(300).head_size == 16


def test_command_trains_resumes_and_writes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    output = command(
        *("train", "transformer-xl", "--text", argparse.__file__, "--layers", 1, "--width", 16, "--hidden", 16),
        *("--context", 16, "--memory", 24, "--batch", 4, "--vocab", 300, "--steps", 4, "--device", "cpu"),
        *("--sample-tokens", 7, "--out", out),
    )
    assert re.search(r"TransformerXL with [\d,]+ parameters and pyattn attention on cpu; .* 4 streams with 16", output)
    assert "step     4/4  validation" in output
    assert (out / "sample.txt").read_text("utf-8") in output
    command("train", "transformer-xl", "--out", out, "--resume", "--steps", 6, "--sample-tokens", 0)
    assert [line["step"] for line in metrics.read(out)] == [1, 2, 3, 4, 5, 6]
    assert load_file(out / "checkpoint.safetensors")["carry.states"].shape == (1, 1, 4, 24, 16)
    written = command(
        *("generate", "--model", out / "model", "--prompt", "def main", "--tokens", 40, "--temperature", 0),
        *("--device", "cpu"),
    )
    tokenizer = Tokenizer.from_file(str(out / "model" / "tokenizer.json"))
    prompt: Tensor = torch.tensor([tokenizer.encode("def main").ids])
    model = TransformerXL.from_pretrained(out / "model")
    (expected,) = generate(model, prompt, 40, sampling=GREEDY, end=model.config.end)
    assert written == "def main" + tokenizer.decode(expected) + "\n"
