"""Language modelling from one step to the next: streams, the states that steps leave, and runs that go on with them."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stream_runs import command, open_on_text, results
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.nn import functional as F

import pyattn
from pyattn.models.rnn import RNNLM, RNNConfig
from pyattn.training import checkpoint, metrics
from pyattn.training.checkpoint import CheckpointError
from pyattn.training.language import Corpus, LanguageTask, windows
from pyattn.training.loop import evaluate
from pyattn.training.recipes import GPTSettings, XLNetSettings
from pyattn.training.recurrent_recipes import RNNSettings
from pyattn.training.run import Run
from pyattn.training.streams import StreamTask
from pyattn.training.task import micro_batches

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB = 11
# 4 streams of 8 tokens a step; the text of 160 characters is 4 steps long.
TINY = {
    "tokens": "characters", "layers": 2, "width": 8, "hidden": 12, "context": 8, "batch": 4, "steps": 10, "lr": 1e-2,
    "dropout": 0.3, "validation_tokens": 24, "evaluate_every": 5,
}  # fmt: skip
# 4 streams that go on by 8 tokens a step; the text is 3 steps long.
XLNET = {
    "tokens": "characters", "layers": 2, "heads": 2, "width": 8, "hidden": 12, "context": 16, "memory": 12, "batch": 4,
    "steps": 8, "lr": 1e-2, "dropout": 0.2, "validation_tokens": 24, "evaluate_every": 4,
}  # fmt: skip


def _corpus(training: int, validation: int = 200) -> Corpus:
    drawn = torch.randint(VOCAB, (training + validation,), generator=torch.Generator().manual_seed(0)).int()
    return Corpus(drawn[:training], drawn[training:], Tokenizer(models.BPE()), "")


def _task(training: int = 100, validation: int = 200, **options: int) -> StreamTask:
    return StreamTask(_corpus(training, validation), **({"batch": 3, "context": 5, "validation_tokens": 90} | options))


def _model(cell: str = "lstm") -> RNNLM:
    torch.manual_seed(0)
    return RNNLM(RNNConfig(vocab=VOCAB, width=6, hidden=7, layers=2, cell=cell)).double()


def _open(folder: Path, resume: bool = False, **given: Any) -> Run:
    return open_on_text(folder, RNNSettings, TINY, resume, **given)


def _step(task: StreamTask, step: int, parts: int = 1) -> list[Any]:
    return micro_batches(task, step, parts)


def test_each_stream_reads_its_own_part_of_the_text_in_order() -> None:
    task = _task(100)  # streams of 33 tokens: 6 steps of 5, and 3 tokens that fill no step
    assert task.steps_per_epoch == 6
    batches = [_step(task, step)[0] for step in range(1, 7)]
    for stream, row in enumerate(torch.cat([batch.inputs for batch in batches], 1)):
        assert torch.equal(row, task.corpus.train[33 * stream :][:30].long())
    for stream, row in enumerate(torch.cat([batch.targets for batch in batches], 1)):
        assert torch.equal(row, task.corpus.train[33 * stream + 1 :][:30].long())


def test_step_reads_what_its_number_says_and_epochs_are_alike() -> None:
    task = _task(100)
    first, again = (_step(task, step)[0] for step in (2, 2 + task.steps_per_epoch))
    assert all(map(torch.equal, first, again))
    begins = [_step(task, step)[0].begins.tolist() for step in range(1, 9)]
    assert begins == [[step in (1, 7)] * 3 for step in range(1, 9)]


@pytest.mark.parametrize("length", [16, 30, 31, 32])
def test_shortest_texts_fill_a_step(length: int) -> None:
    task = _task(length)
    assert task.steps_per_epoch == (length - 1) // 3 // 5
    (batch,) = _step(task, task.steps_per_epoch)
    assert batch.inputs.shape == (3, 5)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("parts", [1, 2])
def test_steps_read_a_stream_as_if_at_once_and_an_epoch_begins_anew(cell: str, parts: int) -> None:
    task, model = _task(100), _model(cell)
    losses = []
    with torch.no_grad():
        for step in range(1, 9):
            losses.append(sum(task.losses(model, batch, 0.0)["loss"].item() for batch in _step(task, step, parts)))
        inputs, targets = windows(task.corpus.train, torch.arange(3) * 33, 30)
        each = F.cross_entropy(model(inputs).transpose(1, 2).float(), targets, reduction="none")
    expected = each.view(3, 6, 5).sum((0, 2)).tolist()
    assert losses == pytest.approx(expected + expected[:2], rel=1e-6)


def test_gradients_end_where_a_step_begins() -> None:
    task, model = _task(100), _model()
    (first,), (second,) = _step(task, 1), _step(task, 2)
    task.losses(model, first, 0.0)["loss"].backward()
    model.zero_grad()
    task.losses(model, second, 0.0)["loss"].backward()
    ours = [parameter.grad for parameter in model.parameters()]
    with torch.no_grad():
        _, state = model(first.inputs, state=model.initial(3))
    logits, _ = model(second.inputs, state=state)
    loss = F.cross_entropy(logits.float().flatten(0, 1), second.targets.flatten(), reduction="sum")
    theirs = torch.autograd.grad(loss, list(model.parameters()))
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_parts_of_a_step_leave_the_states_of_their_own_streams() -> None:
    whole, parts, model = _task(100), _task(100), _model()
    with torch.no_grad():
        for step in (1, 2):
            for task, count in ((whole, 1), (parts, 2)):
                for batch in _step(task, step, count):
                    task.losses(model, batch, 0.0)
    torch.testing.assert_close(parts.carried(model), whole.carried(model), rtol=1e-12, atol=1e-12)
    assert whole.carried(model)["states"].shape == (2, 2, 3, 7)
    assert not whole.carried(model)["states"].requires_grad


@pytest.mark.parametrize(
    ("validation", "tokens", "rows", "length"),
    [(200, 90, 2, 45), (200, 39, 1, 35), (200, 40, 1, 40), (200, 1, 1, 5), (200, 1000, 3, 65), (6, 90, 1, 5)],
)
def test_held_out_text_is_few_long_rows(validation: int, tokens: int, rows: int, length: int) -> None:
    task = _task(100, validation, validation_tokens=tokens)
    (held_out,) = task.validation()
    assert held_out.inputs.shape == (rows, length)
    assert torch.equal(held_out.inputs[0], task.corpus.validation[:length].long())
    if rows > 1:
        assert torch.equal(held_out.targets[-1], task.corpus.validation[-length:].long())
    assert torch.equal(held_out.inputs[:, 1:], held_out.targets[:, :-1])


class Watched(nn.Module):
    """A model that notes how many tokens it is given at once."""

    def __init__(self, model: RNNLM) -> None:
        super().__init__()
        self.model = model
        self.lengths: list[int] = []

    def initial(self, rows: int) -> Tensor:
        return self.model.initial(rows)

    def forward(self, tokens: Tensor, *, state: Tensor) -> tuple[Tensor, Tensor]:
        self.lengths.append(tokens.shape[1])
        return self.model(tokens, state=state)


def test_evaluation_reads_rows_in_segments_as_if_at_once() -> None:
    task, model = _task(), _model()
    watched = Watched(model)
    (held_out,) = task.validation()
    found = evaluate(watched, task, [held_out], torch.float32)
    assert watched.lengths == [5] * 9
    with torch.no_grad():
        expected = F.cross_entropy(model(held_out.inputs).flatten(0, 1), held_out.targets.flatten())
    assert found == {"loss": pytest.approx(expected.item(), rel=1e-6)}


def test_evaluation_leaves_the_streams_alone(tmp_path: Path) -> None:
    often = [result[:2] for result in results(_open(tmp_path / "a", evaluate_every=1))]
    assert often == [result[:2] for result in results(_open(tmp_path / "b", evaluate_every=100))]


class Memory(nn.Module):
    """A model whose state is its last inputs' vectors, [1, 1, b, kept, width]: one dimension more than a network's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 4)
        self.readout = nn.Linear(4, VOCAB)

    def initial(self, rows: int) -> Tensor:
        return torch.zeros(1, 1, rows, 3, 4)

    def forward(self, tokens: Tensor, *, state: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens)
        return self.readout(x + state[0, 0].mean(1, keepdim=True)), x[:, -3:].view(1, 1, -1, 3, 4)


