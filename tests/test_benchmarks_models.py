"""The benchmark of models: peers compute the same, and the files say what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pyattn.benchmarks import model_peers, models
from pyattn.benchmarks.model_peers import Generation, Training
from pyattn.models.bert import BertConfig
from pyattn.models.gpt import GPT, GPTConfig
from pyattn.models.xlnet import XLNetConfig

pytest.importorskip("transformers")

CASES = (
    Training("GPT-2 124M", 2, 16, "float32", 0.1), Training("BERT-base", 2, 16, "bfloat16", 0.0),
    Training("XLNet-base", 2, 16, "float32", 0.0),
)  # fmt: skip
TEXTS = (Generation(2, 1, "float32", prompt=9, new=5), Generation(1, 2, "float32", prompt=9, new=5))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published models, but small."""
    model_peers._trained.cache_clear()
    model_peers._writers.cache_clear()
    monkeypatch.setitem(model_peers.gpt.PUBLISHED, "gpt2", GPTConfig(layers=2, heads=2, width=16))
    monkeypatch.setitem(model_peers.bert.PUBLISHED, "bert-base", BertConfig(layers=2, heads=2, width=16, hidden=32))
    xlnet = XLNetConfig(layers=2, heads=2, width=16, hidden=32)
    monkeypatch.setitem(model_peers.xlnet.PUBLISHED, "xlnet-base-cased", xlnet)


def test_models_run_leaves_figures_of_every_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.TRAINING, "cpu", CASES)
    monkeypatch.setitem(models.GENERATION, "cpu", TEXTS)
    console = Console(width=200, record=True)
    groups = models.run(tmp_path, "cpu", console, rounds=2)
    files = [tmp_path / f"models-{kind}.jsonl" for kind in models.KINDS]
    lines = [json.loads(line) for path in files for line in path.read_text("utf-8").splitlines()]
    assert [line["peer"] for line in lines] == [row.peer for rows in groups for row in rows]
    trained = [line for line in lines if line["kind"] == "training"]
    assert {line["peer"] for line in trained} == {*model_peers.OURS.values(), *model_peers.THEIRS.values()}
    for line in lines:
        assert line["p50_ms"] > 0 and line["rounds"] == (2 if line in trained else 1) and line["tokens_per_second"] > 0
        assert {"device", "versions", "commit"} <= line.keys()
    assert all(0 < line["mfu"] < 1 for line in trained)
    assert all(line["same_texts"] for line in lines if line["kind"] == "generation")
    assert all(path.with_suffix(".png").read_bytes().startswith(b"\x89PNG") for path in files)
    text = console.export_text()
    assert {line["peer"] for line in trained if line["model"] == "XLNet-base"} == {"pyattn", "transformers eager"}
    assert "GPT-2 124M 2 x 16 float32 dropout" in text and "b1 beam 2 float32" in text


def test_models_peer_with_other_logits_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(model: GPT, tokens: Tensor) -> Tensor:
        return right(model, tokens) + 0.01

    right = GPT.forward
    monkeypatch.setattr(GPT, "forward", shifted)
    with pytest.raises(AssertionError, match="pyattn has other logits"):
        model_peers.training_steps(CASES[0], "cpu")


def test_models_step_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every peer's step moves its weights, by about as much."""
    moved = []
    original = model_peers._step

    def watched(model: torch.nn.Module, *rest: object) -> object:
        before = [p.detach().clone() for p in model.parameters()]
        step = original(model, *rest)
        step()
        moved.append(
            sum(float((p.detach() - old).abs().sum()) for p, old in zip(model.parameters(), before, strict=True))
        )
        return step

    monkeypatch.setattr(model_peers, "_step", watched)
    model_peers.training_steps(Training("GPT-2 124M", 2, 16, "float32", 0.0), "cpu")
    assert len(moved) == 4
    assert max(moved) == pytest.approx(min(moved), rel=0.05) and min(moved) > 0


def test_models_operations_of_a_step_are_those_that_torch_counts() -> None:
    """Of the peer that computes attention whole."""
    case = Training("GPT-2 124M", 2, 16, "float32", 0.0)
    step = model_peers.training_steps(case, "cpu")[model_peers.THEIRS["eager"]]
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == model_peers.step_operations(case)
