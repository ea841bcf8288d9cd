"""Language data, schedules, loop, checkpoints and curves."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

import pyattn
from pyattn.files import WriteError, replacing
from pyattn.training import checkpoint, metrics, plot
from pyattn.training.checkpoint import CheckpointError
from pyattn.training.language import Corpus, LanguageTask, load_corpus, training_starts, windows, write_sample
from pyattn.training.loop import DivergedError, train
from pyattn.training.recipes import GPTSettings
from pyattn.training.run import Run, checkpoint_path, open_run
from pyattn.training.schedules import learning_rate
from pyattn.training.text import TextError

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = Path(argparse.__file__)  # 100 kB of real text on every machine
TINY = {
    "text": str(TEXT), "attention": "torch", "seed": 0, "steps": 6, "layers": 2, "heads": 2, "width": 32, "context": 32,
    "batch": 4, "vocab": 300, "lr": 1e-2, "dropout": 0.1, "dtype": "float32",
}  # fmt: skip


def _corpus(tmp_path: Path, source: Path | None = TEXT, tokens: str = "bpe") -> Corpus:
    return load_corpus(source, tokens=tokens, vocab=300, context=32, batch=4, cache=tmp_path / "cache")


def _open(folder: Path, given: dict | None = None, resume: bool = False, overwrite: bool = False) -> Run:
    given = given or {}
    return open_run(folder, GPTSettings, TINY | given, set(given), "cpu", resume=resume, overwrite=overwrite)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_corpus_tokens_decode_to_the_text(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path)
    tokens = torch.cat([corpus.train, corpus.validation]).tolist()
    assert corpus.tokenizer.decode(tokens) == TEXT.read_text("utf-8")
    assert 0.04 < len(corpus.validation) / len(tokens) < 0.06


def test_corpus_second_load_comes_from_the_cache(tmp_path: Path) -> None:
    first = _corpus(tmp_path)
    (stored,) = (tmp_path / "cache").iterdir()
    written = stored.stat().st_mtime_ns
    second = _corpus(tmp_path)
    assert torch.equal(first.train, second.train)
    assert first.tokenizer.to_str() == second.tokenizer.to_str()
    assert stored.stat().st_mtime_ns == written


def test_corpus_damaged_cache_is_made_again(tmp_path: Path) -> None:
    first = _corpus(tmp_path)
    (stored,) = (tmp_path / "cache").iterdir()
    stored.write_bytes(stored.read_bytes()[:1000])
    assert torch.equal(_corpus(tmp_path).train, first.train)


@pytest.mark.parametrize("change", ["number", "name", "tokenizer", "digest", "form"])
def test_corpus_changed_cache_is_made_again(tmp_path: Path, change: str) -> None:
    """A run goes on, by its digest of the text, with the tokens that are stored."""
    first = _corpus(tmp_path)
    (stored,) = (tmp_path / "cache").iterdir()
    with safe_open(stored, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = min(tensors)
    if change == "number":
        tensors[name][0] += 1
    elif change == "name":
        tensors["other"] = tensors.pop(name)
    elif change == "form":
        tensors[name] = tensors[name][:, None].repeat(1, 2)
    else:
        header[change] = header[change].replace("a", "b")
    save_file(tensors, stored, metadata=header)
    assert torch.equal(_corpus(tmp_path).train, first.train)


def test_corpus_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    _corpus(tmp_path)
    (stored,) = (tmp_path / "cache").iterdir()
    stored.unlink()
    stored.mkdir()
    with pytest.raises(WriteError, match=re.escape(f"cannot write {stored}: Is a directory")):
        _corpus(tmp_path)


def test_corpus_folder_reads_every_visible_file(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "part").mkdir(parents=True)
    (folder / "a.txt").write_text("alpha " * 300)
    (folder / "part" / "b").write_text("beta " * 300)
    (folder / ".hidden").write_bytes(b"\xff")
    corpus = _corpus(tmp_path, folder)
    text = corpus.tokenizer.decode(torch.cat([corpus.train, corpus.validation]).tolist())
    assert sorted([text.count("alpha"), text.count("beta")]) == [300, 300]


def test_corpus_end_of_text_mark_inside_a_text_stays_text(tmp_path: Path) -> None:
    source = tmp_path / "marks.txt"
    source.write_text("<|endoftext|> " * 500)
    corpus = _corpus(tmp_path, source)
    end = corpus.tokenizer.token_to_id("<|endoftext|>")
    assert int((torch.cat([corpus.train, corpus.validation]) == end).sum()) == 1  # where the document begins


def test_corpus_default_is_the_standard_library(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path, None)
    text = corpus.tokenizer.decode(torch.cat([corpus.train, corpus.validation]).tolist())
    assert "class ArgumentParser(" in text
    assert "class TestArgumentParser" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b" \n\t ", "is empty"),
        (b"abc \xff\xfe def", "byte 0xff at 4"),
        (b"too short", "one batch of 4 x 32"),
    ],
)
def test_corpus_bad_text_is_an_error(tmp_path: Path, content: bytes | None, message: str) -> None:
    source = tmp_path / "text.txt"
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(TextError, match=message):
        _corpus(tmp_path, source)


def test_corpus_of_characters_has_one_token_for_each(tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text("a🙂\u0301\r\n" * 200, newline="")  # combining marks and line ends are characters, too
    corpus = _corpus(tmp_path, source, "characters")
    assert corpus.tokenizer.get_vocab_size() == 5
    assert len(corpus.train) == 900
    assert len(corpus.validation) == 100
    assert corpus.tokenizer.decode(torch.cat([corpus.train, corpus.validation]).tolist()) == "a🙂\u0301\r\n" * 200


def test_windows_targets_are_the_next_tokens() -> None:
    inputs, targets = windows(torch.arange(1000), torch.tensor([0, 7, 983]), 16)
    assert inputs.shape == targets.shape == (3, 16)
    assert torch.equal(inputs[:, 0], torch.tensor([0, 7, 983]))
    assert torch.equal(inputs + 1, targets)


def test_training_starts_depend_on_seed_and_step_alone() -> None:
    def drawn(seed: int, step: int) -> list[int]:
        return training_starts(10000, batch=8, context=4, seed=seed, step=step)

    assert drawn(0, 1) == drawn(0, 1)
    assert len({tuple(drawn(seed, step)) for seed in range(3) for step in range(3)}) == 9


def test_training_starts_reach_both_ends_of_the_text() -> None:
    starts = {start for step in range(60) for start in training_starts(12, batch=4, context=4, seed=0, step=step)}
    assert starts == set(range(8))


@pytest.mark.parametrize("length", [33, 64, 65, 1000])
def test_validation_windows_stay_inside_the_text(length: int) -> None:
    corpus = Corpus(torch.arange(100), torch.arange(length), Tokenizer(models.BPE()), "")
    batches = LanguageTask(corpus, batch=3, context=32, validation_tokens=6 * 32, seed=0).validation()
    assert batches
    assert sum(len(inputs) for inputs, _ in batches) == min(6, (length - 1) // 32)
    assert all(torch.equal(inputs + 1, targets) for inputs, targets in batches)


def _rates(schedule: str) -> list[float]:
    return [learning_rate(schedule, step, steps=100, peak=2.0, warmup=10, floor=0.1) for step in range(1, 101)]


def test_schedules_warm_up_to_the_peak() -> None:
    for schedule in ("cosine", "noam", "constant"):
        rates = _rates(schedule)
        assert rates[0] == pytest.approx(0.2)
        assert max(rates) == rates[9] == pytest.approx(2.0)
        assert sorted(rates[9:], reverse=True) == rates[9:]


def test_schedule_cosine_ends_at_the_floor() -> None:
    rates = _rates("cosine")
    assert rates[54] == pytest.approx(1.1)  # half of the way from 10 to 100
    assert rates[-1] == pytest.approx(0.2)


def test_schedule_noam_is_the_paper_s() -> None:
    width, warmup = 512, 4000
    for step in (1, 3999, 4000, 4001, 100_000):
        paper = width**-0.5 * min(step**-0.5, step * warmup**-1.5)  # Vaswani et al. 2017, eq. 3
        peak = (width * warmup) ** -0.5
        assert learning_rate("noam", step, steps=10**6, peak=peak, warmup=warmup, floor=0.1) == pytest.approx(paper)


def test_run_tiny_model_loss_falls(tmp_path: Path) -> None:
    run = _open(tmp_path / "run", {"steps": 40, "dropout": 0.0})
    steps = list(run.steps())
    assert [step.step for step in steps] == list(range(1, 41))
    assert steps[0].loss == pytest.approx(5.7, abs=0.1)  # ln 300
    assert steps[-1].loss < 4.6
    assert steps[-1].val_loss < 4.6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_run_resumed_equals_uninterrupted_bitwise(tmp_path: Path, dtype: str) -> None:
    whole = _open(tmp_path / "whole", {"dtype": dtype})
    expected = [(step.loss, step.grad_norm, step.val_loss) for step in whole.steps()]
    first = _open(tmp_path / "parts", {"dtype": dtype})
    found = []
    for step in first.steps():
        found.append((step.loss, step.grad_norm, step.val_loss))
        if step.step == 3:
            first.save()
            break
    torch.manual_seed(999)  # whatever happens between the two processes
    second = _open(tmp_path / "parts", resume=True)
    found += [(step.loss, step.grad_norm, step.val_loss) for step in second.steps()]
    assert found == expected
    ours, theirs = second.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [line["step"] for line in metrics.read(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]


def test_run_resumed_drops_metrics_beyond_the_checkpoint(tmp_path: Path) -> None:
    run = _open(tmp_path / "run", {"steps": 30})  # evaluates, and so saves, every third step
    for step in run.steps():
        if step.step == 5:
            break
    assert [line["step"] for line in metrics.read(tmp_path / "run")] == [1, 2, 3, 4, 5]
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # killed while it wrote
    next(_open(tmp_path / "run", resume=True).steps())
    assert [line["step"] for line in metrics.read(tmp_path / "run")] == [1, 2, 3, 4]


def test_run_attentions_of_one_seed_give_the_same_losses(tmp_path: Path) -> None:
    with pyattn.use_backend("reference"):
        ours = [step.loss for step in _open(tmp_path / "a", {"attention": "pyattn", "dropout": 0.0}).steps()]
    torchs = [step.loss for step in _open(tmp_path / "b", {"dropout": 0.0}).steps()]
    assert ours == pytest.approx(torchs, rel=1e-4)


def _sample(run: Run) -> str:
    return write_sample(run.model, run.task.tokenizer, run.folder / "sample.txt", 20, seed=0)


def test_run_leaves_checkpoint_curve_metrics_and_sample(tmp_path: Path) -> None:
    run = _open(tmp_path / "run")
    list(run.steps())
    text = _sample(run)
    assert (tmp_path / "run" / "sample.txt").read_text("utf-8") == text
    assert text
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    model = ["model/config.json", "model/model.safetensors", "model/tokenizer.json"]
    files = ["checkpoint.safetensors", "loss.png", "metrics.jsonl", *model, "sample.txt"]
    assert sorted(_bytes(tmp_path / "run")) == files
    assert _sample(run) == text


def test_run_diverged_loss_is_an_error_and_keeps_the_weights(tmp_path: Path) -> None:
    run = _open(tmp_path / "run")
    with torch.no_grad():
        run.model.ln_f.bias.fill_(torch.nan)
    before = run.model.wte.weight.clone()
    with pytest.raises(DivergedError, match="--lr"):
        next(train(run.model, run.optimizer, run.task, run.settings))
    assert torch.equal(run.model.wte.weight, before)


def test_run_existing_checkpoint_is_not_overwritten_unasked(tmp_path: Path) -> None:
    list(_open(tmp_path / "run").steps())
    before = _bytes(tmp_path / "run")
    with pytest.raises(CheckpointError, match="--resume"):
        _open(tmp_path / "run")
    assert _bytes(tmp_path / "run") == before
    assert len(list(_open(tmp_path / "run", {"steps": 2}, overwrite=True).steps())) == 2


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_resume_truncated_checkpoint_is_an_error_and_nothing_changes(tmp_path: Path, length: int) -> None:
    run = _open(tmp_path / "run")
    list(run.steps())
    run.checkpoint_path.write_bytes(run.checkpoint_path.read_bytes()[:length])
    before = _bytes(tmp_path / "run")
    with pytest.raises(CheckpointError, match="truncated"):
        _open(tmp_path / "run", resume=True)
    assert _bytes(tmp_path / "run") == before


@pytest.mark.parametrize(("name", "value"), [("layers", 3), ("width", 64), ("seed", 1), ("attention", "pyattn")])
def test_resume_other_setting_is_an_error(tmp_path: Path, name: str, value: object) -> None:
    list(_open(tmp_path / "run").steps())
    with pytest.raises(CheckpointError, match=f"{name} is {TINY[name]} there and {value} here"):
        _open(tmp_path / "run", {name: value}, resume=True)


def test_resume_more_steps_goes_on(tmp_path: Path) -> None:
    list(_open(tmp_path / "run").steps())
    assert [step.step for step in _open(tmp_path / "run", {"steps": 9}, resume=True).steps()] == [7, 8, 9]
    with pytest.raises(CheckpointError, match="already at step 9"):
        _open(tmp_path / "run", {"steps": 8}, resume=True)


def test_resume_changed_text_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_bytes(TEXT.read_bytes())
    list(_open(tmp_path / "run", {"text": str(source)}).steps())
    source.write_text(source.read_text() + "more")
    with pytest.raises(CheckpointError, match="text is no longer"):
        _open(tmp_path / "run", resume=True)


def test_checkpoint_of_other_software_is_an_error(tmp_path: Path) -> None:
    save_file({"wte.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not written by"):
        checkpoint.load(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("meta", ["{", "[]", "[" * 100_000, '{"step": ' + "1" * 5000 + "}"])
def test_checkpoint_with_damaged_header_is_an_error(tmp_path: Path, meta: str) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"format": checkpoint.FORMAT, "meta": meta})
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.load(path)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that went three steps."""
    run = _open(tmp_path_factory.mktemp("stopped") / "run", {"evaluate_every": 3})
    for step in run.steps():
        if step.step == 3:
            break
    return run.folder