def test_states_may_have_more_dimensions() -> None:
    task, model = _task(100), Memory()
    with torch.no_grad():
        for step in range(1, 8):
            for batch in _step(task, step, 2):
                task.losses(model, batch, 0.0)
    last = model.embedding(_step(task, 7)[0].inputs[:, -3:])
    assert torch.equal(task.carried(model)["states"][0, 0], last)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("last", [1, 3, 4, 5, 9])
def test_resumed_run_equals_uninterrupted_bitwise(tmp_path: Path, last: int, accumulate: int) -> None:
    whole = _open(tmp_path / "whole", accumulate=accumulate)
    assert whole.task.steps_per_epoch == 4
    expected = results(whole)
    found = results(_open(tmp_path / "parts", accumulate=accumulate), last)
    torch.manual_seed(999)
    second = _open(tmp_path / "parts", resume=True)
    assert found + results(second) == expected
    ours, theirs = (run.model.state_dict() | run.task.carried(run.model) for run in (second, whole))
    assert ours["states"].any()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("last", [1, 3, 4, 7])
def test_resumed_xlnet_equals_uninterrupted_bitwise(tmp_path: Path, last: int, options: dict[str, Any]) -> None:
    whole = open_on_text(tmp_path / "whole", XLNetSettings, XLNET, False, **options)
    assert whole.task.steps_per_epoch == 3
    expected = results(whole)
    found = results(open_on_text(tmp_path / "parts", XLNetSettings, XLNET, False, **options), last)
    torch.manual_seed(999)
    second = open_on_text(tmp_path / "parts", XLNetSettings, XLNET, True)
    assert found + results(second) == expected
    ours, theirs = (run.model.state_dict() | run.task.carried(run.model) for run in (second, whole))
    assert ours["states"].shape == (1, 2, 4, 12, 8) and ours["states"].any()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_resumed_xlnet_needs_the_memory_of_its_checkpoint(tmp_path: Path) -> None:
    """A run that went on with another memory would not be the same."""
    expected = results(open_on_text(tmp_path / "whole", XLNetSettings, XLNET, False))
    results(open_on_text(tmp_path / "parts", XLNetSettings, XLNET, False), 2)
    run = open_on_text(tmp_path / "parts", XLNetSettings, XLNET, True)
    run.task.restore_carried(run.model, {"states": torch.zeros(1, 2, 4, 12, 8)})
    assert results(run) != expected[2:]


