"""`python -m benchmarks.seq2seq`: what it prints and writes, and that nothing wrong is timed."""

import json

import pytest

from pyattn.benchmarks import seq2seq
from pyattn.benchmarks.seq2seq import Case

CASES = (Case("training", "additive, fed", 3), Case("training", "Bahdanau", 3), Case("translation", "general", 5))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(seq2seq, "CASES", CASES)
    monkeypatch.setattr(seq2seq, "_SIZES", {"vocab": 20, "layers": 2, "width": 8, "hidden": 8, "context": 64})
    monkeypatch.setattr(seq2seq, "_BATCH", 2)


def test_seq2seq_benchmark_prints_ratios_and_writes_figures_and_picture(small, tmp_path, capsys):
    seq2seq.main(["--out", str(tmp_path), "--rounds", "1"])
    printed = capsys.readouterr().out
    for case in CASES:
        assert f"{case.label}: " in printed
    assert (tmp_path / "seq2seq.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (tmp_path / "seq2seq.jsonl").read_text().splitlines()]
    assert [line["peer"] for line in lines] == ["pyattn", "torch"] * len(CASES)
    assert all(line["tokens_per_second"] > 0 for line in lines)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_seq2seq_benchmark_times_nothing_wrong(small, monkeypatch, case):
    def other(*arguments: object) -> dict[str, seq2seq.Seq2Seq]:
        models = built(*arguments)
        models[seq2seq.OURS].output.weight.data.neg_()
        return models

    built = seq2seq.models
    monkeypatch.setattr(seq2seq, "models", other)
    with pytest.raises(AssertionError):
        seq2seq.measure(case, "cpu", 1)
