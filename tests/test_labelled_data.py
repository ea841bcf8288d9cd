"""Words with tags, texts with labels: reading, batches, losses and accuracy, and all that can be wrong with a file."""

from __future__ import annotations

import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from typer.testing import CliRunner

import pyattn
from pyattn.cli import app
from pyattn.models.rnn import RNNConfig, RNNForSequenceClassification, RNNForTokenClassification
from pyattn.training import metrics
from pyattn.training.checkpoint import CheckpointError
from pyattn.training.labelled import LabelTask, load_labelled, predict, read_labelled, read_tagged
from pyattn.training.recurrent_recipes import RNNSettings
from pyattn.training.run import Run, open_run
from pyattn.training.text import TextError

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["Anna", "Rom", "läuft", "e\u0301", "don't", "日本", "New York"]
SMALL = {"layers": 1, "width": 16, "hidden": 16, "vocab": 300, "batch": 16, "lr": 1e-2}


def _sentences(count: int) -> list[list[tuple[str, str]]]:
    """A word is BEFORE if Anna or Rom comes next, else OTHER: what only the word behind it tells."""
    generator = random.Random(0)
    drawn = [generator.choices(WORDS, k=generator.randint(1, 6)) for _ in range(count)]
    following = [zip(words, [*words[1:], ""], strict=True) for words in drawn]
    return [[(word, "BEFORE" if after in WORDS[:2] else "OTHER") for word, after in pairs] for pairs in following]


def _tagged(folder: Path, count: int = 60) -> Path:
    lines = ["".join(f"{word}\t{tag}\n" for word, tag in sentence) for sentence in _sentences(count)]
    (folder / "tagged").write_text("\n".join(lines), encoding="utf-8")
    return folder / "tagged"


def _labelled(folder: Path, count: int = 60) -> Path:
    generator = random.Random(0)
    lines = [f"{generator.choice(('bad', 'good', 'dull'))}\t{i} words" for i in range(count)]
    texts = [line + f" that are {line.split()[0]} .\n" for line in lines]
    (folder / "labelled").write_text("".join(texts), encoding="utf-8")
    return folder / "labelled"


def _task(folder: Path, by_word: bool = True, count: int = 60, batch: int = 16, seed: int = 0) -> LabelTask:
    source = (_tagged if by_word else _labelled)(folder, count)
    return LabelTask(load_labelled(source, by_word=by_word, vocab=300, cache=folder / "cache"), batch=batch, seed=seed)


def _open(folder: Path, resume: bool = False, **given: Any) -> Run:
    return open_run(folder, RNNSettings, SMALL | given, set(given), "cpu", resume=resume, overwrite=False)


def _rows(task: LabelTask, step: int) -> list[tuple[tuple[int, ...], ...]]:
    return [tuple(tuple(side.tolist()) for side in example) for example in task.examples(step)]


def test_sentences_are_read_with_their_tags(tmp_path: Path) -> None:
    read = read_tagged(_tagged(tmp_path), "tagged")
    assert [list(zip(*example, strict=True)) for example in read] == _sentences(60)
    (tmp_path / "more").write_text("\n\n a \tX\r\n \nb\t Y\n\n\n\nc\tZ")
    assert read_tagged(tmp_path / "more", "tagged") == [(["a"], ["X"]), (["b"], ["Y"]), (["c"], ["Z"])]


