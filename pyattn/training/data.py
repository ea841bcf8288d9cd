"""From a user's text to batches of tokens."""

from __future__ import annotations

import hashlib
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from pyattn.check import PyattnError
from pyattn.training.files import replacing

END_OF_TEXT = "<|endoftext|>"
# Parts of the standard library that are no prose of it: tests, tables, another program, and what pip put beside it.
_NOT_CORPUS = {"test", "tests", "idlelib", "turtledemo", "lib2to3", "encodings", "pydoc_data"}
_NOT_CORPUS |= {"site-packages", "dist-packages", "__pycache__"}
_VALIDATION_PART = 20


class TextError(PyattnError, ValueError):
    """The text to train on is missing, empty, not UTF-8, or too short."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """A text as tokens, divided for training and validation."""

    train: Tensor  # int32 [tokens]
    validation: Tensor  # int32 [tokens]
    tokenizer: Tokenizer
    digest: str  # of the text and the vocabulary asked for


def load_corpus(source: Path | None, *, vocab: int, context: int, batch: int, cache: Path) -> Corpus:
    """Reads, tokenizes and divides a text.

    Args:
        source: a file, or a folder of which every file that is not hidden is read; None is the source text of the
            running Python's standard library.
        vocab: size of the byte-level BPE vocabulary to train; small texts may give a smaller one.
        cache: folder that keeps the tokens, so that a second run on the same text starts at once.
    Raises:
        TextError: nothing to read, not UTF-8, or fewer tokens than one batch and one validation window take.
    """
    documents = _standard_library() if source is None else _read(source)
    digest = _digest(documents, vocab)
    stored = cache / f"{digest}.safetensors"
    tokenizer, tokens = _load_tokens(stored) or _tokenize(documents, vocab, stored)
    held_out = max(len(tokens) // _VALIDATION_PART, context + 1)
    needed = batch * context + 1
    if len(tokens) - held_out < needed:
        raise TextError(
            f"text: expected at least {needed + held_out:,} tokens, {needed:,} for one batch of {batch} x {context} "
            f"and {held_out:,} for validation, got {len(tokens):,}; lower batch or context, or give more text"
        )
    return Corpus(tokens[:-held_out], tokens[-held_out:], tokenizer, digest)


def training_batch(tokens: Tensor, *, batch: int, context: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and their next tokens, each int64 [batch, context], from random places of tokens [count].

    A function of (seed, step) alone: a resumed run needs no state to go on with the batches it would have seen.
    """
    starts = numpy.random.default_rng((seed, step)).integers(0, len(tokens) - context, batch)
    return _windows(tokens, torch.from_numpy(starts), context)


def validation_batches(tokens: Tensor, *, batch: int, context: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """At most `count` batches of windows spread evenly over tokens, the same ones at every call."""
    available = (len(tokens) - 1) // context
    windows = min(available, count * batch)
    starts = torch.linspace(0, len(tokens) - 1 - context, windows, dtype=torch.float64).long()
    return [_windows(tokens, part, context) for part in starts.split(batch)]


def _windows(tokens: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    windows = tokens[starts[:, None] + torch.arange(context + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def _standard_library() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.rglob("*.py")) if not _NOT_CORPUS & set(path.relative_to(root).parts)]
    return [_decoded(path) for path in files]


def _read(source: Path) -> list[str]:
    if not source.exists():
        raise TextError(f"text: expected a file or folder, {source} does not exist")
    paths = [source] if source.is_file() else [path for path in sorted(source.rglob("*")) if path.is_file()]
    shown = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(source).parts)]
    documents = [text for path in shown if (text := _decoded(path)).strip()]
    if not documents:
        raise TextError(f"text: expected some text, {source} is empty")
    return documents


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise TextError(f"text: expected UTF-8, {path} has the byte 0x{byte:02x} at {error.start}") from error
    except OSError as error:
        raise TextError(f"text: cannot read {path}: {error.strerror}") from error


def _digest(documents: list[str], vocab: int) -> str:
    digest = hashlib.sha256(f"{vocab}\n".encode())
    for document in documents:
        digest.update(hashlib.sha256(document.encode()).digest())
    return digest.hexdigest()[:16]


def _tokenize(documents: list[str], vocab: int, stored: Path) -> tuple[Tokenizer, Tensor]:
    """Trains a byte-level BPE (Sennrich et al. 2016; on bytes as in GPT-2) and writes tokenizer and tokens to `stored`.

    The documents are shuffled, always in the same way, so that the validation part at the end is like the rest.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.encode_special_tokens = True  # the words "<|endoftext|>" in a text are text
    shuffled = random.Random(0).sample(documents, len(documents))
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [token for found in tokenizer.encode_batch_fast(shuffled) for token in [end, *found.ids]]
    tokens = torch.tensor(ids, dtype=torch.int32)
    with replacing(stored) as path:
        save_file({"tokens": tokens}, path, metadata={"tokenizer": tokenizer.to_str()})
    return tokenizer, tokens


def _load_tokens(stored: Path) -> tuple[Tokenizer, Tensor] | None:
    """What `_tokenize` wrote; None when there is nothing, or nothing readable: then it is made again."""
    if not stored.exists():
        return None
    try:
        with safe_open(stored, "pt") as file:
            return Tokenizer.from_str(file.metadata()["tokenizer"]), file.get_tensor("tokens")
    except SafetensorError:
        return None