def _changed(stopped: Path, folder: Path, tensors: dict | None = None, **meta: object) -> str:
    """What resuming says after a change of the checkpoint: of tensors, None where they go, or of its header."""
    saved = checkpoint.load(stopped / "checkpoint.safetensors")
    kept = {name: t for name, t in (saved.tensors | (tensors or {})).items() if t is not None}
    header = {name: value for name, value in (saved.meta | meta).items() if value != "gone"}
    folder.mkdir()
    path = checkpoint_path(folder)
    save_file(kept, path, metadata={"format": checkpoint.FORMAT, "meta": json.dumps(header)})
    before = path.read_bytes()
    with pytest.raises(CheckpointError) as raised:
        _open(folder, resume=True)
    assert str(path) in str(raised.value)
    assert path.read_bytes() == before
    return str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", True), ("step", 0), ("step", -3), ("step", "3"), ("step", "gone"), ("step", 3.0),
        ("best_loss", math.nan), ("best_loss", math.inf), ("best_loss", 10**400), ("best_loss", "low"),
        ("best_loss", False), ("best_loss", "gone"), ("best_loss", -5.0), ("evaluations_since_best", -1),
        ("evaluations_since_best", None), ("settings", []), ("settings", "gone"), ("digest", 3), ("tokenizer", None),
        ("kind", "gone"),
    ],
)  # fmt: skip
def test_checkpoint_with_an_impossible_value_is_refused(
    stopped: Path, tmp_path: Path, name: str, value: object
) -> None:
    assert f"for its {name}" in _changed(stopped, tmp_path / "run", **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", "9"),
        ("steps", -1),
        ("steps", 10**400),
        ("lr", 10**400),
        ("layers", 2.0),
        ("layers", 10**9),
        ("compile", 1),
        ("lr", None),
        ("text", 3),
    ],
)
def test_checkpoint_with_an_impossible_setting_is_refused(
    stopped: Path, tmp_path: Path, name: str, value: object
) -> None:
    settings = checkpoint.load(stopped / "checkpoint.safetensors").meta["settings"]
    message = _changed(stopped, tmp_path / "run", settings=settings | {name: value})
    assert f"cannot be: {name}: expected " in message


