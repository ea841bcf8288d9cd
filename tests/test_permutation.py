"""XLNet's pre-training data: which tokens are predicted, in which order and from what, and what stands in a row."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from safetensors.torch import load_file
from stream_runs import command
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

import pyattn
from pyattn.models.xlnet import XLNetConfig, XLNetLMHead
from pyattn.models.xlnet_heads import XLNetForSequenceClassification
from pyattn.training import metrics
from pyattn.training.language import Corpus
from pyattn.training.loop import evaluate
from pyattn.training.permutation import (
    CLS,
    SEP,
    PermutationTask,
    Row,
    Rows,
    Sizes,
    add_marks,
    draw_order,
    draw_row,
    draw_spans,
)
from pyattn.training.recipes import XLNetSettings
from pyattn.training.run import Run
from pyattn.training.task import micro_batches

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB = 11
MARKS = (VOCAB, VOCAB + 1)
SIZES = Sizes(context=24, predicted=7)
NUMBERED = numpy.arange(1000, dtype=numpy.int32)  # a text of which every token says where it stands


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({chr(97 + i): i for i in range(VOCAB)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return tokenizer


def _corpus(training: int = 200, validation: int = 200) -> Corpus:
    drawn = torch.randint(VOCAB, (training + validation,), generator=torch.Generator().manual_seed(0)) ** 2 // VOCAB
    return Corpus(drawn[:training].int(), drawn[training:].int(), _tokenizer(), "")


def _task(training: int = 200, validation: int = 200, **options: int) -> PermutationTask:
    """Streams of 66 tokens: 4 steps by 12, and 6 tokens that fill no row."""
    given = {"batch": 3, "context": 24, "predicted": 7, "validation_tokens": 90, "seed": 0}
    return PermutationTask(_corpus(training, validation), **(given | options))


def _model(layers: int = 2, memory: int = 30) -> XLNetLMHead:
    torch.manual_seed(0)
    sizes = {"layers": layers, "heads": 2, "width": 8, "hidden": 12, "dropout": 0.0}
    model = XLNetLMHead(XLNetConfig(vocab=VOCAB + 2, **sizes, memory=memory, reuse=12, pad=None, end=None))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def _drawn_row(seed: int = 0, sizes: Sizes = SIZES) -> Row:
    return draw_row(NUMBERED, 100, sizes, (2000, 2001), numpy.random.default_rng(seed))


def _runs(chosen: numpy.ndarray) -> list[int]:
    """Lengths of spans that are True."""
    edges = numpy.flatnonzero(numpy.diff(numpy.concatenate([[0], chosen, [0]])))
    return (edges[1::2] - edges[::2]).tolist()


@pytest.mark.parametrize(("length", "count"), [(1, 0), (1, 1), (5, 5), (9, 5), (13, 3), (13, 12), (256, 43), (253, 42)])
def test_spans_have_exactly_as_many_tokens_as_wanted(length: int, count: int) -> None:
    generator = numpy.random.default_rng(0)
    for _ in range(200):
        chosen = draw_spans(length, count, generator)
        assert chosen.shape == (length,) and chosen.sum() == count


def test_spans_are_of_one_to_five_tokens_and_shorter_ones_more_frequent() -> None:
    generator, lengths = numpy.random.default_rng(0), []
    for _ in range(40):
        lengths += _runs(draw_spans(200_000, 100, generator))  # so far apart that they hardly touch
    counts = numpy.bincount(lengths, minlength=6)
    assert counts[6:].sum() < 0.01 * len(lengths)
    expected = 1 / numpy.arange(1, 6)
    # The last of a hundred tokens may cut a span short.
    assert abs(counts[1:6] / len(lengths) - expected / expected.sum()).max() < 4 * math.sqrt(0.25 / len(lengths))


def test_spans_come_everywhere() -> None:
    generator, length, count = numpy.random.default_rng(0), 64, 11
    often = sum(draw_spans(length, count, generator).astype(int) for _ in range(4000)) / 4000
    assert often.min() > 0.1 and often.max() < 0.25  # less at both ends, where a span has one side only
    assert abs(often[5:-5] - count / length).max() < 0.05
    assert often.sum() == pytest.approx(count)


def test_every_target_has_a_place_of_its_own_and_all_else_is_context() -> None:
    for seed in range(100):
        row = _drawn_row(seed)
        targets, order = row.targets.tolist(), row.order.tolist()
        assert len(set(targets)) == 7 and targets == sorted(targets)
        assert [sum(t < 12 for t in targets), sum(t >= 12 for t in targets)] == [4, 3]
        assert sorted(order[t] for t in targets) == [0, 1, 2, 3, 5, 6, 7]
        assert {order[i] for i in range(12) if i not in targets} == {-1}
        assert {order[i] for i in range(12, 24) if i not in targets} == {4}
        marks = (row.tokens >= 2000).nonzero().flatten().tolist()
        assert len(marks) == 3 and not {*marks} & {*targets}


def test_any_order_of_the_targets_is_as_likely() -> None:
    generator, drawn = numpy.random.default_rng(0), []
    is_mark = numpy.zeros(24, bool)
    is_mark[-3:] = True
    for _ in range(4000):
        order, targets = draw_order(is_mark, SIZES, generator)
        drawn.append(order[targets])
    first, second = numpy.array(drawn)[:, :4], numpy.array(drawn)[:, 4:] - 5
    for places in (first, second):
        number = places.shape[1]
        _, counts = numpy.unique(places, axis=0, return_counts=True)
        assert len(counts) == math.factorial(number)
        expected = 4000 / len(counts)
        assert abs(counts - expected).max() < 4 * math.sqrt(expected)


def test_row_is_text_and_then_two_segments_with_marks() -> None:
    followed, cuts = 0, set()
    for seed in range(400):
        row = _drawn_row(seed)
        tokens = row.tokens.tolist()
        cut = tokens.index(2000)
        assert tokens[:cut] == [*range(100, 100 + cut)]
        assert 12 < cut < 21
        assert tokens[-2:] == [2000, 2001]
        b = tokens[cut + 1 : -2]
        assert len(b) and b == [*range(b[0], b[0] + len(b))] and b[-1] < 1000
        assert row.segments.tolist() == [0] * (cut + 1) + [1] * (len(b) + 1) + [2]
        followed += b[0] == 100 + cut
        cuts.add(cut)
    assert cuts == {*range(13, 21)}
    assert abs(followed / 400 - 0.5) < 4 * math.sqrt(0.25 / 400)


def test_shortest_row_has_both_segments() -> None:
    row = _drawn_row(sizes=Sizes(9, 1))
    assert row.tokens.tolist()[:4] == [100, 101, 102, 103]
    assert row.segments.tolist() == [0] * 6 + [1] * 2 + [2]
    assert row.targets.shape == (1,)


def _authors_mask(row: Row) -> Tensor:
    """What may not be seen, [query, key], by the authors' `_local_perm` in each part. Marks count as context, which
    takes the place of their `functional` tokens."""
    context = len(row.tokens)
    half = context // 2
    is_target = torch.zeros(context, dtype=torch.bool).index_fill(0, row.targets, True)
    hidden = torch.zeros(context, context, dtype=torch.bool)
    for low, high in ((0, half), (half, context)):
        part = is_target[low:high]
        index = torch.where(part, row.order[low:high], -1)
        own = torch.where(part, index, index + 1)
        hidden[low:high, low:high] = (own[:, None] <= index[None]) & part[None]
    hidden[:half, half:] = True
    return hidden


def _seen(model: XLNetLMHead, row: Row, streams: str) -> Tensor:
    """Which tokens [rows, context] have a gradient of which row's logits."""
    embedded = model.transformer.word_embedding.weight.detach()[row.tokens][None].requires_grad_()
    model.transformer.embed = lambda _: embedded
    options = {"targets": row.targets[None]} if streams == "query" else {}
    logits, _ = model(row.tokens[None], row.segments[None], order=row.order[None], **options)
    gradients = [torch.autograd.grad(each.sum(), embedded, retain_graph=True)[0] for each in logits[0]]
    return torch.cat(gradients).abs().sum(-1) > 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("layers", [1, 3])
