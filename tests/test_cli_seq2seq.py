"""`pyattn train seq2seq` and what `pyattn translate` makes of it: alignments in pictures, and where they say no."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from pyattn.cli import app
from pyattn.decoding.pictures import draw_alignment
from pyattn.training import metrics

LINES = 40


def _run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def _assert_refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert re.search(message, result.stderr), result.stderr
    assert result.stderr.startswith("pyattn: ") and "Traceback" not in result.output


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    folder = tmp_path_factory.mktemp("text")
    source, target = folder / "train.de", folder / "train.en"
    source.write_text("".join(f"das Haus {i} ist alt\n" for i in range(LINES)))
    target.write_text("".join(f"house {i} is old\n" for i in range(LINES)))
    return ["--source", source, "--target", target]


def _train(files: list[object], out: Path, *options: object) -> Path:
    sizes = ("--width", 16, "--hidden", 16, "--vocab", 300, "--max-tokens", 200, "--device", "cpu")
    result = _run("train", "seq2seq", *files, *sizes, "--out", out, "--steps", 2, *options)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def trained(files: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _train(files, tmp_path_factory.mktemp("trained"), "--score", "additive", "--feed")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"order": "luong", "score": "general", "readout": "tanh", "bridge": "copy", "tied": True}),
        (
            ["--order", "bahdanau", "--cell", "gru"],
            {"order": "bahdanau", "score": "additive", "readout": "maxout", "bridge": "backward", "cell": "gru"},
        ),
        (["--no-attention"], {"score": None, "uses": None}),
        (["--uses", "layer,readout", "--layers", 2], {"uses": ["layer", "readout"], "layers": 2}),
        (["--window", "monotonic", "--window-size", 3], {"window": "monotonic", "window_size": 3, "score": "general"}),
        (["--window", "predictive", "--order", "bahdanau"], {"window": "predictive", "window_size": None}),
        (["--hard", "--entropy", "0.1"], {"hard": True, "temperature": None}),
        (["--hard", "--temperature", "0.5"], {"hard": True, "temperature": 0.5}),
        (["--no-bidirectional", "--reverse", "--order", "bahdanau"], {"bridge": "copy", "reverse": True}),
    ],
)
def test_options_are_the_models(files: list[object], tmp_path: Path, options: list[object], expected: dict) -> None:
    out = _train(files, tmp_path / "run", *options)
    config = json.loads((out / "model" / "config.json").read_text("utf-8"))
    assert {name: config[name] for name in expected} == expected


def test_a_run_goes_on_to_the_bit(files: list[object], tmp_path: Path) -> None:
    same = ("--dropout", 0.3, "--schedule", "constant", "--warmup", 1)
    whole, cut = (_train(files, tmp_path / str(steps), "--steps", steps, *same) for steps in (4, 2))
    assert _run("train", "seq2seq", "--out", cut, "--resume", "--steps", 4).exit_code == 0
    losses = [[line["loss"] for line in metrics.read(out)] for out in (whole, cut)]
    assert losses[0] == losses[1]
    _assert_refused(_run("train", "seq2seq", "--out", cut, "--resume", "--cell", "gru"), "cell is lstm there and gru")


@pytest.mark.parametrize("options", [["--window", "predictive", "--window-size", 2], ["--hard", "--feed"]], ids=str)
def test_beams_look_where_the_model_does(files: list[object], tmp_path: Path, options: list[object]) -> None:
    out = _train(files, tmp_path / "run", *options)
    translate = "translate", "--model", out / "model", "--beams", 3, "--pictures", tmp_path / "pictures"
    result = _run(*translate, stdin="das Haus 3 ist alt\ndas Haus\n")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"1.png", "2.png"}


def test_translations_come_with_pictures_of_their_alignment(trained: Path, tmp_path: Path) -> None:
    lines = "das Haus 3 ist alt\n\ndas Haus 4 ist alt\n"
    result = _run("translate", "--model", trained / "model", "--pictures", tmp_path / "pictures", stdin=lines)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 3
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"1.png", "3.png"}  # the second line is empty
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "pictures").iterdir())


def test_picture_of_a_translation_that_never_ended(files: list[object], tmp_path: Path) -> None:
    """An untrained model goes on to the last token that its context has room for."""
    out = _train(files, tmp_path / "run", "--context", 12, "--lr", 1e-12)
    translate = "translate", "--model", out / "model", "--beams", 1, "--pictures", tmp_path / "pictures"
    result = _run(*translate, stdin="das Haus\n")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "pictures" / "1.png").exists()


@pytest.mark.parametrize("word", ["$$", "$x$", "$\\frac$", "\0", "a\tb"])
@pytest.mark.filterwarnings("error")
def test_picture_shows_any_word_as_it_is(tmp_path: Path, word: str) -> None:
    draw_alignment(tmp_path / "x.png", torch.rand(2, 1), [word], ["a", word])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_references_of_another_count_are_refused_before_the_work(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "source").write_text("das Haus\n" * 3)
    (tmp_path / "reference").write_text("house\n" * 2)
    options = "--source", tmp_path / "source", "--reference", tmp_path / "reference", "--out", tmp_path / "out"
    result = _run("translate", "--model", trained / "model", *options)
    _assert_refused(result, rf"reference: expected 3 lines, as {tmp_path}/source has, {tmp_path}/reference has 2")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["source", "reference"])
def test_file_that_is_not_there_is_named_by_its_option(trained: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "lines").write_text("a\n")
    paths = {"source": tmp_path / "lines", "reference": tmp_path / "lines"} | {name: tmp_path / "none"}
    options = [part for option, path in paths.items() for part in (f"--{option}", path)]
    _assert_refused(_run("translate", "--model", trained / "model", *options), f"{name}: expected a file, .* does not")


def test_pictures_are_refused_without_attention(files: list[object], tmp_path: Path) -> None:
    out = _train(files, tmp_path / "run", "--no-attention")
    translate = ("translate", "--model", out / "model")
    assert _run(*translate, stdin="das Haus\n").exit_code == 0
    _assert_refused(
        _run(*translate, "--pictures", tmp_path / "p", stdin="das Haus\n"), "pictures: expected a recurrent"
    )
    assert not (tmp_path / "p").exists()


def test_a_source_that_is_too_long_is_named_by_its_line(trained: Path) -> None:
    lines = "das Haus\n" + "1 2 3 4 " * 100 + "\n"
    _assert_refused(
        _run("translate", "--model", trained / "model", stdin=lines),
        r"standard input, line 2: expected at most context=256 tokens",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no-attention", "--score", "dot"], "score: expected none with --no-attention, got dot"),
        (["--score", "hard"], "score: expected one of dot, scaled, general"),
        (["--order", "chorowski"], "order: expected one of luong, bahdanau"),
        (["--uses", "input"], "uses: expected order=bahdanau for input"),
        (["--uses", "head"], "uses: expected names out of input, layer, readout"),
        (["--width", "32"], "tied: expected a readout of width=32 columns, got 16"),
        (["--window", "local"], "window: expected one of monotonic, predictive, renormalized, got local"),
        (["--window", "predictive", "--no-attention"], "window: expected a score beside it, got predictive without"),
        (["--window-size", 4], "window_size: expected None without a window, got 4"),
        (["--hard", "--window", "monotonic"], "hard: expected no window beside it, got monotonic"),
        (["--hard", "--no-attention"], "hard: expected a score beside it"),
        (["--temperature", "1"], "temperature: expected None without hard attention, got 1"),
        (["--hard", "--temperature", "1", "--entropy", "0.1"], "entropy: expected --hard beside it, without --temp"),
        (["--reinforce", "1"], "reinforce: expected --hard beside it"),
        (["--cell", "tree"], "cell: expected one of lstm, gru, rnn"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    files: list[object], tmp_path: Path, options: list[object], message: str
) -> None:
    sizes = ("--width", 16, "--hidden", 16, "--vocab", 300)
    _assert_refused(_run("train", "seq2seq", *files, *sizes, "--out", tmp_path / "run", *options), message)
    assert not (tmp_path / "run").exists()