def test_accumulated_parts_are_the_whole_step(tmp_path: Path) -> None:
    whole, parts = (_open(tmp_path / str(n), accumulate=n, dropout=0.0) for n in (1, 3))
    for ours, theirs in zip(results(parts), results(whole), strict=True):
        assert ours[:2] == pytest.approx(theirs[:2], rel=1e-4)


def test_accumulated_parts_of_xlnet_are_the_whole_step(tmp_path: Path) -> None:
    whole, parts = (
        open_on_text(tmp_path / str(n), XLNetSettings, XLNET, False, accumulate=n, dropout=0.0) for n in (1, 3)
    )
    for ours, theirs in zip(results(parts), results(whole), strict=True):
        assert ours[:2] == pytest.approx(theirs[:2], rel=1e-4)


def test_checkpoint_holds_states_of_streams_and_nothing_of_other_tasks(tmp_path: Path) -> None:
    run = _open(tmp_path / "rnn")
    results(run, 3)
    carried = {name: t for name, t in checkpoint.load(run.checkpoint_path).tensors.items() if name.startswith("carry")}
    assert carried.keys() == {"carry.states"}
    assert torch.equal(carried["carry.states"], run.task.carried(run.model)["states"])
    without = _open(tmp_path / "windows", stateful=False)
    assert isinstance(without.task, LanguageTask)
    small = {"layers": 1, "heads": 1, "width": 8, "context": 8, "vocab": 300, "attention": "torch", "steps": 3}
    gpt = Run(tmp_path / "gpt", GPTSettings(text=argparse.__file__, **small), "cpu")
    for other in (without, gpt):
        results(other, 3)
        assert not [name for name in checkpoint.load(other.checkpoint_path).tensors if name.startswith("carry")]
    assert len(results(_open(tmp_path / "windows", resume=True))) == 7