def test_streams_see_what_the_authors_mask_lets_them(layers: int, seed: int) -> None:
    row = draw_row(_corpus().train.numpy(), 30, SIZES, MARKS, numpy.random.default_rng(seed))
    query = ~_authors_mask(row)
    content = query | torch.eye(len(query), dtype=torch.bool)
    for _ in range(layers - 1):  # what is seen by way of what is seen
        query, content = (query.float() @ content.float() > 0, content.float() @ content.float() > 0)
    assert torch.equal(_seen(_model(layers), row, "content"), content)
    assert torch.equal(_seen(_model(layers), row, "query"), query[row.targets])
    assert not query.diagonal()[row.targets].any()


def test_marks_are_seen_by_all_of_their_part_and_see_no_target() -> None:
    row = draw_row(_corpus().train.numpy(), 30, SIZES, MARKS, numpy.random.default_rng(5))
    marks, seen = row.tokens >= VOCAB, _seen(_model(1), row, "content")
    assert seen[12:, marks].all() and not seen[:12, marks].any()
    assert not seen[marks][:, row.targets[row.targets >= 12]].any()


def test_each_stream_reads_its_own_part_of_the_text_in_order() -> None:
    task = _task()
    assert task.steps_per_epoch == 4
    batches = [task.collate(task.examples(step)) for step in range(1, 6)]
    for stream in range(3):
        firsts = torch.cat([batch.tokens[stream, :12] for batch in batches[:4]])
        assert torch.equal(firsts, task.corpus.train[66 * stream :][:48].long())
    assert [batch.places.tolist() for batch in batches] == [[12 * (step % 4)] * 3 for step in range(5)]
    assert torch.equal(batches[4].tokens[:, :12], batches[0].tokens[:, :12])
    assert not torch.equal(batches[4].order, batches[0].order)  # another epoch, another order