def test_checkpoint_with_tensors_of_another_form_is_refused(stopped: Path, tmp_path: Path) -> None:
    """torch's fused AdamW reads beyond a moment that is smaller than its parameter."""
    moment = checkpoint.load(stopped / "checkpoint.safetensors").tensors["optimizer.0.exp_avg"]
    changes = [
        ("optimizer.0.exp_avg", torch.zeros(3), "is float32 [3] there"),
        ("optimizer.0.exp_avg", moment.double(), "is float64 ["),
        ("optimizer.0.exp_avg", None, "is missing there"),
        ("optimizer.0.exp_avg_sq", torch.full_like(moment, math.nan), "NaN"),
        ("optimizer.0.exp_avg_sq", torch.full_like(moment, math.inf), "infinity"),
        ("optimizer.0.exp_avg_sq", torch.full_like(moment, -1.0), "has negative numbers"),
        ("optimizer.0.step", torch.tensor(2.0), "is 2 at step 3"),
        ("optimizer.0.step", torch.tensor([3.0]), "is float32 [1] there"),
        ("optimizer.0.max_exp_avg_sq", moment, "it also has optimizer.0.max_exp_avg_sq"),
        ("optimizer.999.exp_avg", moment, "it also has optimizer.999.exp_avg"),
        ("optimizer.x", moment, "it also has optimizer.x"),
        ("momentum.0", moment, "it also has momentum.0"),
    ]
    for number, (name, value, message) in enumerate(changes):
        assert message in _changed(stopped, tmp_path / str(number), {name: value})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"evaluations_since_best": 99}, "it counts 99 evaluations in 3 steps"),
        ({"tokenizer": "x"}, "the tokenizer is no longer the one"),
    ],
)
def test_checkpoint_of_other_parts_is_refused(
    stopped: Path, tmp_path: Path, changed: dict[str, object], message: str
) -> None:
    assert message in _changed(stopped, tmp_path / "run", **changed)


