"""Pictures and their captions in a user's folder. Which of these forms it has is found by its files:

    Flickr8k      Flickr8k.token.txt: `name.jpg#0`, a tab and a caption per line; Flickr_8k.trainImages.txt,
                  .devImages.txt and .testImages.txt name the pictures of each part
    its CSV       captions.txt, with the header image,caption
    COCO          annotations/captions_train*.json and captions_val*.json, beside the folders of the pictures
    Karpathy      dataset_*.json, of Flickr8k, Flickr30k or COCO, with parts
    imagefolder   metadata.csv or metadata.jsonl with file_name and caption (or text), here or in train/ and validation/

Pictures are looked for in the folder itself, and in that of their form (Flicker8k_Dataset, Images, train2014, ...).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from pyattn.tokens import PORTION
from pyattn.training import text
from pyattn.training.text import TextError

TRAIN, VALIDATION, OUT = "train", "validation", "out"  # parts; of the last one nothing is read
_PARTS = {"train": TRAIN, "restval": TRAIN, "val": VALIDATION, "validation": VALIDATION, "dev": VALIDATION}
_FLICKR_LISTS = {"train": TRAIN, "dev": VALIDATION, "test": OUT}
_FLICKR_IMAGES = ("Images", "Flicker8k_Dataset", "Flickr8k_Dataset")
_CAPTION_COLUMNS = ("caption", "text")


class Line(NamedTuple):
    """A caption and where it stands."""

    caption: str
    where: str


@dataclass(frozen=True, slots=True)
class Described:
    """A picture and its captions."""

    path: Path
    part: str | None  # TRAIN or VALIDATION; None where the folder does not say
    lines: list[Line] = field(default_factory=list)


class _Entry(NamedTuple):
    """A caption of a picture as a file has it."""

    name: str
    caption: str
    where: str
    part: str | None
    folders: tuple[Path, ...]  # where the picture may be


def read_folder(folder: Path) -> list[Described]:
    """The pictures of a folder that have captions, in the order in which its files name them.

    Where lists divide the pictures, those of the test part and those in no list are left out, and not looked for.

    Raises:
        TextError: the folder has none of the forms, or two of them; a file is of another shape; a caption has no words;
            a picture is missing, or outside the folder. The file and the line are named, in JSON the entry.
    """
    if not folder.is_dir():
        raise TextError(f"images: expected a folder, {folder} {'is none' if folder.exists() else 'does not exist'}")
    found = {name: sources for name, (glob, _) in _FORMS.items() if (sources := _sources(folder, glob))}
    if len(found) != 1:
        got = " and ".join(str(sources[0].relative_to(folder)) for sources in found.values()) or "none of them"
        wanted = ", ".join(f"{glob[0]} ({name})" for name, (glob, _) in _FORMS.items())
        raise TextError(f"images: expected one of {wanted} in {folder}, got {got}")
    ((name, sources),) = found.items()
    pictures: dict[Path, Described] = {}
    for entry in _FORMS[name][1](folder, sources):
        if entry.part == OUT:
            continue
        for part in (entry.name, entry.caption):
            if any("\ud800" <= letter <= "\udfff" for letter in part):  # half a character, as JSON can say it
                raise TextError(f"images: expected text in {entry.where}, got {part[:80]!a}")
        line, path = Line(_caption(entry), entry.where), _path(entry, folder)
        described = pictures.setdefault(path, Described(path, entry.part))
        if described.part != entry.part:
            raise TextError(f"images: expected {entry.name} in one part, got {entry.part} in {entry.where} and "
                            f"{described.part} in {described.lines[0].where}")  # fmt: skip
        described.lines.append(line)
    if not pictures:
        raise TextError(f"images: expected captions for training or validation, {sources[0]} has none")
    return list(pictures.values())


def _sources(folder: Path, globs: Sequence[str]) -> list[Path]:
    return [path for glob in globs for path in sorted(folder.glob(glob)) if path.is_file()]


def _caption(entry: _Entry) -> str:
    """The words of an entry, with one space between them."""
    caption = " ".join(entry.caption.split())
    if not any(letter.isalnum() for letter in caption):
        raise TextError(f"images: expected a caption with words in {entry.where}, got {caption[:80]!r}")
    if len(caption) > PORTION:
        got = f"{len(caption):,} in {entry.where}"
        raise TextError(f"images: expected at most {PORTION:,} characters in a caption, got {got}")
    return caption


def _path(entry: _Entry, folder: Path) -> Path:
    """The picture of an entry."""
    if not _is_within(entry.name):
        raise TextError(f"images: expected the name of a picture within {folder} in {entry.where}, got {entry.name!r}")
    for place in entry.folders:
        with suppress(OSError, ValueError):  # of a name that no file can have
            if (path := place / entry.name).is_file():
                return path
    raise TextError(f"images: {entry.where} names {entry.name}, which is not in "
                    f"{' or '.join(str(place) for place in entry.folders)}")  # fmt: skip


def _is_within(name: str) -> bool:
    """Whether a name stays in the folder that it is looked for in."""
    parts = PurePosixPath(name).parts
    return len(parts) > 0 and ".." not in parts and not name.startswith("/")


def _flickr(folder: Path, sources: list[Path]) -> Iterator[_Entry]:
    token = _one(sources)
    lists = {token.with_name(f"Flickr_8k.{name}Images.txt"): part for name, part in _FLICKR_LISTS.items()}
    parts = {
        line.strip(): part for path, part in lists.items() if path.is_file() for line in text.lines(path, "images")
    }
    for number, line in enumerate(text.lines(token, "images"), 1):
        where = f"{token}, line {number:,}"
        name, tab, caption = line.partition("\t")
        name, mark, _ = name.rpartition("#")
        if not tab or not mark:
            raise TextError(f"images: expected name.jpg#0, a tab and a caption in {where}, got {line[:80]!r}")
        part = parts.get(name, OUT) if parts else None
        yield _Entry(name, caption, where, part, _places(folder, _FLICKR_IMAGES))


def _flickr_csv(folder: Path, sources: list[Path]) -> Iterator[_Entry]:
    for where, row in _rows(sources[0], ("image", "caption")):
        yield _Entry(row["image"], row["caption"], where, None, _places(folder, _FLICKR_IMAGES))


def _coco(folder: Path, sources: list[Path]) -> Iterator[_Entry]:
    for source in sources:
        part = TRAIN if source.name.startswith("captions_train") else VALIDATION
        of_form = source.stem.removeprefix("captions_")  # train2014
        content = _json(source)
        names: dict[Any, str] = {}
        for number, image in enumerate(_list(content, "images", source)):
            where = f"{source}, images[{number}]"
            names[_field(image, "id", int, where)] = _field(image, "file_name", str, where)
        for number, annotation in enumerate(_list(content, "annotations", source)):
            where = f"{source}, annotations[{number}]"
            identity, caption = _field(annotation, "image_id", int, where), _field(annotation, "caption", str, where)
            if identity not in names:
                raise TextError(f"images: expected an image_id out of images in {where}, got {identity}")
            yield _Entry(names[identity], caption, where, part, _places(folder, (of_form, f"images/{of_form}")))


def _karpathy(folder: Path, sources: list[Path]) -> Iterator[_Entry]:
    source = _one(sources)
    for number, image in enumerate(_list(_json(source), "images", source)):
        where = f"{source}, images[{number}]"
        name, part = _field(image, "filename", str, where), _field(image, "split", str, where)
        inner = _field(image, "filepath", str, where) if "filepath" in image else ""
        if inner and not _is_within(inner):
            raise TextError(f"images: expected a filepath within {folder} in {where}, got {inner!r}")
        places = (inner, f"images/{inner}", "images", *_FLICKR_IMAGES, "flickr30k-images")
        for place, sentence in enumerate(_list(image, "sentences", where)):
            of_sentence = f"{where}.sentences[{place}]"
            caption = _field(sentence, "raw", str, of_sentence)
            yield _Entry(name, caption, of_sentence, _PARTS.get(part, OUT), _places(folder, places))


def _imagefolder(folder: Path, sources: list[Path]) -> Iterator[_Entry]:
    for source in sources:
        read = _rows if source.suffix == ".csv" else _objects
        part = None if source.parent == folder else _PARTS.get(source.parent.name, OUT)
        for where, row in read(source, ("file_name",)):
            column = next((name for name in _CAPTION_COLUMNS if isinstance(row.get(name), str)), None)
            if column is None:
                raise TextError(f"images: expected a caption, in a field caption or text, in {where}, got "
                                f"{', '.join(map(str, row))}")  # fmt: skip
            yield _Entry(row["file_name"], row[column], where, part, (source.parent,))


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a CSV file that has these columns and others, and where each one begins."""
    lines = text.lines(path, "images")
    reader = csv.reader((line + "\n" for line in lines), strict=True)  # a quote that is not closed is an error
    begins, header = 1, None
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise TextError(f"images: {path}, line {begins:,} is no CSV ({error})") from error
        where, begins = f"{path}, line {begins:,}", reader.line_num + 1
        if row is None:
            break
        if header is None:
            header = row
            if missing := [name for name in columns if name not in header]:
                raise TextError(f"images: expected a column {missing[0]} in {where}, got {','.join(row)[:80]!r}")
        elif row:
            # A caption that stands last may have commas of its own without being quoted.
            if header[-1] in _CAPTION_COLUMNS and len(row) > len(header):
                row = [*row[: len(header) - 1], ",".join(row[len(header) - 1 :])]
            if len(row) != len(header):
                raise TextError(f"images: expected {','.join(header)} in {where}, got {','.join(row)[:80]!r}")
            yield where, dict(zip(header, row, strict=True))
    if header is None:
        raise TextError(f"images: expected a header with {', '.join(columns)}, {path} is empty")


