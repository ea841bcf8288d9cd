"""Texts of any length as tokens, and tokenizers that ask for too much."""

from __future__ import annotations

import json
import random
import tracemalloc

import pytest
from tokenizers import Tokenizer

from pyattn import tokens
from pyattn.tokens import TextError, TokenizerError, encode, encode_all, encode_document, pieces, read_tokenizer
from pyattn.training.text import byte_pairs


def _text(characters: int, seed: int = 0) -> str:
    generator = random.Random(seed)
    words = ["the", "cat", "it's", "naïve", "42", "…", "\n", "\n\n", "  ", "sat", "on", "a", "mat."]
    found: list[str] = []
    while sum(map(len, found)) < characters:
        found += [generator.choice(words) + generator.choice((" ", " ", "\n", "")) for _ in range(100)]
    return "".join(found)[:characters]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_pairs([_text(5000)], 400, prefix_space=False)


def test_pieces_are_the_text_and_its_tokens(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _text(20_000, seed=1)
    expected = tokenizer.encode(whole).ids
    monkeypatch.setattr(tokens, "PORTION", 300)
    assert "".join(pieces(whole)) == whole
    assert max(map(len, pieces(whole))) <= 300
    assert list(encode_document(tokenizer, whole)) == expected


def test_text_without_any_words_is_cut_where_it_must_be(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "PORTION", 100)
    for whole in ("x" * 1050, " " * 1050, ""):
        assert "".join(pieces(whole)) == whole
        assert tokenizer.decode(list(encode_document(tokenizer, whole))) == whole


def test_sentences_in_portions_are_those_of_one(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    sentences = [*_text(5000, seed=2).split("\n"), ""]
    expected = [tokenizer.encode(sentence).ids for sentence in sentences]
    monkeypatch.setattr(tokens, "PORTION", 200)
    assert list(encode_all(tokenizer, sentences)) == expected


def test_sentence_of_a_book_is_refused(tokenizer: Tokenizer) -> None:
    book = "word " * (tokens.PORTION // 5 + 1)
    with pytest.raises(TextError, match=r"at most 262,144 characters in a sentence, got 262,145"):
        encode(tokenizer, book)
    with pytest.raises(TextError, match=r"sentence 2 has 262,145"):
        list(encode_all(tokenizer, ["word", book]))


def test_tokens_of_a_long_line_take_few_bytes(tokenizer: Tokenizer) -> None:
    line = "the cat sat on a mat. " * 200_000
    tracemalloc.start()
    try:
        found = encode_document(tokenizer, line)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) > 200_000
    assert peak < 20 * len(line)


def test_tokenizer_that_asks_for_a_billion_tokens_of_padding_pads_nothing(tokenizer: Tokenizer) -> None:
    fields = json.loads(tokenizer.to_str())
    padding = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None}
    fields["padding"] = padding | {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    fields["truncation"] = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    again = read_tokenizer(json.dumps(fields), "tokenizer.json")
    assert encode(again, "the cat").ids == tokenizer.encode("the cat").ids


@pytest.mark.parametrize("text", ["", "{}", "[1]", "null", '{"model": {"type": "BPE"}}', "[" * 100_000])
def test_tokenizer_that_is_none_is_named(text: str) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer: here/tokenizer\.json is damaged \("):
        read_tokenizer(text, "here/tokenizer.json")


def test_tokenizer_that_panics_has_an_error_with_a_class(tokenizer: Tokenizer) -> None:
    """Oniguruma gives up on a regular expression that takes exponential time, and Rust turns that into a panic."""
    fields = json.loads(tokenizer.to_str())
    fields["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    panicking = read_tokenizer(json.dumps(fields), "tokenizer.json")
    with pytest.raises(TextError, match="the tokenizer cannot read 'xxxx"):
        encode(panicking, "x" * 60)
    with pytest.raises(TextError, match="the tokenizer cannot read"):
        list(encode_all(panicking, ["x" * 60]))
