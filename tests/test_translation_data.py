"""Parallel text: its vocabulary, its batches by length, and all that can be wrong with two files of sentences."""

from __future__ import annotations

import gzip
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import pyattn
from pyattn.training.loop import adamw, evaluate, train
from pyattn.training.recipes import TransformerSettings
from pyattn.training.run import Run
from pyattn.training.text import Sentences, TextError
from pyattn.training.translation import END, PAD, START, Files, ParallelCorpus, TranslationTask, cuts, load_parallel

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = {
    "der": "the",
    "Hund": "dog",
    "Vögel": "birds",
    "sieht": "sees",
    "läuft": "runs",
    "schnell,": "fast,",
    "😀": "😀",
}


def _sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    generator = random.Random(seed)
    drawn = [generator.choices(list(WORDS), k=generator.randint(1, 12)) for _ in range(count)]
    return [(" ".join(words) + ".", " ".join(map(WORDS.__getitem__, words)) + ".") for words in drawn]


def _files(folder: Path, pairs: list[tuple[str, str]], name: str = "train") -> Files:
    folder.mkdir(parents=True, exist_ok=True)
    files = Files(folder / f"{name}.de", folder / f"{name}.en")
    for path, side in ((files.source, 0), (files.target, 1)):
        path.write_text("".join(pair[side] + "\n" for pair in pairs), encoding="utf-8")
    return files


def _load(files: Files, validation: Files | None = None, **options: int) -> ParallelCorpus:
    options = {"vocab": 300, "context": 64, "max_tokens": 200} | options
    return load_parallel(files, validation, cache=files.source.parent / "cache", **options)


def _task(folder: Path, count: int = 300, seed: int = 0, **options: int) -> TranslationTask:
    corpus = _load(_files(folder, _sentences(count)), **options)
    return TranslationTask(corpus, max_tokens=options.get("max_tokens", 200), seed=seed)


def _rows(task: TranslationTask, step: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(tuple(source.tolist()), tuple(target.tolist())) for source, target in task.examples(step)]


def test_sentences_come_back_from_their_tokens(tmp_path: Path) -> None:
    pairs = [*_sentences(50), ("  zwei  Räume ", "</s> <pad> e\u0301"), ("日本", "\u2028x")]
    corpus = _load(_files(tmp_path, pairs), _files(tmp_path, pairs, "val"))
    decode = corpus.tokenizer.decode
    for row, (source, target) in enumerate(pairs):
        assert decode(corpus.train.source[row].tolist()) == source.strip()
        assert decode(corpus.validation.target[row].tolist()) == target.strip().replace("e\u0301", "é")
        for sentences in (corpus.train.source, corpus.train.target):
            assert (sentences[row] == END).nonzero().flatten().tolist() == [len(sentences[row]) - 1]
            assert not set(sentences[row].tolist()) & {PAD, START}
    assert corpus.tokenizer.encode("der Hund").ids[-1] == END


def test_first_word_is_the_same_token_as_inside(tmp_path: Path) -> None:
    tokenizer = _load(_files(tmp_path, _sentences(200))).tokenizer
    first, *_ = tokenizer.encode("Hund läuft").ids
    assert tokenizer.encode("der Hund").ids[-2] == first


def test_held_out_pairs_are_in_no_epoch(tmp_path: Path) -> None:
    pairs = [(f"a {i}", f"b {i}") for i in range(100)]
    corpus = _load(_files(tmp_path, pairs))
    decoded = [
        [corpus.tokenizer.decode(side[row].tolist()) for row in range(len(side))]
        for part in (corpus.train, corpus.validation)
        for side in (part.source, part.target)
    ]
    assert [len(side) for side in decoded] == [95, 95, 5, 5]
    assert sorted(zip(decoded[0] + decoded[2], decoded[1] + decoded[3], strict=True)) == sorted(pairs)


def test_compressed_files_are_the_same_corpus_and_the_cache_serves_them(tmp_path: Path) -> None:
    plain = _files(tmp_path, _sentences(50))
    packed = Files(*(path.with_name(path.name + ".gz") for path in (plain.source, plain.target)))
    for path, of in ((packed.source, plain.source), (packed.target, plain.target)):
        path.write_bytes(gzip.compress(of.read_bytes()))
    first, second = _load(plain), _load(packed)
    assert first.digest == second.digest
    assert torch.equal(first.train.source.tokens, second.train.source.tokens)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert _load(plain, vocab=280).digest != first.digest


def test_digest_sees_where_a_corpus_is_divided(tmp_path: Path) -> None:
    pairs = [("a", "a")] * 50
    one = _load(_files(tmp_path / "a", pairs[:20]), _files(tmp_path / "a", pairs[20:], "val"))
    two = _load(_files(tmp_path / "b", pairs[:30]), _files(tmp_path / "b", pairs[30:], "val"))
    assert one.digest != two.digest


def test_epoch_has_every_pair_once(tmp_path: Path) -> None:
    task = _task(tmp_path)
    pairs = task.corpus.train
    whole = sorted((tuple(pairs.source[i].tolist()), tuple(pairs.target[i].tolist())) for i in range(len(pairs)))
    for epoch in range(3):
        steps = range(1 + epoch * task.steps_per_epoch, 1 + (epoch + 1) * task.steps_per_epoch)
        assert sorted(row for step in steps for row in _rows(task, step)) == whole


