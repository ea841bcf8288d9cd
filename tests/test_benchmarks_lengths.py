"""BLEU over the length of sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import lengths
from pyattn.training.text import TextError


def test_groups_rise_in_length_and_keep_those_of_one_length_together() -> None:
    sources = ["w " * size for size in (9, 1, 1, 1, 1, 5, 6, 7, 2, 8)]
    found = lengths.groups(sources, 3)
    assert found == [[1, 2, 3, 4], [8, 5, 6, 7], [9, 0]]
    assert lengths.groups(["a b"] * 5, 3) == [[0, 1, 2, 3, 4]]


def test_picture_shows_a_line_for_each_system(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = ["ein Wort " * size for size in range(1, 31)]
    references = ["one good word of many " * size for size in range(1, 31)]
    for name, written in (("source", sources), ("reference", references), ("bad", ["no " * 9] * 30)):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in written))
    given = ["--source", f"{tmp_path}/source", "--reference", f"{tmp_path}/reference", "--out", f"{tmp_path}/x.png"]
    lengths.main([*given, f"right={tmp_path}/reference", f"wrong={tmp_path}/bad"])
    printed = capsys.readouterr().out
    assert "100.0" in printed and "0.0" in printed and "2 to 10" in printed
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "bad").write_text("no\n")
    with pytest.raises(TextError, match="expected as many lines as source and reference, got 30, 30 and 1"):
        lengths.main([*given, f"wrong={tmp_path}/bad"])