def _objects(path: Path, names: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file with one in each line, with these fields, and where each one is."""
    for number, line in enumerate(text.lines(path, "images"), 1):
        where = f"{path}, line {number:,}"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TextError(f"images: {where} is no JSON ({str(error)[:200]})") from error
        for name in names:
            _field(value, name, str, where)
        yield where, value


def _json(path: Path) -> Any:
    try:
        return json.loads(text.read(path))
    except json.JSONDecodeError as error:
        raise TextError(f"images: {path}, line {error.lineno:,} is no JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise TextError(f"images: {path} is no JSON ({str(error)[:200]})") from error


def _list(value: Any, name: str, where: Path | str) -> list[Any]:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise TextError(f"images: expected an object with a list {name} in {where}, got {_shown(value)}")
    return found


def _field(value: Any, name: str, kind: type, where: str) -> Any:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind):
        words = {int: "a number", str: "a string"}[kind]
        raise TextError(f"images: expected an object with {words} {name} in {where}, got {_shown(value)}")
    return found


def _shown(value: Any) -> str:
    return f"one with {', '.join(map(str, value))[:80]}" if isinstance(value, dict) else f"a {type(value).__name__}"


def _one(sources: list[Path]) -> Path:
    """The file of a form that has one alone."""
    if len(sources) > 1:
        raise TextError(f"images: expected one file of captions, got {sources[0]} and {sources[1]}")
    return sources[0]


def _places(folder: Path, inner: Sequence[str]) -> tuple[Path, ...]:
    """The folder itself, and those of `inner` that it has."""
    inside = [folder / name for name in dict.fromkeys(inner) if name and (folder / name).is_dir()]
    return (*inside, folder)


# Of each form the files by which it is found, and what reads them.
_FORMS: dict[str, tuple[tuple[str, ...], Callable[[Path, list[Path]], Iterator[_Entry]]]] = {
    "Flickr8k": (("Flickr8k.token.txt", "Flickr8k_text/Flickr8k.token.txt"), _flickr),
    "Flickr8k's CSV": (("captions.txt",), _flickr_csv),
    "COCO": (("annotations/captions_train*.json", "annotations/captions_val*.json"), _coco),
    "Karpathy": (("dataset_*.json",), _karpathy),
    "imagefolder": (
        tuple(
            f"{part}metadata.{kind}"
            for part in ("", "train/", "validation/", "val/", "test/")
            for kind in ("csv", "jsonl")
        ),
        _imagefolder,
    ),
}
