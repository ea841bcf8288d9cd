"""`python -m benchmarks.additive`: what it prints and writes, and that nothing wrong is timed."""

import json

import pytest
import torch

from pyattn.benchmarks import additive
from pyattn.benchmarks.additive import Case

CASES = (
    Case(1, 6, 9, 8, torch.float32, False),
    Case(1, 6, 9, 8, torch.float32, True),
    Case(2, 1, 9, 16, torch.bfloat16, False),
)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(additive, "CASES", CASES)
    monkeypatch.setattr(additive, "GROWTH", (Case(1, 8, 8, 4, torch.float32, True),))


def test_additive_benchmark_prints_ratios_and_writes_figures_and_picture(small, tmp_path, capsys):
    additive.main(["--out", str(tmp_path), "--rounds", "1"])
    printed = capsys.readouterr().out
    assert "b1 6 x 9 a8 forward + backward, float32" in printed
    assert "peak memory of pyattn" in printed and "8 x 8" in printed
    assert (tmp_path / "additive.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (tmp_path / "additive.jsonl").read_text().splitlines()]
    assert {line["peer"] for line in lines if "peer" in line} == {"pyattn", "torch", "torch.compile"}
    assert all(line["commit"] is None or len(line["commit"]) >= 7 for line in lines)


def test_additive_benchmark_times_nothing_wrong(small, monkeypatch):
    monkeypatch.setattr(
        additive.pyattn, "additive_attention", lambda q, k, v, weight, **_: v[:, :, : q.shape[2]] * 1.001
    )
    with pytest.raises(AssertionError, match="b1 6 x 9 a8: out: largest error"):
        additive.measure(CASES[0], "cpu", 1)
