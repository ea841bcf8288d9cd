"""`python -m benchmarks.relative`: what it prints and writes, and that nothing wrong is timed."""

import json

import pytest

from pyattn.benchmarks import relative

pytest.importorskip("transformers")
CASES = (relative.Case(1, 2, 6, 8), relative.Case(2, 2, 9, 8))


def test_relative_benchmark_prints_ratios_and_writes_figures_and_picture(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(relative, "CASES", CASES)
    relative.main(["--out", str(tmp_path), "--rounds", "1"])
    assert "b2 h2 9 d8" in capsys.readouterr().out
    assert (tmp_path / "relative.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (tmp_path / "relative.jsonl").read_text().splitlines()]
    assert {line["peer"] for line in lines} == {"pyattn", "transformers", "pyattn without distances"}


def test_relative_benchmark_times_nothing_wrong(monkeypatch):
    monkeypatch.setattr(relative.pyattn, "relative_attention", lambda q, k, v, *_: v * 1.001)
    with pytest.raises(AssertionError, match="b1 h2 6 d8: out: largest error"):
        relative.measure(CASES[0], "cpu", 1)