def test_batches_fit_the_budget_and_are_cut_at_the_same_places_in_each_epoch(tmp_path: Path) -> None:
    task = _task(tmp_path)
    shapes = []
    for epoch in range(3):
        batches = [
            task.collate(task.examples(epoch * task.steps_per_epoch + i + 1)) for i in range(task.steps_per_epoch)
        ]
        assert all(max(batch.source.numel(), batch.target_out.numel()) <= 200 for batch in batches)
        shapes.append(
            sorted((len(batch.source), max(batch.source.shape[1], batch.target_out.shape[1])) for batch in batches)
        )
    assert shapes[0] == shapes[1] == shapes[2]
    assert len(shapes[0]) == task.steps_per_epoch
    filled = sum(map(int, task.corpus.train.lengths)) / sum(rows * longest for rows, longest in shapes[0])
    assert filled > 0.9  # sorted by length, so little of it is padding


def test_batches_depend_on_seed_and_step_alone(tmp_path: Path) -> None:
    task = _task(tmp_path)
    last = 2 * task.steps_per_epoch
    in_order = [_rows(task, step) for step in range(1, last + 1)]
    fresh = _task(tmp_path)
    assert [_rows(fresh, step) for step in range(last, 0, -1)] == in_order[::-1]
    assert [_rows(_task(tmp_path, seed=1), step) for step in range(1, last + 1)] != in_order
    first, second = in_order[: task.steps_per_epoch], in_order[task.steps_per_epoch :]
    assert sorted(map(sorted, first)) != sorted(map(sorted, second))  # other pairs together, not only another order


def test_cuts_are_as_far_apart_as_the_budget_allows() -> None:
    assert cuts(numpy.array([1, 1, 1, 2, 2, 3, 9]), 6) == [0, 3, 5, 6, 7]  # 3 rows of 1; a fourth of 2 would make it 8
    assert cuts(numpy.array([5]), 6) == [0, 1]
    assert cuts(numpy.array([2, 2, 2]), 6) == [0, 3]


def test_collate_shifts_the_target_and_pads(tmp_path: Path) -> None:
    pairs = [([7, 8, END], [9, END]), ([7, END], [10, 11, END])]
    batch = _task(tmp_path).collate([(torch.tensor(a), torch.tensor(b)) for a, b in pairs])
    assert batch.source.tolist() == [[7, 8, END], [7, END, PAD]]
    assert batch.source_lengths.tolist() == [3, 2]
    assert batch.target_in.tolist() == [[START, 9, PAD], [START, 10, 11]]
    assert batch.target_out.tolist() == [[9, END, PAD], [10, 11, END]]
    task = _task(tmp_path)
    assert (task.counts(batch), task.size(batch)) == ({"loss": 5}, 10)


def test_validation_batches_have_every_pair(tmp_path: Path) -> None:
    task = _task(tmp_path)
    batches = task.validation()
    assert sum(len(batch.source) for batch in batches) == len(task.corpus.validation)
    assert sum(task.counts(batch)["loss"] for batch in batches) == len(task.corpus.validation.target.tokens)


