"""Texts as tokens, by the tokenizers library.

Its encodings take some 200 bytes for a byte of text, so that long texts go through it in portions; and what it raises
has no class of its own, or one that `except Exception` lets pass.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyattn.check import PyattnError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

PORTION = 2**18  # characters that are encoded together
# A single space or newline inside of a line's text: the words on either side are the same tokens without each other.
_BORDER = re.compile(r"(?<=\S)[ \n](?=\S)")


class TextError(PyattnError, ValueError):
    """The text is missing, empty, not UTF-8, too short or too long, or not of the form that the model needs."""


class TokenizerError(PyattnError, ValueError):
    """A tokenizer.json is damaged."""


def read_tokenizer(text: str, source: str | Path) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes, without the padding and the truncation that it may ask for.

    Args:
        source: what the error calls it.
    Raises:
        TokenizerError: it describes none.
    """
    from tokenizers import Tokenizer

    with _raising(TokenizerError, f"tokenizer: {source} is damaged"):
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_padding()
        tokenizer.no_truncation()
    return tokenizer


def encode(tokenizer: Tokenizer, text: str | list[str]) -> Encoding:
    """One sentence, or the words of one, by any tokenizer of that interface.

    Raises:
        TextError: the tokenizer has no tokens for it, or it is far too long for a sentence.
    """
    whole = text if isinstance(text, str) else " ".join(text)
    if len(whole) > PORTION:
        raise TextError(f"text: expected at most {PORTION:,} characters in a sentence, got {len(whole):,}")
    with _raising(TextError, f"text: the tokenizer cannot read {whole[:80]!r}"):
        return tokenizer.encode(text) if isinstance(text, str) else tokenizer.encode(text, is_pretokenized=True)


def encode_all(tokenizer: Tokenizer, sentences: Iterable[str], **options: Any) -> Iterator[list[int]]:
    """The tokens of each sentence, in their order.

    Raises:
        TextError: as `encode`.
    """
    portion: list[str] = []
    size = 0
    for number, sentence in enumerate(sentences, 1):
        if len(sentence) > PORTION:
            what = f"sentence {number:,} has {len(sentence):,}"
            raise TextError(f"text: expected at most {PORTION:,} characters in a sentence, {what}")
        if size + len(sentence) > PORTION:
            yield from _encoded(tokenizer, portion, options)
            portion, size = [], 0
        portion.append(sentence)
        size += len(sentence)
    yield from _encoded(tokenizer, portion, options)


def encode_document(tokenizer: Tokenizer, document: str) -> array[int]:
    """The tokens of a text of any length."""
    tokens = array("i")
    for ids in encode_all(tokenizer, pieces(document)):
        tokens.extend(ids)
    return tokens


def pieces(document: str) -> Iterator[str]:
    """A text in pieces of at most PORTION characters, from word to word where it has words."""
    start = 0
    while len(document) - start > PORTION:
        end = start + PORTION
        end = max((found.start() for found in _BORDER.finditer(document, start + PORTION // 2, end)), default=end)
        yield document[start:end]
        start = end
    yield document[start:]


def _encoded(tokenizer: Tokenizer, sentences: list[str], options: dict[str, Any]) -> Iterator[list[int]]:
    with _raising(TextError, "text: the tokenizer cannot read it"):
        found = tokenizer.encode_batch_fast(sentences, **options)
    for encoding in found:
        yield encoding.ids


@contextmanager
def _raising(kind: type[PyattnError], words: str) -> Iterator[None]:
    """Gives what the library raises a class: Exception itself, or where its Rust code panicked a BaseException."""
    try:
        yield
    except (PyattnError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise kind(f"{words} ({str(error)[:200]})") from error
