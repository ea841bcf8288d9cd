"""Scores of captioning models side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import captions as benchmark
from pyattn.check import RangeError
from pyattn.decoding.captions import Caption
from pyattn.models import CaptionConfig, ShowAttendTell
from pyattn.training.scene_captions import captions
from pyattn.training.scene_scores import held_back
from pyattn.training.translation import learn_tokenizer


def _told(texts: list[str]) -> list[Caption]:
    return [Caption(text, 0.0, text.split(), torch.full((len(text.split()), 64), 1 / 64)) for text in texts]


def test_right_captions_have_every_point_and_looks_everywhere_the_area() -> None:
    scenes = held_back(20, held_out=False)
    name, right, parsed, inside, _, area, bleu = benchmark.row(
        "x", _told([captions(each)[0] for each in scenes]), scenes
    )
    assert (name, right, parsed, bleu) == ("x", "100.0", "100.0", "100.0")
    assert inside == area
    wrong = benchmark.row("x", _told(["no caption at all"] * 20), scenes)
    assert wrong[1:3] == ["0.0", "0.0"] and float(wrong[-1]) < 10


def test_the_picture_is_of_a_scene_with_much_in_it() -> None:
    scenes = held_back(50, held_out=False)
    chosen = scenes[benchmark.shown(scenes)]
    assert len(chosen.objects) == 4 and len(chosen.kinds) == 2


@pytest.mark.usefixtures("one_thread")
def test_models_are_shown_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = learn_tokenizer([line for each in held_back(100, held_out=False) for line in captions(each)], 450)
    for name in ("soft", "hard"):
        config = CaptionConfig(vocab=450, width=16, hidden=16, grid_size=16, score_size=16, hard=name == "hard")
        ShowAttendTell(config).save_pretrained(tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    given = [f"{name}={tmp_path / name}" for name in ("soft", "hard")]
    benchmark.main(["--scenes", "3", "--out", str(tmp_path / "out"), *given])
    printed = capsys.readouterr().out
    assert "held-out pairs" in printed and printed.count("soft") == printed.count("hard") == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["hard.png", "soft.png"]
    with pytest.raises(RangeError, match="models: expected NAME=FOLDER, got x"):
        benchmark.main(["x"])