class _Model(nn.Module):
    """Logits from the target's token and the mean of the source's, which is enough to learn with."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.source = nn.Embedding(vocab, 16)
        self.target = nn.Embedding(vocab, 16)
        self.head = nn.Linear(16, vocab)

    def forward(self, source: Tensor, target: Tensor, *, source_lengths: Tensor) -> Tensor:
        visible = torch.arange(source.shape[1]) < source_lengths[:, None]
        mean = (self.source(source) * visible[..., None]).sum(1) / source_lengths[:, None]
        return self.head(torch.tanh(self.target(target) + mean[:, None]))


def test_loss_ignores_padding(tmp_path: Path) -> None:
    task = _task(tmp_path)
    model = _Model(task.tokenizer.get_vocab_size())
    examples = task.examples(1)[:2] + task.examples(2)[:2] + task.examples(3)[:2]
    together = task.losses(model, task.collate(examples), 0.1)["loss"]
    alone = sum(task.losses(model, task.collate([example]), 0.1)["loss"] for example in examples)
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)


@pytest.mark.parametrize("parts", [3, 1000])
def test_accumulated_parts_are_the_whole_step(tmp_path: Path, parts: int) -> None:
    task = _task(tmp_path)

    def trained(accumulate: int) -> list[tuple[float, float]]:
        torch.manual_seed(0)
        model = _Model(task.tokenizer.get_vocab_size())
        settings = TransformerSettings(steps=5, lr=1e-2, accumulate=accumulate)
        return [(step.loss, step.grad_norm) for step in train(model, adamw(model, settings), task, settings)]

    for ours, theirs in zip(trained(parts), trained(1), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def _settings(folder: Path, **changes: Any) -> TransformerSettings:
    files = _files(folder / "data", _sentences(200))
    tiny = {
        "source": str(files.source), "target": str(files.target), "vocab": 300, "context": 64, "max_tokens": 200,
        "layers": 1, "heads": 2, "width": 32, "hidden": 32, "lr": 1e-2, "steps": 60, "warmup": 5, "attention": "torch",
    }  # fmt: skip
    return TransformerSettings(**(tiny | changes))


def test_transformer_learns_and_its_model_can_be_loaded(tmp_path: Path) -> None:
    from pyattn.models.transformer import Transformer

    run = Run(tmp_path / "run", _settings(tmp_path, dropout=0.0, label_smoothing=0.0), "cpu")
    steps = list(run.steps())
    assert steps[0].loss == pytest.approx(5.7, abs=0.5)  # ln 300
    assert steps[-1].val_loss is not None and steps[-1].val_loss < 2.5
    loaded = Transformer.from_pretrained(run.model_path, attention="torch")
    found = evaluate(loaded, run.task, run.task.validation(), torch.float32)
    assert found["loss"] == pytest.approx(run.best_loss, rel=1e-5)


def test_transformer_resumed_equals_uninterrupted_bitwise(tmp_path: Path) -> None:
    from pyattn.training import checkpoint

    settings = _settings(tmp_path, steps=40, evaluate_every=10)  # more than two epochs
    expected = [(step.loss, step.grad_norm, step.val_loss) for step in Run(tmp_path / "a", settings, "cpu").steps()]
    found = []
    first = Run(tmp_path / "b", settings, "cpu")
    assert first.task.steps_per_epoch * 2 < 40
    for step in first.steps():
        found.append((step.loss, step.grad_norm, step.val_loss))
        if step.step == 17:
            first.save()
            break
    torch.manual_seed(999)
    second = Run(tmp_path / "b", settings, "cpu", checkpoint.load(first.checkpoint_path))
    found += [(step.loss, step.grad_norm, step.val_loss) for step in second.steps()]
    assert found == expected


def _broken(folder: Path, lines: dict[str, bytes]) -> Files:
    files = _files(folder, _sentences(5))
    for name, content in lines.items():
        (folder / name).write_bytes(content)
    return files


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ({"train.en": b"one\ntwo\n"}, r"as many lines in .*train\.en as in .*train\.de, got 2 for 5"),
        ({"train.de": b"a\n\n b\n \nc\n"}, r"train\.de, line 2 is empty; remove it from both files \(1 more lines"),
        ({"train.en": b"a\nb\nc\nd\n\n"}, r"train\.en, line 5 is empty; remove it from both files$"),
        ({"train.de": b"", "train.en": b""}, r"expected some text, .*train\.de is empty"),
        ({"train.en": b"a\nb\nc\xff\nd\ne\n"}, r"expected UTF-8, .*train\.en has the byte 0xff at 5, line 3"),
        (
            {"train.de": b"a\n" + b"x y " * 40 + b"\nb\nc\nd\n"},
            r"train\.de, line 2 has \d+ tokens .* 64 positions of --con",
        ),
    ],
)
def test_broken_corpus_is_named_with_file_and_line(tmp_path: Path, lines: dict[str, bytes], message: str) -> None:
    files = _broken(tmp_path, lines)
    with pytest.raises(TextError, match=message) as raised:
        _load(files)
    assert "\n" not in str(raised.value)
    good = _files(tmp_path / "good", _sentences(20))
    with pytest.raises(TextError, match=message):
        _load(good, files)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    files = _files(tmp_path, _sentences(5))
    with pytest.raises(TextError, match=r"none\.en does not exist"):
        _load(Files(files.source, tmp_path / "none.en"))
    packed = tmp_path / "train.en.gz"
    for content in (b"plain text", gzip.compress(files.target.read_bytes())[:-20]):
        packed.write_bytes(content)
        with pytest.raises(TextError, match=r"train\.en\.gz is no whole gzip file"):
            _load(Files(files.source, packed))


def test_budget_below_the_longest_sentence_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(pyattn.RangeError, match=r"max_tokens: expected at least \d+, the longest sentence of .*got 3"):
        _load(_files(tmp_path, _sentences(20)), max_tokens=3)


def test_one_pair_leaves_nothing_to_hold_out(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="at least 2 lines"):
        _load(_files(tmp_path, _sentences(1)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"source": None, "target": None}, "give --source and --target"),
        ({"target": None}, "target: expected a file, because source and target go together"),
        ({"validation_source": "x"}, "validation_target: expected a file"),
    ],
)
def test_missing_files_of_the_settings_are_named(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(pyattn.RangeError, match=message):
        _settings(tmp_path, **given).task(tmp_path)


def test_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    from pyattn.training.text import lines

    path = tmp_path / "text"
    path.write_bytes("\ufeffa\u2028b\x0cc\x85d\r\ne\rf\n".encode())
    assert lines(path, "source") == ["a\u2028b\x0cc\x85d", "e\rf"]


def test_sentences_keep_rows_of_any_length() -> None:
    rows = [[1, 2, 3], [4], [], [5, 6]]
    sentences = Sentences.of(rows)
    assert [sentences[i].tolist() for i in range(len(sentences))] == rows
    assert sentences.lengths.tolist() == [3, 1, 0, 2]
