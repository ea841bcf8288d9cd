"""BERT's pre-training data: which tokens are masked and how often, and which passages stand together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import pyattn
from pyattn.training.loop import evaluate
from pyattn.training.masked import (
    CLS,
    MASK,
    PAD,
    SEP,
    SPECIALS,
    DocumentCorpus,
    Documents,
    Example,
    MaskedTask,
    draw_pair,
    load_documents,
    masked,
    unigram_loss,
)
from pyattn.training.recipes import BertSettings
from pyattn.training.run import Run
from pyattn.training.text import Sentences, TextError

pytestmark = pytest.mark.usefixtures("one_thread")


def _numbered(documents: int, sentences: int, length: int) -> Documents:
    """Documents of which every token says where it stands: token t + 5 is the t-th one of all."""
    total = documents * sentences * length
    rows = (torch.arange(total) + len(SPECIALS)).view(-1, length).tolist()
    return Documents(Sentences.of(rows), numpy.arange(1, documents + 1) * sentences)


def _text(folder: Path, documents: int = 40) -> Path:
    nouns = ("cat", "dog", "river", "Märchen", "stone", "[MASK]")
    lines = [
        "\n".join(f"the {nouns[i % 6]} {verb} in part {i} ." for verb in ("sleeps", "waits", "stands"))
        for i in range(documents)
    ]
    path = folder / "text.txt"
    path.write_text("\n\n \n".join(lines) + "\n", encoding="utf-8")
    return path


def _task(folder: Path, seed: int = 0, **options: Any) -> MaskedTask:
    corpus = load_documents(_text(folder), **({"vocab": 300, "cased": False, "cache": folder / "cache"} | options))
    return MaskedTask(corpus, batch=8, context=32, validation_tokens=1000, seed=seed)


def _restored(example: Example) -> Tensor:
    tokens = example.tokens.clone()
    tokens[example.positions] = example.labels
    return tokens


def test_masking_has_the_paper_s_frequencies() -> None:
    generator = numpy.random.default_rng(0)
    vocab, length = 1000, 200
    outcomes = numpy.zeros(3)
    chosen_at = numpy.zeros(length + 3)
    for _ in range(1000):
        a, b = generator.integers(len(SPECIALS), vocab, (2, length // 2))
        example = masked(a, b, False, vocab, generator)
        assert len(example.positions) == 30  # 15 % of 200
        assert not set(example.labels.tolist()) & set(range(len(SPECIALS)))
        now = example.tokens[example.positions]
        outcomes += [
            (now == MASK).sum(),
            ((now != MASK) & (now != example.labels)).sum(),
            (now == example.labels).sum(),
        ]
        chosen_at[example.positions] += 1
        assert torch.equal(_restored(example), torch.from_numpy(numpy.concatenate([[CLS], a, [SEP], b, [SEP]])))
    # Each frequency within four standard deviations.
    for count, p in zip(outcomes, (0.8, 0.1, 0.1), strict=True):
        assert abs(count / 30_000 - p) < 4 * math.sqrt(p * (1 - p) / 30_000) + 1e-3  # a random token may be the old one
    specials = [0, length // 2 + 1, length + 2]
    assert chosen_at[specials].sum() == 0
    words = numpy.delete(chosen_at, specials) / 1000
    assert abs(words - 0.15).max() < 5 * math.sqrt(0.15 * 0.85 / 1000)


def test_random_replacements_are_any_token_but_no_special_one() -> None:
    generator = numpy.random.default_rng(0)
    a = b = numpy.full(100, len(SPECIALS))
    found: set[int] = set()
    for _ in range(300):
        example = masked(a, b, False, 20, generator)
        found |= set(example.tokens[example.positions].tolist())
    assert found == {MASK, *range(len(SPECIALS), 20)}


def test_segments_change_behind_the_first_sep() -> None:
    example = masked(numpy.array([7, 8]), numpy.array([9, 10, 11]), True, 100, numpy.random.default_rng(0))
    assert _restored(example).tolist() == [CLS, 7, 8, SEP, 9, 10, 11, SEP]
    assert example.segments.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert example.is_random


def test_half_of_the_second_passages_are_of_another_document() -> None:
    documents, generator = _numbered(20, 10, 5), numpy.random.default_rng(0)
    drawn = [draw_pair(documents, 30, generator) for _ in range(2000)]
    assert abs(sum(is_random for *_, is_random in drawn) / 2000 - 0.5) < 4 * math.sqrt(0.25 / 2000)
    for a, b, is_random in drawn:
        assert len(a) and len(b)
        assert len(a) + len(b) <= 30
        for passage in (a, b):
            assert (numpy.diff(passage) == 1).all()  # of one piece
        of_a, of_b = ((passage[0] - len(SPECIALS)) // 50 for passage in (a, b))
        assert (of_a != of_b) == is_random
        if not is_random:
            assert b[0] == a[-1] + 1  # it follows at once, since nothing was too long here
    assert {(a[0] - 5) // 50 for a, *_ in drawn} == set(range(20))
    lengths = [len(a) + len(b) for a, b, _ in drawn]
    assert 0.85 < numpy.mean([length >= 30 for length in lengths]) < 0.97  # most fill the room, some are short


def test_passages_of_a_document_shorter_than_the_room_are_the_whole_document() -> None:
    documents, generator = _numbered(4, 3, 5), numpy.random.default_rng(0)
    wholes = [
        numpy.concatenate([a, b])
        for a, b, is_random in (draw_pair(documents, 30, generator) for _ in range(200))
        if not is_random and len(a) + len(b) >= 15
    ]
    assert len(wholes) > 60
    assert all(len(whole) == 15 and (whole[0] - 5) % 15 == 0 for whole in wholes)


def test_vocabulary_is_the_same_each_time(tmp_path: Path) -> None:
    """Processes that learn it must come to the same numbers; the trainer's own order differs from call to call."""
    found = set()
    for i in range(3):
        corpus = load_documents(_text(tmp_path), vocab=300, cased=False, cache=tmp_path / str(i))
        found.add(corpus.tokenizer.to_str())
    assert len(found) == 1