@pytest.mark.parametrize("length", [73, 74, 108, 109])
def test_shortest_texts_fill_a_row(length: int) -> None:
    task = _task(length)
    assert task.steps_per_epoch == ((length - 1) // 3 - 12) // 12
    assert task.collate(task.examples(task.steps_per_epoch)).tokens.shape == (3, 24)


def test_examples_depend_on_seed_and_step_alone() -> None:
    def drawn(seed: int, step: int) -> list[Any]:
        return [row.order.tolist() for row, *_ in _task(seed=seed).examples(step)]

    assert drawn(0, 1) == drawn(0, 1)
    assert len({str(drawn(seed, step)) for seed in range(2) for step in (1, 2)}) == 4
    assert len({str(order) for order in drawn(0, 1)}) == 3


def test_counts_and_size_are_of_targets_and_tokens() -> None:
    task = _task()
    for batch in (*task.validation(), *micro_batches(task, 1, 2)):
        assert task.counts(batch) == {"permuted": batch.targets.numel()}
        assert task.size(batch) == batch.tokens.numel()


@pytest.mark.parametrize(
    ("validation", "tokens", "rows", "places"),
    [(300, 90, 6, 1), (300, 216, 8, 2), (400, 1000, 10, 3), (300, 1, 1, 1), (25, 90, 1, 1)],
)
def test_held_out_text_is_few_long_places(validation: int, tokens: int, rows: int, places: int) -> None:
    task = _task(validation=validation, validation_tokens=tokens)
    (held_out,) = task.validation()
    assert held_out.tokens.shape == (rows, places, 24)
    firsts = held_out.tokens[:, :, :12].transpose(0, 1).flatten(1)
    assert torch.equal(firsts[0], task.corpus.validation[: 12 * rows].long())
    if places > 1:
        assert torch.equal(firsts[-1], task.corpus.validation[-12 * rows - 12 : -12].long())


def test_validation_is_the_same_whatever_the_seed() -> None:
    for one, two in zip(_task().validation(), _task(seed=5).validation(), strict=True):
        assert all(map(torch.equal, one, two))


class _Frequencies(nn.Module):
    """Guesses by frequency."""

    def __init__(self, corpus: Corpus) -> None:
        super().__init__()
        self.config = XLNetConfig(vocab=VOCAB + 2, layers=1, heads=1, width=2, pad=None, end=None)
        counts = torch.bincount(corpus.train, minlength=VOCAB + 2) + 1
        self.logits = nn.Parameter(counts.double().log(), requires_grad=False)

    def forward(self, tokens: Tensor, segments: Tensor, *, targets: Tensor, **_: Any) -> tuple[Tensor, list[Tensor]]:
        return self.logits.expand(*targets.shape, -1), [torch.zeros(len(tokens), 0, 2)]


def test_baseline_is_what_a_model_by_frequency_reaches() -> None:
    task = _task()
    found = evaluate(_Frequencies(task.corpus), task, task.validation(), torch.float32)
    assert found["permuted"] == pytest.approx(task.baselines["permuted"], rel=1e-5)


def _row_loss(model: XLNetLMHead, batch: Rows, memory: Any) -> tuple[float, Any]:
    options = {"order": batch.order, "targets": batch.targets, "memory": memory, "remember": True}
    logits, after = model(batch.tokens, batch.segments, **options)
    labels = batch.tokens.gather(1, batch.targets)
    return -logits.log_softmax(-1).gather(2, labels[..., None]).sum().item(), after


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("memory", [5, 12, 30, 100])
def test_steps_remember_the_first_parts_before_and_an_epoch_begins_anew(memory: int, parts: int) -> None:
    task, model = _task(), _model(memory=memory)
    with torch.no_grad():
        for step in range(1, 7):
            if step in (1, 5):
                remembered = None
            expected, remembered = _row_loss(model, task.collate(task.examples(step)), remembered)
            found = sum(task.losses(model, batch, 0.0)["permuted"].item() for batch in micro_batches(task, step, parts))
            assert found == pytest.approx(expected, rel=1e-5)
    kept = task.carried(model)["states"]
    assert kept.shape == (1, 2, 3, memory, 8) and not kept.requires_grad
    held = min(memory, 24)
    torch.testing.assert_close(kept[0, :, :, memory - held :], torch.stack(remembered), atol=1e-6, rtol=0)


def test_evaluation_reads_rows_one_after_the_other_and_leaves_the_streams_alone() -> None:
    task, model = _task(validation_tokens=216), _model()
    (held_out,) = task.validation()
    losses, memory = [], None
    with torch.no_grad():
        task.losses(model, task.collate(task.examples(1)), 0.0)
        before = task.carried(model)["states"].clone()
        for row in zip(*held_out, strict=True):
            loss, memory = _row_loss(model, Rows(*row, torch.zeros(2), torch.zeros(2)), memory)
            losses.append(loss)
    mean = sum(losses) / held_out.targets.numel()
    assert evaluate(model, task, [held_out], torch.float32)["permuted"] == pytest.approx(mean, rel=1e-5)
    assert torch.equal(task.carried(model)["states"], before)


def test_tokenizer_puts_marks_where_xlnet_has_them() -> None:
    tokenizer = _tokenizer()
    assert add_marks(tokenizer) == MARKS
    assert tokenizer.get_vocab_size() == VOCAB + 2
    assert tokenizer.encode("ab").tokens == ["a", "b", SEP, CLS]
    pair = tokenizer.encode("ab", "c")
    assert pair.tokens == ["a", "b", SEP, "c", SEP, CLS]
    assert pair.type_ids == [0, 0, 0, 1, 1, 2]


def _settings(folder: Path, **changes: Any) -> XLNetSettings:
    text = folder / "text"
    text.write_text("".join(f"{i % 7} times {'abcdefg'[i % 7]}\n" for i in range(200)))
    tiny = {
        "text": str(text), "tokens": "characters", "layers": 1, "heads": 2, "width": 32, "hidden": 32, "context": 32,
        "memory": 16, "batch": 8, "steps": 120, "lr": 1e-2, "validation_tokens": 500, "evaluate_every": 60,
    }  # fmt: skip
    return XLNetSettings(**(tiny | changes))


def test_xlnet_beats_the_frequencies_and_its_folder_can_be_read(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", _settings(tmp_path), "cpu")
    last = [*run.steps()][-1]
    assert last.val_losses["permuted"] < 0.7 * run.task.baselines["permuted"]
    assert metrics.read(run.folder)[-1]["baseline_permuted"] == run.task.baselines["permuted"]
    loaded = XLNetLMHead.from_pretrained(run.model_path)
    found = evaluate(loaded, run.task, run.task.validation(), torch.float32)
    assert found["loss"] == pytest.approx(run.best_loss, rel=1e-5)
    peer = transformers.XLNetLMHeadModel.from_pretrained(run.model_path).eval()
    row, *_ = run.task.examples(1)[0]
    with torch.no_grad():
        ours, _ = loaded(row.tokens[None], row.segments[None], order=row.order[None], targets=row.targets[None])
        theirs = peer(
            row.tokens[None], token_type_ids=row.segments[None], perm_mask=_authors_mask(row)[None].float(),
            target_mapping=nn.functional.one_hot(row.targets, 32)[None].float(),
        ).logits  # fmt: skip
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    XLNetForSequenceClassification.with_new_head(run.model_path, labels=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads: expected a divisor of width=128, got 3"),
        ({"width": 127, "heads": 1}, "width: expected an even number"),
        ({"memory": 0}, "memory: expected a number from 1 to"),
        ({"context": 8}, "context: expected a number from 9 to"),
        ({"predict": 0}, "predict: expected a number from 1 to"),
        ({"context": 16, "predict": 12}, "predict: expected at most 11 of context=16, got 12"),
        ({"attention": "torch"}, "attention: expected one of pyattn, got torch"),
        ({"clamp": 0}, "clamp: expected a number from 1 to"),
    ],
)
def test_settings_that_do_not_go_together_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pyattn.RangeError, match=message):
        XLNetSettings(**options)