@pytest.mark.parametrize(
    ("carried", "message"),
    [
        ({}, r"carry.states is missing there and float32 \[2, 2, 4, 12\] here"),
        ({"states": torch.zeros(2, 2, 5, 12)}, r"carry.states is float32 \[2, 2, 5, 12\] there"),
        ({"states": torch.zeros(2, 2, 4, 13)}, r"carry.states is float32 \[2, 2, 4, 13\] there"),
        ({"states": torch.zeros(2, 2, 4, 12), "more": torch.zeros(1)}, "it also has carry.more"),
    ],
)
def test_states_that_do_not_fit_are_refused(tmp_path: Path, carried: dict[str, Tensor], message: str) -> None:
    run = _open(tmp_path / "run")
    results(run, 3)
    path = run.checkpoint_path
    saved = checkpoint.load(path)
    kept = {name: tensor for name, tensor in saved.tensors.items() if not name.startswith("carry.")}
    tensors = kept | {f"carry.{name}": tensor for name, tensor in carried.items()}
    save_file(tensors, path, metadata={"format": checkpoint.FORMAT, "meta": json.dumps(saved.meta)})
    with pytest.raises(CheckpointError, match=message):
        _open(tmp_path / "run", resume=True)


def test_states_where_none_are_carried_are_refused(tmp_path: Path) -> None:
    run = _open(tmp_path / "run", stateful=False)
    results(run, 3)
    saved = checkpoint.load(run.checkpoint_path)
    header = {"format": checkpoint.FORMAT, "meta": json.dumps(saved.meta)}
    save_file(saved.tensors | {"carry.states": torch.zeros(1)}, run.checkpoint_path, metadata=header)
    with pytest.raises(CheckpointError, match=r"it also has carry\.states"):
        _open(tmp_path / "run", resume=True)


def test_network_learns_what_only_the_step_before_tells(tmp_path: Path) -> None:
    # Whether a letter has come once or twice is more than the one token of a step can show.
    source = tmp_path / "letters"
    source.write_text("aabb" * 100)
    settings = {"text": str(source), "context": 1, "steps": 200, "dropout": 0.0, "evaluate_every": 200, "lr": 0.02}
    losses = {}
    for stateful in (True, False):
        run = _open(tmp_path / str(stateful), **settings, stateful=stateful)
        losses[stateful] = results(run)[-1][0]
    assert losses[True] < 0.1
    assert losses[False] == pytest.approx(math.log(2), abs=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell": "mamba"}, "cell: expected one of lstm, gru, rnn, got mamba"),
        ({"tied": True}, "tied: expected width and hidden of one size"),
        ({"tagged": "a", "labelled": "b"}, "labelled: expected one source of data, got --tagged and --labelled"),
        ({"text": "a", "tagged": "b"}, "tagged: expected one source of data, got --text and --tagged"),
        ({"hidden": 0}, "hidden: expected a number from 1 to 1048576"),
    ],
)
def test_settings_that_do_not_go_together_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pyattn.RangeError, match=message):
        RNNSettings(**options)


def test_command_trains_resumes_and_writes(tmp_path: Path) -> None:
    options: Sequence[object] = (
        *("--text", argparse.__file__, "--layers", 1, "--width", 16, "--hidden", 16, "--context", 16, "--batch", 4),
        *("--vocab", 300, "--steps", 4, "--device", "cpu"),
    )
    out = tmp_path / "run"
    output = command("train", "rnn", *options, "--sample-tokens", 7, "--out", out)
    assert re.search(r"RNNLM with [\d,]+ parameters on cpu; .* 4 streams with 16 tokens of each in a step", output)
    assert "step     4/4  validation" in output
    assert (out / "sample.txt").read_text("utf-8") in output
    command("train", "rnn", "--out", out, "--resume", "--steps", 6, "--sample-tokens", 0)
    assert [line["step"] for line in metrics.read(out)] == [1, 2, 3, 4, 5, 6]
    assert load_file(out / "checkpoint.safetensors")["carry.states"].shape == (2, 1, 4, 16)
    attending = command("train", "rnn", *options, "--self-attention", "--out", tmp_path / "a", "--sample-tokens", 0)
    assert "parameters and pyattn attention on cpu" in attending
