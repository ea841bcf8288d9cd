"""Pictures with captions: what a folder may hold and all that can be wrong with it, training, and the commands."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from pyattn.check import RangeError, ShapeError
from pyattn.cli import app
from pyattn.decoding.pictures import draw_looks
from pyattn.models import CaptionConfig, ShowAttendTell
from pyattn.training import captions, images, metrics, scene_scores
from pyattn.training.caption_files import TRAIN, VALIDATION, read_folder
from pyattn.training.captions import PictureTask, SceneTask, load_pictures
from pyattn.training.hard import Reinforcement
from pyattn.training.images import ImageError, read_image
from pyattn.training.loop import _losses, adamw, train
from pyattn.training.recurrent_recipes import CaptionSettings
from pyattn.training.text import TextError

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = ["--width", 16, "--hidden", 16, "--grid-size", 16, "--score-size", 16, "--vocab", 450, "--batch", 4]


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _assert_refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert re.search(message, result.stderr), result.stderr
    assert result.stderr.startswith("pyattn: ") and "Traceback" not in result.output


def _draw(path: Path, size: tuple[int, int] = (20, 16), colour: Any = "red", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def _write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def _metadata(folder: Path, count: int = 6) -> Path:
    """An imagefolder of as many pictures with two captions each."""
    for i in range(count):
        _draw(folder / f"{i}.png", (16 + i, 20), (40 * i, 100, 0))
    rows = [f'{i}.png,"a picture, number {i} of {kind}"' for i in range(count) for kind in ("one", "two")]
    _write(folder / "metadata.csv", "\n".join(["file_name,caption", *rows]) + "\n")
    return folder


FORMS: dict[str, Callable[[Path], Any]] = {}


def _form(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    FORMS[make.__name__.strip("_")] = make
    return make


@_form
def _flickr8k(folder: Path) -> None:
    for name in "abc":
        _draw(folder / "Flicker8k_Dataset" / f"{name}.jpg")
    lines = [f"{name}.jpg#{i}\tA dog , number {i} ." for name in "abc" for i in range(2)]
    lines.append("gone.jpg.1#0\tIn no list and not there .")  # as one line of the published file is
    _write(folder / "Flickr8k_text" / "Flickr8k.token.txt", "\n".join(lines) + "\n")
    for part, name in (("train", "a"), ("dev", "b"), ("test", "c")):
        _write(folder / "Flickr8k_text" / f"Flickr_8k.{part}Images.txt", f"{name}.jpg\n")


@_form
def _flickr8k_csv(folder: Path) -> None:
    for name in "ab":
        _draw(folder / "Images" / f"{name}.jpg")
    _write(folder / "captions.txt", 'image,caption\na.jpg,A dog , running .\na.jpg,"A ""dog"", too"\nb.jpg,Two dogs\n')


@_form
def _coco(folder: Path) -> None:
    for part, name in (("train", "a"), ("val", "b")):
        _draw(folder / f"{part}2014" / f"{name}.jpg")
        content = {
            "info": {}, "images": [{"id": 7, "file_name": f"{name}.jpg"}],
            "annotations": [{"image_id": 7, "id": i, "caption": f"A dog {i}\nruns. "} for i in range(2)],
        }  # fmt: skip
        _write(folder / "annotations" / f"captions_{part}2014.json", content)


@_form
def _karpathy(folder: Path) -> None:
    splits = {"a": "train", "b": "restval", "c": "val", "d": "test"}
    for name in splits:
        if name != "d":
            _draw(folder / "val2014" / f"{name}.jpg")
    found = [
        {"filepath": "val2014", "filename": f"{name}.jpg", "split": split, "sentences": [{"raw": "A dog."}] * 2}
        for name, split in splits.items()
    ]
    _write(folder / "dataset_coco.json", {"images": found, "dataset": "coco"})


@_form
def _imagefolder_jsonl(folder: Path) -> None:
    for part, name in (("train", "a"), ("validation", "b")):
        _draw(folder / part / "x" / f"{name}.png")
        _write(folder / part / "metadata.jsonl", json.dumps({"file_name": f"x/{name}.png", "text": "A dog"}) + "\n\n")


@_form
def _imagefolder_csv(folder: Path) -> None:
    _metadata(folder, 2)


EXPECTED: dict[str, list[tuple[str, str | None, list[str]]]] = {
    "flickr8k": [
        ("a.jpg", TRAIN, ["A dog , number 0 .", "A dog , number 1 ."]),
        ("b.jpg", VALIDATION, ["A dog , number 0 .", "A dog , number 1 ."]),
    ],
    "flickr8k_csv": [("a.jpg", None, ["A dog , running .", 'A "dog", too']), ("b.jpg", None, ["Two dogs"])],
    "coco": [
        (name, part, ["A dog 0 runs.", "A dog 1 runs."]) for name, part in (("a.jpg", TRAIN), ("b.jpg", VALIDATION))
    ],
    "karpathy": [
        (name, part, ["A dog."] * 2) for name, part in (("a.jpg", TRAIN), ("b.jpg", TRAIN), ("c.jpg", VALIDATION))
    ],
    "imagefolder_jsonl": [("a.png", TRAIN, ["A dog"]), ("b.png", VALIDATION, ["A dog"])],
    "imagefolder_csv": [
        (f"{i}.png", None, [f"a picture, number {i} of {kind}" for kind in ("one", "two")]) for i in range(2)
    ],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_found_and_read(form: str, tmp_path: Path) -> None:
    FORMS[form](tmp_path)
    found = read_folder(tmp_path)
    assert [(each.path.name, each.part, [line.caption for line in each.lines]) for each in found] == EXPECTED[form]
    assert all(each.path.is_file() for each in found)


def _replace(folder: Path, name: str, old: str, new: str) -> None:
    path = folder / name
    content = path.read_text("utf-8")
    assert old in content
    path.write_text(content.replace(old, new, 1), encoding="utf-8")


TOKENS, TRAIN_JSON = "Flickr8k_text/Flickr8k.token.txt", "annotations/captions_train2014.json"
WRONG: list[tuple[str, tuple[str, str, str], str]] = [
    ("flickr8k", (TOKENS, "a.jpg#1\t", "a.jpg#1 "), "expected name.jpg#0, a tab and a caption in .*, line 2,"),
    ("flickr8k", (TOKENS, "a.jpg#1", "a.jpg"), "expected name.jpg#0, a tab and a caption in .*, line 2,"),
    ("flickr8k", (TOKENS, "A dog , number 1 .", " . "), r"expected a caption with words in .*, line 2, got '\.'"),
    ("flickr8k", ("Flickr8k_text/Flickr_8k.trainImages.txt", "a.jpg", "gone.jpg.1"), "line 7 names gone.jpg.1"),
    ("flickr8k_csv", ("captions.txt", "image,", "picture,"), "expected a column image in .*captions.txt, line 1, got"),
    ("flickr8k_csv", ("captions.txt", "b.jpg,Two dogs", "b.jpg"), "expected image,caption in .*captions.txt, line 4"),
    ("flickr8k_csv", ("captions.txt", "b.jpg", "c.jpg"), "captions.txt, line 4 names c.jpg, which is not in .*Images"),
    ("flickr8k_csv", ("captions.txt", "Two dogs", '"  "'), "expected a caption with words in .*captions.txt, line 4"),
    ("flickr8k_csv", ("captions.txt", "b.jpg", "../x/b.jpg"), "the name of a picture within .* line 4, got '../x"),
    ("flickr8k_csv", ("captions.txt", "b.jpg", "/etc/passwd"), "expected the name of a picture within .*passwd"),
    ("flickr8k_csv", ("captions.txt", "a.jpg,A dog", 'a.jpg,"A dog'), "captions.txt, line 2 is no CSV"),
    ("coco", (TRAIN_JSON, '"images"', '"pictures"'), "an object with a list images in .*train2014.json, got one"),
    ("coco", (TRAIN_JSON, '"image_id": 7', '"image_id": 8'), r"an image_id out of images in .*annotations\[0\], got 8"),
    ("coco", (TRAIN_JSON, '"caption"', '"text"'), r"a string caption in .*train2014.json, annotations\[0\], got"),
    ("coco", (TRAIN_JSON, '"a.jpg"', "3"), r"a string file_name in .*train2014.json, images\[0\]"),
    ("coco", (TRAIN_JSON, "{", ""), "train2014.json, line 1 is no JSON"),
    ("karpathy", ("dataset_coco.json", '"raw"', '"text"'), r"a string raw in .*images\[0\].sentences\[0\]"),
    ("karpathy", ("dataset_coco.json", '"split"', '"part"'), r"a string split in .*dataset_coco.json, images\[0\]"),
    ("karpathy", ("dataset_coco.json", "a.jpg", "x.jpg"), r"images\[0\].sentences\[0\] names x.jpg, which is not"),
    ("karpathy", ("dataset_coco.json", '"val2014"', '"../val2014"'), r"a filepath within .*images\[0\], got '../val"),
    ("karpathy", ("dataset_coco.json", '"val2014"', '"/val2014"'), r"a filepath within .*images\[0\], got '/val2014"),
    ("imagefolder_jsonl", ("train/metadata.jsonl", "A dog", "\\ud83d dog"), "text in .*.jsonl, line 1, got .*ud83d"),
    ("imagefolder_jsonl", ("train/metadata.jsonl", "x/a", "\\ud83d"), "expected text in .*.jsonl, line 1, got"),
    ("imagefolder_jsonl", ("train/metadata.jsonl", "A dog", 300000 * "a"), "at most 262,144 characters .*, line 1"),
    ("imagefolder_jsonl", ("train/metadata.jsonl", "file_name", "name"), "a string file_name in .*.jsonl, line 1"),
    ("imagefolder_jsonl", ("train/metadata.jsonl", '"text"', '"label"'), "a caption, in a field caption or text"),
    ("imagefolder_jsonl", ("train/metadata.jsonl", "{", "["), "metadata.jsonl, line 1 is no JSON"),
    ("imagefolder_csv", ("metadata.csv", "caption\n", "label\n"), "a caption, in a field caption or text, .* line 2"),
    ("imagefolder_csv", ("metadata.csv", '"a', '"' + 200000 * "a"), "metadata.csv, line 2 is no CSV"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "change", "message"), WRONG)
def test_files_of_another_shape_are_named_with_their_line(
    form: str, change: tuple[str, str, str], message: str, tmp_path: Path
) -> None:
    FORMS[form](tmp_path)
    _replace(tmp_path, *change)
    with pytest.raises(TextError, match=f"images: .*{message}"):
        read_folder(tmp_path)


def test_folders_of_no_form_or_of_two_say_what_is_looked_for(tmp_path: Path) -> None:
    for call, message in (
        (lambda: read_folder(tmp_path / "none"), "images: expected a folder, .*none does not exist"),
        (lambda: read_folder(_draw(tmp_path / "x.png")), "images: expected a folder, .*x.png is none"),
        (lambda: read_folder(tmp_path), r"expected one of Flickr8k.token.txt \(Flickr8k\), .* got none of them"),
    ):
        with pytest.raises(TextError, match=message):
            call()
    _flickr8k_csv(tmp_path)
    _metadata(tmp_path)
    with pytest.raises(TextError, match=r"got captions.txt and metadata.csv"):
        read_folder(tmp_path)
    _write(tmp_path / "empty" / "captions.txt", "")
    with pytest.raises(TextError, match=r"expected a header with image, caption, .*captions.txt is empty"):
        read_folder(tmp_path / "empty")
    _write(tmp_path / "headed" / "captions.txt", "image,caption\n")
    with pytest.raises(TextError, match=r"expected captions for training or validation, .*captions.txt has none"):
        read_folder(tmp_path / "headed")


def test_pictures_of_any_kind_become_rgb_of_one_size(tmp_path: Path) -> None:
    def read(image: Image.Image, name: str, **options: Any) -> torch.Tensor:
        image.save(tmp_path / name, **options)
        found = read_image(tmp_path / name, 8)
        assert found.shape == (3, 8, 8) and found.dtype is torch.uint8
        return found

    red = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    assert torch.equal(read(Image.new("RGB", (31, 9), "red"), "x.png"), red)
    assert torch.equal(read(Image.new("L", (5, 5), 77), "x.png"), torch.full((3, 8, 8), 77, dtype=torch.uint8))
    assert torch.equal(read(Image.new("1", (5, 5), 1), "x.png"), torch.full((3, 8, 8), 255, dtype=torch.uint8))
    deep = Image.fromarray(numpy.full((5, 5), 256 * 100, dtype=numpy.uint16))
    assert (read(deep, "deep.png").int() - 99).abs().max() <= 1
    cmyk = read(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "x.jpg", quality=100)
    assert (cmyk.int() - red.int()).abs().max() < 40
    clear = Image.new("RGBA", (5, 5), (255, 0, 0, 0))
    assert read(clear, "x.png").eq(255).all()  # what is not there is white
    half = read(Image.new("LA", (5, 5), (0, 128)), "x.png")
    assert (half.int() - 127).abs().max() <= 1
    palette = Image.new("P", (5, 5), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert torch.equal(read(palette, "x.gif"), red)
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "green", "blue")]
    assert torch.equal(read(frames[0], "moving.gif", save_all=True, append_images=frames[1:]), red)
    assert read(Image.new("RGB", (1, 900), "red"), "thin.png").shape == (3, 8, 8)


def test_the_middle_square_is_kept_and_a_cameras_note_followed(tmp_path: Path) -> None:
    wide = Image.new("RGB", (30, 10), "black")
    wide.paste("white", (10, 0, 20, 10))
    wide.save(tmp_path / "wide.png")
    assert read_image(tmp_path / "wide.png", 4).eq(255).all()
    upright = Image.new("RGB", (8, 8), "black")
    upright.paste("white", (0, 0, 8, 4))
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    upright.save(tmp_path / "turned.jpg", exif=turned, quality=100)
    found = read_image(tmp_path / "turned.jpg", 8)
    assert found[:, :3].max() < 60 and found[:, 5:].min() > 190


def test_a_picture_in_two_parts_and_two_files_of_captions_are_refused(tmp_path: Path) -> None:
    FORMS["karpathy"](tmp_path)
    _replace(tmp_path, "dataset_coco.json", "c.jpg", "a.jpg")
    with pytest.raises(TextError, match=r"a.jpg in one part, got validation in .*images\[2\].* and train in"):
        read_folder(tmp_path)
    _write(tmp_path / "dataset_flickr8k.json", {"images": []})
    with pytest.raises(TextError, match=r"one file of captions, got .*dataset_coco.json and .*dataset_flickr8k.json"):
        read_folder(tmp_path)


def _bomb(folder: Path) -> Path:
    """A file of some bytes that says it had 60,000 x 60,000 pixels."""
    whole = _draw(folder / "bomb.png").read_bytes()
    header = b"IHDR" + (60000).to_bytes(4, "big") * 2 + whole[24:29]
    path = folder / "bomb.png"
    path.write_bytes(whole[:12] + header + zlib.crc32(header).to_bytes(4, "big") + whole[33:])
    return path


def _large(folder: Path) -> Path:
    path = folder / "large.png"
    Image.new("1", (9000, 9000)).save(path)
    return path


def _floating(folder: Path) -> Path:
    path = folder / "floating.tiff"
    Image.new("F", (8, 8), 0.5).save(path)
    return path


def _cut(folder: Path) -> Path:
    noise = numpy.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=numpy.uint8)
    path = folder / "cut.jpg"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    return path


def _text(folder: Path) -> Path:
    return _write(folder / "text.jpg", "no picture")


def _broken(folder: Path) -> Path:
    path = _draw(folder / "broken.png")
    content = bytearray(path.read_bytes())
    content[45:60] = bytes(15)
    path.write_bytes(bytes(content))
    return path


DAMAGED = {
    _bomb: f"bomb.png has .*more than {images.MOST_PIXELS:,}",
    _large: f"large.png has 9,000 x 9,000 pixels, more than {images.MOST_PIXELS:,}",
    _floating: "floating.tiff is damaged .its numbers are floating",
    _cut: "cannot read .*cut.jpg: image file is truncated",
    _text: "cannot read .*text.jpg: cannot identify image file",
    _broken: "broken.png",
    lambda folder: folder / "none.png": "cannot read .*none.png: No such file",
    lambda folder: folder: "cannot read .*: Is a directory",
}


@pytest.mark.parametrize("make", DAMAGED)
@pytest.mark.filterwarnings("error")
def test_files_that_are_no_pictures_are_named(make: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=f"image: .*{DAMAGED[make]}"):
        read_image(make(tmp_path), 8)


def _load(folder: Path, **options: int) -> captions.CaptionCorpus:
    options = {"vocab": 300, "context": 32, "size": 8} | options
    return load_pictures(folder, cache=folder / "cache", **options)


def test_a_corpus_has_every_caption_with_its_picture_and_holds_some_out(tmp_path: Path) -> None:
    corpus = _load(_metadata(tmp_path))
    assert corpus.images.shape == (6, 3, 8, 8)
    assert sorted(corpus.train + corpus.validation) == list(range(12))
    train, held_out = ({int(corpus.pictures[row]) for row in rows} for rows in (corpus.train, corpus.validation))
    assert not train & held_out and len(held_out) == 1  # whole pictures
    for row in range(12):
        image, tokens = corpus.example(row)
        i = int(corpus.pictures[row])
        assert corpus.tokenizer.decode(tokens.tolist()) == f"a picture, number {i} of {('one', 'two')[row % 2]}"
        assert torch.equal(image, read_image(tmp_path / f"{i}.png", 8)) and image[0, 0, 0] == 40 * i
    again = _load(tmp_path)
    assert again.digest == corpus.digest and torch.equal(again.images, corpus.images)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    _draw(tmp_path / "0.png", (16, 20), (1, 100, 0))
    assert _load(tmp_path).digest != corpus.digest


def test_parts_of_a_folder_are_its_own(tmp_path: Path) -> None:
    _karpathy(tmp_path)
    corpus = _load(tmp_path)
    assert [int(corpus.pictures[row]) for row in corpus.train] == [0, 0, 1, 1]
    assert [int(corpus.pictures[row]) for row in corpus.validation] == [2, 2]
    _replace(tmp_path, "dataset_coco.json", '"train"', '"val"')
    _replace(tmp_path, "dataset_coco.json", '"restval"', '"val"')
    with pytest.raises(TextError, match=r"expected pictures for training, those of .* are all for validation"):
        _load(tmp_path)


def test_a_caption_that_is_too_long_and_a_picture_alone_are_refused(tmp_path: Path) -> None:
    _metadata(tmp_path)
    with pytest.raises(
        TextError, match=r"metadata.csv, line \d+ has \d+ tokens with its end mark, more than the 4 pos"
    ):
        _load(tmp_path, context=4)
    with pytest.raises(TextError, match="expected at least 2 pictures, one for validation, got 1"):
        _load(_metadata(tmp_path / "one", 1))


def test_an_enormous_file_is_not_read(tmp_path: Path) -> None:
    _metadata(tmp_path)
    with (tmp_path / "1.png").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ImageError, match=r"1\.png has 1,099,511,627,776 bytes, more than"):
        _load(tmp_path)


def test_captions_of_scenes_must_fit_the_context() -> None:
    with pytest.raises(RangeError, match=r"context: expected at least .* with --vocab 260, got 64"):
        SceneTask(vocab=260, context=64, batch=1, seed=0, coverage=0.0, reinforcement=None)
    with pytest.raises(RangeError, match="seed: expected a number below 2"):
        _settings(seed=2**32)


def test_an_epoch_has_every_caption_once_by_seed_and_step_alone(tmp_path: Path) -> None:
    corpus = _load(_metadata(tmp_path))
    task = PictureTask(corpus, batch=4, seed=0, coverage=0.0, reinforcement=None)
    for epoch in range(2):
        steps = range(1 + 3 * epoch, 4 + 3 * epoch)
        found = sorted(tuple(tokens.tolist()) for step in steps for _, tokens in task.examples(step))
        assert found == sorted(tuple(corpus.captions[row].tolist()) for row in corpus.train)
    other = PictureTask(corpus, batch=4, seed=0, coverage=0.0, reinforcement=None)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(task.examples(5), other.examples(5), strict=True))
    batch = task.collate(task.examples(1))
    assert batch.tokens_in[0, 0] == 1 and torch.equal(batch.tokens_in[0, 1:3], batch.tokens_out[0, :2])
    assert task.counts(batch) == {"caption": task.size(batch)}


def _settings(**options: Any) -> CaptionSettings:
    sizes = {"width": 16, "hidden": 16, "grid_size": 16, "score_size": 16, "vocab": 450, "batch": 8}
    return CaptionSettings(**sizes | {"steps": 3, "lr": 1e-3, "evaluate_every": 3} | options)


def _scenes(settings: CaptionSettings) -> SceneTask:
    return SceneTask(
        vocab=450,
        context=settings.context,
        batch=settings.batch,
        seed=settings.seed,
        coverage=settings.coverage,
        reinforcement=settings.reinforcement(),
    )


def _trained(settings: CaptionSettings) -> tuple[list[Any], Any, SceneTask]:
    task = _scenes(settings)
    torch.manual_seed(0)
    model = settings.model(task)
    return list(train(model, adamw(model, settings), task, settings)), model, task


def test_a_step_may_be_computed_in_parts() -> None:
    whole, model, _ = _trained(_settings(coverage=0.5))
    parts, other, _ = _trained(_settings(coverage=0.5, accumulate=3))
    assert {name for step in whole for name in step.losses} == {"caption", "coverage", "loss"}
    for one, two in zip(whole, parts, strict=True):
        assert one.losses == pytest.approx(two.losses, rel=1e-4)
        assert one.grad_norm == pytest.approx(two.grad_norm, rel=1e-3)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_doubly_stochastic_term_has_the_captions_divisor() -> None:
    task = _scenes(_settings(coverage=0.5))
    torch.manual_seed(0)
    model = _settings().model(task).eval()
    batch = task.collate(task.examples(1))
    losses = task.losses(model, batch, 0.0)
    looks = model(batch.images, batch.tokens_in, return_looks=True)[1]
    looked = (looks.weights * (batch.tokens_out != 0)[..., None]).sum(1)
    torch.testing.assert_close(losses["coverage"], 0.5 * (1 - looked).square().sum())
    assert task.counts(batch)["coverage"] == task.counts(batch)["caption"] == task.size(batch)


def test_a_baseline_is_the_moving_average_of_whole_steps_and_is_carried() -> None:
    settings = _settings(hard=True)
    steps, model, task = _trained(settings)
    carried = task.carried(model)["baseline"]
    assert carried < 0
    assert torch.equal(task.carried(model)["baseline"], carried)  # asking changes nothing
    other = _scenes(settings)
    other.restore_carried(model, {"baseline": carried})
    assert torch.equal(other.carried(model)["baseline"], carried)
    assert not _scenes(_settings()).carried(_settings().model(task))
    rewards = [-step.losses["caption"] * step.tokens / settings.batch for step in steps]
    average = sum(0.1 * 0.9 ** (2 - i) * reward for i, reward in enumerate(rewards))
    assert carried.item() == pytest.approx(average, rel=1e-5)


def test_a_baseline_moves_when_the_next_step_begins(tmp_path: Path) -> None:
    settings = _settings(hard=True)
    folder = _load(_metadata(tmp_path))
    for task in (
        _scenes(settings),
        PictureTask(folder, batch=4, seed=0, coverage=0.0, reinforcement=settings.reinforcement()),
    ):
        assert task.reinforcement is not None
        for log_p in (-4.0, -8.0):  # of two parts of one step
            task.reinforcement.term(torch.tensor([log_p]), torch.zeros(1, 1), torch.zeros(1, 1))
        assert task.reinforcement.baseline == 0
        task.examples(2)
        assert task.reinforcement.baseline.item() == pytest.approx(0.1 * -6)


def test_what_choices_learn_by_is_refused_where_nothing_is_chosen() -> None:
    for options in ({"reinforce": 1.0}, {"entropy": 0.1, "hard": True, "temperature": 1.0}, {"temperature": 1.0}):
        with pytest.raises(
            RangeError, match=r"(reinforce|entropy): expected --hard beside it|temperature: expected None without"
        ):
            _settings(**options)


def test_hard_attention_changes_the_gradient_and_not_the_loss() -> None:
    task = _scenes(_settings(hard=True))
    model = _settings(hard=True).model(task).train()
    batch = task.collate(task.examples(1))
    found = []
    for coefficient in (0.0, 5.0):
        task.reinforcement = Reinforcement(weight=coefficient, entropy_weight=0.01)
        torch.manual_seed(1)
        model.zero_grad()
        losses = _losses(model, task, batch, torch.float32, 0.0)
        losses["caption"].backward()
        found.append((losses["caption"].item(), model.score.weight.grad.clone(), model.output.weight.grad.clone()))
    assert found[0][0] == found[1][0]
    assert not torch.allclose(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][2], found[1][2])  # words learn from words


@pytest.mark.parametrize("options", [(), ("--hard", "--coverage", 0.1, "--dropout", 0.2)])
def test_a_run_goes_on_to_the_bit(options: tuple[object, ...], tmp_path: Path) -> None:
    same = (*TINY, "--schedule", "constant", "--warmup", 1, "--device", "cpu", *options)
    folder = _metadata(tmp_path / "pictures")
    for steps in (4, 2):
        _metadata(folder)
        out = tmp_path / str(steps)
        sizes = ("--image-size", 8, "--layers", 2)
        result = _run("train", "caption", "--images", folder, *sizes, *same, "--out", out, "--steps", steps)
        assert result.exit_code == 0, result.output
        assert "captions right" not in result.output  # these are no scenes
    cut = tmp_path / "2"
    assert _run("train", "caption", "--out", cut, "--resume", "--steps", 4).exit_code == 0
    losses = [[line["loss"] for line in metrics.read(out)] for out in (tmp_path / "4", cut)]
    assert losses[0] == losses[1]
    _assert_refused(_run("train", "caption", "--out", cut, "--resume", "--hidden", 8), "hidden is 16 there and 8 here")
    _draw(folder / "0.png", (9, 9), "blue")
    _assert_refused(_run("train", "caption", "--out", cut, "--resume", "--steps", 5), "text is no longer the one")


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "_VALIDATION_SCENES", 16)
    monkeypatch.setattr(captions, "_TOKENIZED_SCENES", 200)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captions, "_VALIDATION_SCENES", 16)
        patch.setattr(scene_scores, "score_scenes", partial(scene_scores.score_scenes, count=10))
        result = _run("train", "caption", *TINY, "--out", out, "--steps", 2, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert re.search(r"seen pairs of colour and shape: 0.0% of \d+ captions right", result.output)
    assert "held-out pairs: 0.0% of" in result.output
    return out / "model"


def test_pictures_are_described_and_drawn_beside_their_words(trained: Path, tmp_path: Path) -> None:
    names = [_draw(tmp_path / name, (70, 50 + i)) for i, name in enumerate(("a.png", "b.jpg"))]
    result = _run("caption", "--model", trained, "--pictures", tmp_path / "looks", "--tokens", 7, *names)
    assert result.exit_code == 0, result.output
    assert [line.split("\t")[0] for line in result.stdout.splitlines()] == list(map(str, names))
    assert sorted(path.name for path in (tmp_path / "looks").iterdir()) == ["1.png", "2.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "looks").iterdir())


def test_a_picture_that_cannot_be_read_is_named_and_nothing_written(trained: Path, tmp_path: Path) -> None:
    good, bad = _draw(tmp_path / "a.png"), _cut(tmp_path)
    result = _run("caption", "--model", trained, "--pictures", tmp_path / "looks", good, bad)
    _assert_refused(result, "image: cannot read .*cut.jpg: image file is truncated")
    assert not result.stdout and not (tmp_path / "looks").exists()
    folder = _metadata(tmp_path / "pictures")
    (folder / "3.png").write_bytes(bad.read_bytes())
    out = tmp_path / "run"
    _assert_refused(_run("train", "caption", "--images", folder, *TINY, "--out", out), "cannot read .*3.png")
    assert not out.exists() and not list(tmp_path.rglob("*.safetensors"))


def test_models_of_another_kind_are_refused(trained: Path, tmp_path: Path) -> None:
    picture = _draw(tmp_path / "a.png")
    settings = json.loads((trained / "config.json").read_text("utf-8"))
    own = {name: settings[name] for name in CaptionConfig.__dataclass_fields__}
    ShowAttendTell(CaptionConfig(**own | {"image_size": None})).save_pretrained(tmp_path / "grids")
    (tmp_path / "grids" / "tokenizer.json").write_text((trained / "tokenizer.json").read_text("utf-8"))
    _assert_refused(_run("caption", "--model", tmp_path / "grids", picture), "expected a model with an encoder")
    _assert_refused(_run("caption", "--model", tmp_path / "none", picture), "expected a folder, there is no")
    _assert_refused(_run("train", "caption", "--image-size", 32), "image_size: expected 64 without --images")
    _assert_refused(_run("train", "caption", "--layers", 7), r"image_size: expected a multiple of 2\^layers = 2\^7")


def test_looks_of_another_shape_are_refused(tmp_path: Path) -> None:
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    for words, shape in ((["a"], (2, 4)), (["a"], (1, 5)), (["a"], (1, 0))):
        with pytest.raises(ShapeError, match=r"weights: expected \[1, L\], a square grid"):
            draw_looks(tmp_path / "x.png", image, words, torch.ones(shape))
    draw_looks(tmp_path / "x.png", image, ["$x$", "\0"] * 4, torch.zeros(8, 4))
    draw_looks(tmp_path / "none.png", image, [], torch.zeros(0, 4))