def test_checkpoint_without_moments_is_refused(stopped: Path, tmp_path: Path) -> None:
    tensors = checkpoint.load(stopped / "checkpoint.safetensors").tensors
    gone = {name: None for name in tensors if name.startswith("optimizer.")}
    assert "optimizer.0.step is missing there" in _changed(stopped, tmp_path / "run", gone)


def test_model_folder_holds_all_of_one_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _open(tmp_path / "run", {"evaluate_every": 3})
    steps = run.steps()
    while next(steps).step < 3:
        pass
    before = _bytes(run.model_path)
    run.best_loss = math.inf

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Path, "write_text", fail)  # the end comes between the weights and the tokenizer
    with pytest.raises(ZeroDivisionError):
        run._save_model()
    assert _bytes(run.model_path) == before
    assert set(before) == {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize("lr", [float("inf"), float("nan"), 0.0])
def test_settings_with_impossible_lr_are_an_error(tmp_path: Path, lr: float) -> None:
    with pytest.raises(pyattn.RangeError, match="lr: expected a positive number"):
        _open(tmp_path / "run", {"lr": lr})


def test_training_that_diverges_leaves_no_broken_checkpoint(tmp_path: Path) -> None:
    run = _open(tmp_path / "run", {"lr": 1e30})
    with pytest.raises(DivergedError):
        list(run.steps())
    if run.checkpoint_path.exists():
        saved = checkpoint.load(run.checkpoint_path)
        assert all(t.isfinite().all() for name, t in saved.tensors.items() if name.startswith("model."))


def test_restore_other_model_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    list(_open(tmp_path / "run").steps())
    saved = checkpoint.load(tmp_path / "run" / "checkpoint.safetensors")
    for change in ({"width": 64}, {"layers": 1}, {"layers": 3}):
        other = _open(tmp_path / "other", change)
        before = {name: tensor.clone() for name, tensor in other.model.state_dict().items()}
        with pytest.raises(CheckpointError, match="another run"):
            checkpoint.restore(saved, other.model, other.optimizer)
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.model.state_dict().items())