def test_texts_are_read_with_their_labels(tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("good\tIt is.\nvery bad\tIt\tis  not. \n")
    assert read_labelled(tmp_path / "texts", "labelled") == [
        (["It is."], ["good"]),
        (["It\tis  not."], ["very bad"]),
    ]


def test_each_word_has_its_own_tokens_and_a_label_at_the_first(tmp_path: Path) -> None:
    task = _task(tmp_path)
    corpus, sentences = task.corpus, _sentences(60)
    assert corpus.labels == ("BEFORE", "OTHER")
    found = []
    for tokens, places, labels in (corpus.train.example(i) for i in range(len(corpus.train))):
        bounds = [*places.tolist(), len(tokens)]
        words = [corpus.tokenizer.decode(tokens[a:b].tolist()) for a, b in pairwise(bounds)]
        found.append([(word[1:], corpus.labels[label]) for word, label in zip(words, labels.tolist(), strict=True)])
        assert all(word.startswith(" ") for word in words)
    assert len(found) == 57
    assert all(sentence in sentences for sentence in found)


@pytest.mark.parametrize("by_word", [True, False])
def test_epoch_has_every_example_once_and_none_that_is_held_out(tmp_path: Path, by_word: bool) -> None:
    task = _task(tmp_path, by_word, count=100)
    assert task.steps_per_epoch == 6
    train, validation = (
        sorted(tuple(tuple(side.tolist()) for side in part.example(i)) for i in range(len(part)))
        for part in (task.corpus.train, task.corpus.validation)
    )
    assert (len(train), len(validation)) == (95, 5)
    orders = []
    for epoch in range(2):
        steps = [_rows(task, epoch * 6 + step) for step in range(1, 7)]
        assert [len(step) for step in steps] == [16] * 5 + [15]
        orders.append([row for step in steps for row in step])
        assert sorted(orders[-1]) == train
    assert orders[0] != orders[1]
    assert _rows(_task(tmp_path, by_word, 100), 9) == _rows(task, 9) != _rows(_task(tmp_path, by_word, 100, seed=1), 9)


def _model(task: LabelTask) -> torch.nn.Module:
    torch.manual_seed(0)
    kind = RNNForTokenClassification if task.corpus.by_word else RNNForSequenceClassification
    names = task.corpus.labels
    sizes = {"vocab": task.tokenizer.get_vocab_size(), "width": 8, "hidden": 8, "layers": 1}
    return kind(RNNConfig(**sizes, bidirectional=True, labels=len(names), label_names=names)).double()


@pytest.mark.parametrize("by_word", [True, False])
def test_losses_and_accuracy_are_of_each_label_alone(tmp_path: Path, by_word: bool) -> None:
    task = _task(tmp_path, by_word)
    model = _model(task)
    examples = task.examples(1)
    loss = right = count = 0
    for tokens, places, labels in examples:  # one at a time, without padding
        logits = model(tokens[None])[0]
        for place, label in zip(places.tolist(), labels.tolist(), strict=True):
            chosen = logits[place] if by_word else logits
            loss += F.cross_entropy(chosen, torch.tensor(label))
            right += int(chosen.argmax() == label)
            count += 1
    batch = task.collate(examples)
    found = task.losses(model, batch, 0.0)
    assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert found["accuracy"].item() == right
    assert task.counts(batch) == {"loss": count, "accuracy": count}
    assert task.size(batch) == sum(len(tokens) for tokens, *_ in examples)


def test_accuracy_is_shown_beside_its_baseline_and_no_part_of_the_loss(tmp_path: Path) -> None:
    run = _open(tmp_path / "run", tagged=str(_tagged(tmp_path)), steps=3, evaluate_every=3)
    (batch,) = run.task.validation()
    steps = list(run.steps())
    run.model.eval()
    with torch.no_grad():
        sums = run.task.losses(run.model, batch, 0.0)
    count = len(batch.labels)
    assert steps[-1].val_losses == pytest.approx(
        {"loss": sums["loss"].item() / count, "accuracy": sums["accuracy"].item() / count}, rel=1e-5
    )
    line = metrics.read(tmp_path / "run")[-1]
    assert line["val_loss"] == steps[-1].val_loss
    assert 0 < line["accuracy"] <= 1
    frequent = torch.tensor(run.task.corpus.train.labels.tokens.tolist()).mode().values
    assert line["baseline_accuracy"] == pytest.approx((batch.labels == frequent).double().mean().item())
    assert line["grad_norm"] == steps[-1].grad_norm > 0


@pytest.mark.parametrize("by_word", [True, False])
def test_network_learns_labels_and_keeps_their_names(tmp_path: Path, by_word: bool) -> None:
    source = (_tagged if by_word else _labelled)(tmp_path, 400)
    run = _open(tmp_path / "run", **{"tagged" if by_word else "labelled": str(source)}, steps=120, evaluate_every=120)
    assert list(run.steps())[-1].val_losses["accuracy"] > 0.95
    kind = RNNForTokenClassification if by_word else RNNForSequenceClassification
    model = kind.from_pretrained(run.model_path)
    assert model.config.bidirectional
    if by_word:
        sentences = _sentences(20)
        found = predict(model, run.task.tokenizer, [[word for word, _ in sentence] for sentence in sentences])
        assert [len(labels) for labels in found] == [len(sentence) for sentence in sentences]
        pairs = [
            (label, tag) for labels, sentence in zip(found, sentences, strict=True)
            for label, (_, tag) in zip(labels, sentence, strict=True)
        ]  # fmt: skip
        assert sum(label == tag for label, tag in pairs) > 0.95 * len(pairs)
    else:
        texts = [["7 words that are good ."], ["words that are bad ."], ["3 words that are dull ."]]
        assert predict(model, run.task.tokenizer, texts) == [["good"], ["bad"], ["dull"]]
    assert predict(model, run.task.tokenizer, []) == []


def test_resumed_run_equals_uninterrupted_bitwise(tmp_path: Path) -> None:
    options = {"tagged": str(_tagged(tmp_path)), "steps": 8, "dropout": 0.3, "accumulate": 3}
    expected = [step.losses for step in _open(tmp_path / "whole", **options).steps()]
    first = _open(tmp_path / "parts", **options)
    found = []
    for step in first.steps():
        found.append(step.losses)
        if step.step == 3:
            first.save()
            break
    assert found + [step.losses for step in _open(tmp_path / "parts", resume=True).steps()] == expected
    with open(options["tagged"], "a") as file:
        file.write("\nmore\tOTHER\n")
    with pytest.raises(CheckpointError, match="text is no longer"):
        _open(tmp_path / "parts", resume=True)


def test_digest_sees_where_a_sentence_ends(tmp_path: Path) -> None:
    digests = set()
    for content in ("a\tX\nb\tY\n\nc\tZ\n", "a\tX\n\nb\tY\nc\tZ\n", "a\tX\nb\tY\n\nc\tY\n"):
        (tmp_path / "file").write_text(content)
        digests.add(load_labelled(tmp_path / "file", by_word=True, vocab=300, cache=tmp_path / "cache").digest)
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\tX\nb Y\n", r"tagged: expected a word, a tab and its tag in .*file, line 2, got 'b Y'"),
        (b"a\tX\n\n\tY\n", r"line 3, got '\\tY'"),
        (b"a\tX\nb\t \n", r"line 2, got 'b\\t '"),
        (b"a\tNN\tX\n", r"line 1, got several tabs in 'a\\tNN\\tX'"),
        (b"a\tX\nb\tY\n", "tagged: expected at least 2 examples, one for validation, got 1 in .*file"),
        (b"", "tagged: expected at least 2 examples, one for validation, got 0 in .*file"),
        (b"a\tX\n\nb\tX\n", "tagged: expected at least 2 different labels, got 1 in .*file"),
        (b"a\tX\n\nb\xff\tY\n", "expected UTF-8, .*file has the byte 0xff at 6, line 3"),
        (None, "expected a file, .*file does not exist"),
    ],
)
def test_tagged_file_that_is_wrong_is_named_with_its_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(TextError, match=message):
        load_labelled(tmp_path / "file", by_word=True, vocab=300, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("good\tyes\nno\n", r"labelled: expected a label, a tab and a text in .*file, line 2, got 'no'"),
        ("good\tyes\n\nbad\tno\n", r"line 2, got ''"),
        ("\tyes\n", r"line 1, got '\\tyes'"),
        ("good\t\n", r"line 1, got 'good\\t'"),
        ("good\tyes\n", "labelled: expected at least 2 examples"),
        ("good\tyes\ngood\tno\n", "labelled: expected at least 2 different labels, got 1"),
    ],
)
def test_labelled_file_that_is_wrong_is_named_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "file").write_text(content)
    with pytest.raises(TextError, match=message):
        load_labelled(tmp_path / "file", by_word=False, vocab=300, cache=tmp_path / "cache")