def test_long_sentences_are_cut_at_both_ends() -> None:
    documents, generator = _numbered(4, 3, 100), numpy.random.default_rng(0)
    drawn = [draw_pair(documents, 30, generator) for _ in range(300)]
    assert {len(a) + len(b) for a, b, _ in drawn} == {30}
    assert {len(a) for a, _, _ in drawn} == {15}
    assert len({a[0] % 100 for a, *_ in drawn}) > 10  # not always what stands in front


def test_one_sentence_documents_are_second_passages_only() -> None:
    sentences = Sentences.of([[10, 11], [20], [21], [30]])
    documents = Documents(sentences, numpy.array([1, 3, 4]))
    assert documents.starts.tolist() == [1]
    generator = numpy.random.default_rng(0)
    drawn = {(a.tobytes(), b.tobytes()) for a, b, _ in (draw_pair(documents, 8, generator) for _ in range(200))}
    ids = {(tuple(numpy.frombuffer(a, numpy.int32)), tuple(numpy.frombuffer(b, numpy.int32))) for a, b in drawn}
    assert ids == {((20,), (21,)), ((20,), (10, 11)), ((20,), (30,))}


def test_examples_depend_on_seed_and_step_alone(tmp_path: Path) -> None:
    def drawn(seed: int, step: int) -> list[list[int]]:
        return [example.tokens.tolist() for example in _task(tmp_path, seed).examples(step)]

    assert drawn(0, 1) == drawn(0, 1)
    assert len({str(drawn(seed, step)) for seed in range(2) for step in (1, 2)}) == 4


def test_collate_places_positions_in_the_whole_batch(tmp_path: Path) -> None:
    task = _task(tmp_path)
    examples = task.examples(1)
    batch = task.collate(examples)
    assert len({len(example.tokens) for example in examples}) > 1
    tokens = batch.tokens.flatten()
    tokens[batch.positions] = batch.labels
    for row, example in zip(tokens.view(batch.tokens.shape), examples, strict=True):
        length = len(example.tokens)
        assert torch.equal(row[:length], _restored(example))
        assert (row[length:] == PAD).all()
    assert batch.lengths.tolist() == [len(example.tokens) for example in examples]
    assert batch.is_random.tolist() == [int(example.is_random) for example in examples]
    assert batch.segments.shape == batch.tokens.shape
    assert task.counts(batch) == {"masked": sum(len(e.labels) for e in examples), "next": 8}
    assert task.size(batch) == int(batch.lengths.sum())


def test_documents_are_read_by_empty_lines_and_held_out_whole(tmp_path: Path) -> None:
    corpus = load_documents(_text(tmp_path), vocab=300, cased=True, cache=tmp_path / "cache")
    assert (len(corpus.train), len(corpus.validation)) == (38, 2)
    texts = [
        corpus.tokenizer.decode(part.passage(*part.span(i)).tolist())
        for part in (corpus.train, corpus.validation)
        for i in range(len(part))
    ]
    assert len(set(texts)) == 40
    assert all(text.count("the") == 3 for text in texts)
    assert sum("Märchen" in text for text in texts) == 7
    assert all(MASK not in part.tokens for part in (corpus.train, corpus.validation))  # "[MASK]" in a text is text