def test_replacing_failure_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert _bytes(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"batch": 0}, {"vocab": 100}, {"lr": 0.0}, {"dtype": "int8"}, {"heads": 3}, {"seed": -1}]
)
def test_settings_bad_value_is_named(change: dict) -> None:
    with pytest.raises(pyattn.RangeError, match=next(iter(change))):
        GPTSettings(**(TINY | change))


def test_comparison_draws_every_run(tmp_path: Path) -> None:
    for name, seconds in (("a", 0.5), ("b", 1.0)):
        folder = tmp_path / name
        folder.mkdir()
        metrics.start(folder, 0)
        for step in (1, 2, 3):
            metrics.append(folder, step=step, loss=3.0 / step, tokens=100, seconds=seconds)
        metrics.append(folder, step=4, loss=0.5, tokens=100, seconds=90.0, val_loss=1.0)
    assert metrics.tokens_per_second(metrics.read(tmp_path / "a")) == 200
    picture = plot.comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "both.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("value", ["fast", None, True, [1], math.nan, math.inf, 10**400], ids=repr)
def test_metrics_that_are_no_numbers_are_an_error(tmp_path: Path, value: object) -> None:
    line = json.dumps({"step": 1, "loss": 2.0}) + "\n" + json.dumps({"step": 2, "loss": value}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(line)
    with pytest.raises(metrics.RunError, match=r"metrics\.jsonl is damaged \(line 2: loss cannot be "):
        metrics.read(tmp_path)


@pytest.mark.parametrize(
    "change", [{"step": 0}, {"step": 10**31}, {"tokens": 0}, {"seconds": -1}, {"loss": -1e31}], ids=str
)
def test_metrics_that_cannot_be_are_an_error(tmp_path: Path, change: dict[str, float]) -> None:
    line = {"step": 1, "loss": 2.0, "tokens": 10, "seconds": 0.5} | change
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(metrics.RunError, match=rf"metrics\.jsonl is damaged \(line 1: {next(iter(change))} cannot be "):
        metrics.read(tmp_path)


def test_metrics_of_the_largest_numbers_are_drawn(tmp_path: Path) -> None:
    lines = [{"step": 10**29 * i, "loss": 1e29 * (-1) ** i, "tokens": 10**29, "seconds": 1e-29} for i in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot.comparison([tmp_path], tmp_path / "picture.png").stat().st_size > 0


@pytest.mark.parametrize("steps", [[1, 3], [1, 2, 2], [2, 1], [1, 2], [1, 2, 4]], ids=str)
def test_metrics_without_a_step_are_not_gone_on_with(tmp_path: Path, steps: list[int]) -> None:
    for step in steps:
        metrics.append(tmp_path, step=step, loss=1.0)
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(metrics.RunError, match=r"metrics\.jsonl is damaged \(expected every step to 3 once"):
        metrics.start(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("name", ["a$x^$b", r"cost_$\frac$", "_under", "日本", "bad\udcff"])
def test_picture_shows_any_name_of_a_folder(tmp_path: Path, name: str, recwarn: pytest.WarningsRecorder) -> None:
    folder = tmp_path / name
    folder.mkdir()
    metrics.append(folder, step=1, loss=1.0, tokens=10, seconds=0.5)
    plot.comparison([folder], tmp_path / "picture.png")
    figure = Figure()
    plot._curves(figure.subplots(), [folder])
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert len(legend.get_texts()) == 2
    assert not recwarn.list


@pytest.mark.parametrize(
    "content",
    [None, "", "{not json}\n", "[" * 100_000 + "\n", '{"step": true}\n', '{"step": 1, "val_loss": 2.0}\n'],
    ids=["missing", "empty", "words", "deep", "step", "no-loss"],
)
def test_metrics_of_no_run_are_an_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(metrics.RunError, match=r"metrics\.jsonl"):
        metrics.read(tmp_path)