def test_word_that_a_tokenizer_cannot_read_is_refused(tmp_path: Path) -> None:
    model = _model(_task(tmp_path))
    without_unknown = Tokenizer(models.WordLevel({"a": 0}))
    with pytest.raises(TextError, match="the tokenizer cannot read 'b a'"):
        predict(model, without_unknown, [["b", "a"]])
    dropping = Tokenizer(models.WordLevel({"a": 0}))
    dropping.pre_tokenizer = pre_tokenizers.Split("b", "removed")
    assert predict(model, dropping, [["a", "ab"]])
    with pytest.raises(TextError, match="the tokenizer has no token for a word of 'a b'"):
        predict(model, dropping, [["a", "b"]])


def test_labels_without_names_are_numbers(tmp_path: Path) -> None:
    task = _task(tmp_path)
    sizes = {"vocab": task.tokenizer.get_vocab_size(), "width": 4, "hidden": 4, "layers": 1}
    ((label,),) = predict(RNNForTokenClassification(RNNConfig(**sizes, labels=3)).eval(), task.tokenizer, [["Anna"]])
    assert label in ("0", "1", "2")


def test_settings_of_language_models_are_refused(tmp_path: Path) -> None:
    for name, value in (("tied", True), ("self_attention", True), ("stateful", False), ("tokens", "characters")):
        options = {"hidden": 16, "tagged": str(_tagged(tmp_path)), name: value}
        with pytest.raises(pyattn.RangeError, match=f"{name}: expected .* with --tagged, got {value}"):
            _open(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_command_trains_and_shows_accuracy(tmp_path: Path) -> None:
    options = [text for name, value in SMALL.items() for text in (f"--{name}", str(value))]
    command = ["train", "rnn", "--tagged", str(_tagged(tmp_path)), *options, "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*command, "--steps", "2", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "RNNForTokenClassification with" in result.output
    assert "57 sentences and 3 for validation, 2 labels, 4 steps per epoch" in result.output
    assert re.search(r"step +2/2  validation [\d.]+  accuracy [\d.]+ \(of [\d.]+\)", result.output)
    assert not (tmp_path / "run" / "sample.txt").exists()
    result = CliRunner().invoke(
        app, ["train", "rnn", "--labelled", str(tmp_path / "none"), "--out", str(tmp_path / "x")]
    )
    assert result.exit_code == 2
    assert result.stderr.startswith("pyattn: labelled: expected a file, ")
