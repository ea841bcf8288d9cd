"""Reading what a user gives, in UTF-8, plain or compressed by gzip; and places to keep its tokens."""

from __future__ import annotations

import gzip
import hashlib
import random
import sys
import sysconfig
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from pyattn.files import replacing, sweep
from pyattn.tokens import TextError, TokenizerError, pieces, read_tokenizer

_HELD_OUT_PART, _HELD_OUT_MOST = 20, 2000
_DAY = 86400.0  # seconds
# Parts of the standard library that are no prose of it: tests, tables, another program, and what pip put beside it.
_NOT_CORPUS = {"test", "tests", "idlelib", "turtledemo", "lib2to3", "encodings", "pydoc_data"}
_NOT_CORPUS |= {"site-packages", "dist-packages", "__pycache__"}


class Sentences:
    """Many rows of tokens in one tensor."""

    def __init__(self, tokens: Tensor, ends: Tensor) -> None:
        self.tokens = tokens  # int32 [all tokens]
        self.ends = ends  # int64 [sentences]: where each one ends in tokens
        self.lengths = ends.diff(prepend=ends.new_zeros(1))  # int64 [sentences]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Tensor:
        end = int(self.ends[index])
        return self.tokens[end - int(self.lengths[index]) : end].long()

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> Sentences:
        tokens, ends = array("i"), array("q")
        for row in rows:
            tokens.extend(row)
            ends.append(len(tokens))
        return cls(torch.from_numpy(numpy.array(tokens)), torch.from_numpy(numpy.array(ends)))


def standard_library() -> list[str]:
    """The source text of the running Python's standard library, one document per file."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.rglob("*.py")) if not _NOT_CORPUS & set(path.relative_to(root).parts)]
    return [read(path) for path in files]


def documents(source: Path) -> list[str]:
    """The text of a file, or of every file in a folder that is not hidden; those without any text are left out."""
    if not source.exists():
        raise TextError(f"text: expected a file or folder, {source} does not exist")
    inside = [path for path in sorted(source.rglob("*")) if path.is_file()]
    paths = inside if source.is_dir() else [source]  # a pipe is as good as a file
    shown = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(source).parts)]
    found = [text for path in shown if (text := read(path)).strip()]
    if not found:
        raise TextError(f"text: expected some text, {source} is empty")
    return found


def lines(path: Path, argument: str) -> list[str]:
    """The lines of a file, without their ends. Only a newline ends a line, as in every other tool for parallel text.

    argument: what has named the file, for the error.
    """
    if not path.exists() or path.is_dir():
        raise TextError(f"{argument}: expected a file, {path} {'is none' if path.exists() else 'does not exist'}")
    found = read(path).split("\n")
    return [line.removesuffix("\r") for line in (found if found[-1] else found[:-1])]


def standard_input() -> Iterator[str]:
    """Its lines as they come, without their ends; none where it is closed."""
    if sys.stdin is None:
        return
    for number, raw in enumerate(sys.stdin.buffer, 1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise TextError(
                f"text: expected UTF-8, standard input has the byte 0x{byte:02x}, line {number:,}"
            ) from error
        yield (line.removeprefix("\ufeff") if number == 1 else line).removesuffix("\n").removesuffix("\r")


def read(path: Path) -> str:
    """A whole file, decompressed if its name ends in .gz."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte, line = error.object[error.start], error.object.count(b"\n", 0, error.start) + 1
        raise TextError(
            f"text: expected UTF-8, {path} has the byte 0x{byte:02x} at {error.start}, line {line}"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TextError(f"text: {path} is no whole gzip file ({error})") from error
    except OSError as error:
        raise TextError(f"text: cannot read {path}: {error.strerror}") from error


def digest(texts: Iterable[str], *choices: object) -> str:
    """Names texts and everything that decides how they are turned into tokens."""
    whole = hashlib.sha256(repr(choices).encode())
    for text in texts:
        whole.update(hashlib.sha256(text.encode()).digest())
    return whole.hexdigest()[:16]


def byte_pairs(
    texts: Iterable[str], vocab: int, marks: Sequence[str] = (), *, prefix_space: bool, normalizer: Any = None
) -> Tokenizer:
    """Learns a byte-level BPE (Sennrich et al. 2016; on bytes as in GPT-2), to which no character is unknown.

    Args:
        vocab: its size, if the texts have enough pairs.
        marks: special tokens, the first of the vocabulary.
        prefix_space: put a space before a text, so that its first word is the same token as inside.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(marks),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    tokenizer.encode_special_tokens = True  # "</s>" in a text is text
    return tokenizer


def held_out(count: int) -> tuple[list[int], list[int]]:
    """Which of `count` examples to train with, and which to hold out for validation: a twentieth of them, but one at
    least and 2000 at most, always the same ones."""
    shuffled = random.Random(0).sample(range(count), count)
    out = max(1, min(_HELD_OUT_MOST, count // _HELD_OUT_PART))
    return sorted(shuffled[out:]), sorted(shuffled[:out])


def cached(
    stored: Path, make: Callable[[], tuple[Tokenizer, dict[str, Tensor]]]
) -> tuple[Tokenizer, dict[str, Tensor]]:
    """A tokenizer and tensors out of `stored`; where there is nothing whole, they are made and stored."""
    sweep(stored.parent, _DAY)
    try:
        with safe_open(stored, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        if header.get("digest") == _digest(header["tokenizer"], tensors):
            return read_tokenizer(header["tokenizer"], stored), tensors
    except (SafetensorError, TokenizerError, OSError, KeyError):
        pass  # KeyError: a file of another program has other metadata, or none
    tokenizer, tensors = make()
    text = tokenizer.to_str()
    with replacing(stored) as path:
        save_file(tensors, path, metadata={"tokenizer": text, "digest": _digest(text, tensors)})
    return tokenizer, tensors


def _digest(tokenizer: str, tensors: dict[str, Tensor]) -> str:
    """Of all that a run is trained on: a damaged number would be trained on, too, and nothing would show it."""
    found = hashlib.sha256(tokenizer.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.contiguous().numpy().data)
    return found.hexdigest()