def test_tokenizer_puts_marks_around_texts(tmp_path: Path) -> None:
    corpus = load_documents(_text(tmp_path), vocab=300, cased=False, cache=tmp_path / "cache")
    encoded = corpus.tokenizer.encode("The CAT", "märchen")
    assert encoded.tokens[:4] == ["[CLS]", "the", "cat", "[SEP]"]
    assert encoded.tokens[-1] == "[SEP]"
    assert corpus.tokenizer.decode(encoded.ids) == "the cat marchen"
    assert [corpus.tokenizer.token_to_id(mark) for mark in SPECIALS] == list(range(5))


@pytest.mark.parametrize(
    "content", ["one line\n", "a document\nof two lines\n", "a\n\nb\n\nc\n\nd\n", "a\nb\n\nc\nd\n\ne\n"]
)
def test_too_few_documents_are_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "text.txt").write_text(content)
    with pytest.raises(TextError, match=r"expected a sentence per line and empty lines between documents.*text\.txt"):
        load_documents(tmp_path / "text.txt", vocab=300, cased=False, cache=tmp_path / "cache")


def test_baselines_are_frequencies_and_a_coin(tmp_path: Path) -> None:
    assert unigram_loss(numpy.array([0, 0, 0, 1]), torch.tensor([0, 1]), 2) == pytest.approx(
        -(math.log(4 / 6) + math.log(2 / 6)) / 2
    )
    baselines = _task(tmp_path).baselines
    assert baselines["next"] == math.log(2)
    assert 1 < baselines["masked"] < math.log(300)


def test_validation_is_the_same_whatever_the_seed(tmp_path: Path) -> None:
    for one, two in zip(_task(tmp_path).validation(), _task(tmp_path, seed=5).validation(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


class _Frequencies(nn.Module):
    """Guesses by frequency and by coin."""

    def __init__(self, corpus: DocumentCorpus) -> None:
        super().__init__()
        counts = numpy.bincount(corpus.train.tokens, minlength=corpus.tokenizer.get_vocab_size()) + 1
        self.logits = torch.from_numpy(numpy.log(counts))

    def forward(self, tokens: Tensor, *, segments: Tensor, lengths: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits.expand(len(positions), -1), torch.zeros(len(tokens), 2)


def test_baselines_are_what_a_model_by_frequency_reaches(tmp_path: Path) -> None:
    task = _task(tmp_path)
    model = _Frequencies(task.corpus)
    sums = {"masked": 0.0, "next": 0.0}
    totals = dict.fromkeys(sums, 0)
    for batch in task.validation():
        for name, loss in task.losses(model, batch, 0.0).items():
            sums[name] += loss.item()
            totals[name] += task.counts(batch)[name]
    assert {name: sums[name] / totals[name] for name in sums} == pytest.approx(task.baselines, rel=1e-5)


def _settings(folder: Path, **changes: Any) -> BertSettings:
    tiny = {
        "text": str(_text(folder)), "vocab": 300, "context": 32, "batch": 8, "layers": 1, "heads": 2, "width": 32,
        "hidden": 32, "lr": 1e-2, "steps": 60, "attention": "torch", "validation_tokens": 500,
    }  # fmt: skip
    return BertSettings(**(tiny | changes))


def test_bert_beats_the_frequencies_and_its_model_can_be_loaded(tmp_path: Path) -> None:
    from pyattn.models.bert import BertForPreTraining

    run = Run(tmp_path / "run", _settings(tmp_path, dropout=0.0), "cpu")
    last = [*run.steps()][-1]
    assert last.val_losses["masked"] < 0.8 * run.task.baselines["masked"]
    assert last.val_losses["loss"] == pytest.approx(last.val_losses["masked"] + last.val_losses["next"])
    loaded = BertForPreTraining.from_pretrained(run.model_path, attention="torch")
    found = evaluate(loaded, run.task, run.task.validation(), torch.float32)
    assert found["loss"] == pytest.approx(run.best_loss, rel=1e-5)


def test_bert_resumed_equals_uninterrupted_bitwise(tmp_path: Path) -> None:
    from pyattn.training import checkpoint

    settings = _settings(tmp_path, steps=6, dropout=0.1)
    expected = [(step.losses, step.grad_norm, step.val_losses) for step in Run(tmp_path / "a", settings, "cpu").steps()]
    first = Run(tmp_path / "b", settings, "cpu")
    found = []
    for step in first.steps():
        found.append((step.losses, step.grad_norm, step.val_losses))
        if step.step == 3:
            first.save()
            break
    second = Run(tmp_path / "b", settings, "cpu", checkpoint.load(first.checkpoint_path))
    assert found + [(step.losses, step.grad_norm, step.val_losses) for step in second.steps()] == expected


@pytest.mark.parametrize(
    ("change", "message"), [({"text": None}, "give --text"), ({"context": 7}, "context: expected")]
)
def test_bert_settings_without_what_they_need_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(pyattn.RangeError, match=message):
        _settings(tmp_path, **change).task(tmp_path)