@pytest.mark.parametrize(("context", "predict"), [(9, 5), (10, 5), (16, 11), (17, 13)])
def test_as_many_targets_as_settings_allow_fit(context: int, predict: int) -> None:
    settings = XLNetSettings(context=context, predict=predict)
    assert _drawn_row(sizes=Sizes(context, settings.predicted)).targets.shape == (predict,)


def test_settings_reach_the_model() -> None:
    given = {"layers": 3, "heads": 2, "width": 10, "hidden": 7, "memory": 9, "clamp": 4, "dropout": 0.25}
    expected = XLNetConfig(vocab=300, **given, reuse=16, pad=None, end=0)
    assert XLNetSettings(**given, context=33).config(300) == expected
    assert XLNetSettings(tokens="characters").config(300).end is None
    assert XLNetSettings(context=512).predicted == 85


def test_command_trains_shows_the_baseline_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    output = command(
        *("train", "xlnet", "--text", argparse.__file__, "--layers", 1, "--width", 16, "--hidden", 16),
        *("--context", 16, "--memory", 24, "--batch", 4, "--vocab", 300, "--steps", 4, "--device", "cpu"),
        *("--out", out),
    )
    assert re.search(r"XLNetLMHead with [\d,]+ parameters and pyattn attention on cpu; .* 4 streams with a row", output)
    assert re.search(r"step     4/4  validation [\d.]+  permuted [\d.]+ \(of [\d.]+\)", output)
    command("train", "xlnet", "--out", out, "--resume", "--steps", 6)
    assert [line["step"] for line in metrics.read(out)] == [1, 2, 3, 4, 5, 6]
    assert load_file(out / "checkpoint.safetensors")["carry.states"].shape == (1, 1, 4, 24, 16)
    assert XLNetLMHead.from_pretrained(out / "model").config.reuse == 8
    tokenizer = Tokenizer.from_file(str(out / "model" / "tokenizer.json"))
    assert tokenizer.encode("def", "main").tokens[-2:] == [SEP, CLS]
