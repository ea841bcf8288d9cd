"""`pyattn translate`, `generate`, `fill-mask` and `tag`: in a pipe, from files, and where they say no."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from pyattn.cli import app, text
from pyattn.decoding.sampling import GREEDY, generate
from pyattn.decoding.translation import translate
from pyattn.models.bert import BertConfig, BertForPreTraining
from pyattn.models.gpt import GPT, GPTConfig
from pyattn.models.rnn import RNNLM, RNNConfig, RNNForSequenceClassification, RNNForTokenClassification
from pyattn.models.transformer import Transformer, TransformerConfig
from pyattn.training import labelled, language, masked, translation
from pyattn.training.text import byte_pairs

SENTENCES = ["ein Hund läuft", "zwei Katzen schlafen auf dem Sofa", "ein Kind", "der Mann spielt Gitarre im Park"]


def _run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def _assert_refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert re.search(message, result.stderr), result.stderr
    assert result.stderr.startswith("pyattn: ") and "Traceback" not in result.output


def _randomized(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at the start, so that texts are not all alike
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("translator")
    tokenizer = translation.learn_tokenizer(SENTENCES * 5, 300)
    torch.manual_seed(0)
    config = TransformerConfig(tokenizer.get_vocab_size(), context=40, layers=1, heads=2, width=16, hidden=32)
    _randomized(Transformer(config)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("writer")
    tokenizer, _ = language._bpe([Path(argparse.__file__).read_text("utf-8")], 400)
    torch.manual_seed(0)
    config = GPTConfig(tokenizer.get_vocab_size(), context=32, layers=1, heads=2, width=16)
    _randomized(GPT(config)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def guesser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guesser")
    tokenizer = masked._learn(SENTENCES * 5, 200, cased=True)
    torch.manual_seed(0)
    config = BertConfig(tokenizer.get_vocab_size(), context=40, layers=1, heads=2, width=16, hidden=32)
    _randomized(BertForPreTraining(config)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _recurrent(folder: Path, kind: type[torch.nn.Module], **options: object) -> Path:
    tokenizer = byte_pairs(SENTENCES, 280, prefix_space=True)
    torch.manual_seed(0)
    config = RNNConfig(tokenizer.get_vocab_size(), width=8, hidden=8, layers=1, **options)
    _randomized(kind(config)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"bidirectional": True, "labels": 3, "label_names": ("DET", "NOUN", "VERB")}
    return _recurrent(tmp_path_factory.mktemp("tagger"), RNNForTokenClassification, **options)


@pytest.fixture(scope="module")
def labeller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"bidirectional": True, "labels": 2, "label_names": ("kurz", "lang")}
    return _recurrent(tmp_path_factory.mktemp("labeller"), RNNForSequenceClassification, **options)


def test_translate_pipe_keeps_lines_in_order(translator: Path) -> None:
    lines = [*SENTENCES, "", SENTENCES[0]]
    result = _run("translate", "--model", translator, "--batch", 2, stdin="\n".join(lines) + "\n")
    assert result.exit_code == 0, result.stderr
    found = result.stdout.split("\n")
    model, tokenizer = (
        Transformer.from_pretrained(translator),
        translation.Tokenizer.from_file(str(translator / "tokenizer.json")),
    )
    for line, told in zip(lines, found[:-1], strict=True):
        (alone,) = translate(model, tokenizer, [line])
        assert told == (alone[0].text if line else "")
    assert found[0] == found[5] != ""


def test_translate_files_with_scores_and_bleu(translator: Path, tmp_path: Path) -> None:
    (tmp_path / "source").write_text("\n".join(SENTENCES) + "\n", encoding="utf-8")
    files = ["--source", tmp_path / "source", "--out", tmp_path / "out"]
    result = _run("translate", "--model", translator, *files)
    assert result.exit_code == 0 and result.stdout == "", result.stderr
    own = tmp_path / "out"
    again = _run("translate", "--model", translator, *files[:2], "--reference", own, "--attention", "torch")
    assert again.stdout == own.read_text("utf-8")
    assert "100.0/100.0/100.0" in again.stderr  # too short for runs of four words
    several = _run("translate", "--model", translator, *files[:2], "--beams", 3, "--best", 2).stdout.splitlines()
    assert len(several) == 2 * len(SENTENCES)
    numbers, scores, _ = zip(*(line.split("\t") for line in several), strict=True)
    assert numbers == tuple(str(1 + i // 2) for i in range(len(several)))
    scores = list(map(float, scores))
    assert all(first >= second for first, second in zip(scores[::2], scores[1::2], strict=True))


def test_translate_long_line_is_named_and_what_was_there_stays(translator: Path, tmp_path: Path) -> None:
    (tmp_path / "source").write_text("ein Hund\n" + "Katze " * 60 + "\n", encoding="utf-8")
    (tmp_path / "out").write_text("old")
    result = _run("translate", "--model", translator, "--source", tmp_path / "source", "--out", tmp_path / "out")
    _assert_refused(result, "source, line 2: expected at most context=40 tokens, got")
    assert (tmp_path / "out").read_text() == "old"


def test_generate_greedy_is_the_model_s_text(writer: Path) -> None:
    model, tokenizer = GPT.from_pretrained(writer), language.Tokenizer.from_file(str(writer / "tokenizer.json"))
    prompt = "def parse_args("
    expected = generate(model, torch.tensor([tokenizer.encode(prompt).ids]), 60, sampling=GREEDY)[0]
    options = ["generate", "--model", writer, "--tokens", 60, "--temperature", 0]
    result = _run(*options, "--prompt", prompt)
    assert result.stdout == prompt + tokenizer.decode(expected) + "\n", result.stderr
    assert _run(*options, stdin=prompt).stdout == result.stdout
    several = _run(*options, "--prompt", prompt, "--prompt", "class").stdout
    assert several.startswith(prompt) and "\nclass" in several


def test_generate_draws_by_seed_and_searches_beams(writer: Path) -> None:
    options = ["generate", "--model", writer, "--tokens", 12, "--prompt", "import"]
    texts = [_run(*options, "--seed", seed).stdout for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    result = _run(*options, "--beams", 3)
    assert result.exit_code == 0 and result.stdout.startswith("import")


def test_generate_options_out_of_a_file(writer: Path, tmp_path: Path) -> None:
    (tmp_path / "how.toml").write_text("temperature = 0\ntokens = 5\n")
    with_file = _run("generate", "--model", writer, "--prompt", "x", "--config", tmp_path / "how.toml")
    assert (
        with_file.stdout
        == _run("generate", "--model", writer, "--prompt", "x", "--temperature", 0, "--tokens", 5).stdout
    )
    (tmp_path / "how.toml").write_text("heat = 0\n")
    _assert_refused(_run("generate", "--model", writer, "--config", tmp_path / "how.toml"), "how.toml has the key heat")


def test_fill_mask_shows_words_and_probabilities(guesser: Path) -> None:
    result = _run("fill-mask", "--model", guesser, "--top", 3, stdin="ein [MASK] läuft\nzwei [MASK] [MASK]\n")
    assert result.exit_code == 0, result.stderr
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert len(lines) == 9
    for first in (0, 3, 6):
        p = [float(line[0]) for line in lines[first : first + 3]]
        assert p == sorted(p, reverse=True) and 0 < sum(p) <= 1
    assert all("läuft" in line[2] for line in lines[:3])
    _assert_refused(
        _run("fill-mask", "--model", guesser, "--text", "ein Hund"), r"expected \[MASK\] in it, got 'ein Hund'"
    )


def test_help_shows_a_whole_example() -> None:
    for command in ("translate", "generate", "fill-mask", "tag"):
        shown = _run(command, "--help").output
        assert "A whole example" in shown and f"pyattn {command} --model" in re.sub(r"\s+", " ", shown)


@pytest.mark.parametrize("command", ["translate", "generate", "fill-mask", "tag"])
def test_model_that_is_none_is_refused(command: str, tmp_path: Path, writer: Path, translator: Path) -> None:
    _assert_refused(_run(command, "--model", tmp_path, stdin="x"), "config.json, there is none")
    other = writer if command != "generate" else translator
    _assert_refused(_run(command, "--model", other, stdin="x"), "expected model_type")


@pytest.mark.parametrize("damage", ["missing", "broken", "large"])
def test_tokenizer_that_does_not_fit_is_refused(damage: str, writer: Path, tmp_path: Path) -> None:
    for path in writer.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "tokenizer.json"
    if damage == "missing":
        path.unlink()
    elif damage == "broken":
        path.write_text("{")
    else:
        language._bpe([Path(argparse.__file__).read_text("utf-8")], 500)[0].save(str(path))
    message = {"missing": "there is none", "broken": "is damaged", "large": "500 tokens, more than the 400"}[damage]
    _assert_refused(_run("generate", "--model", tmp_path, "--prompt", "x"), f"tokenizer.json.*{message}")


def test_bad_numbers_are_refused(translator: Path, writer: Path) -> None:
    _assert_refused(_run("translate", "--model", translator, "--best", 5, stdin="x"), "best: expected at most beams=4")
    _assert_refused(_run("generate", "--model", writer, "--top-p", 2, "--prompt", "x"), "top_p: expected")
    _assert_refused(
        _run("generate", "--model", writer, "--attention", "no", "--prompt", "x"), "attention: expected one of"
    )


@pytest.mark.parametrize("command", ["translate", "generate", "fill-mask"])
def test_input_that_is_no_text_is_refused_with_its_line(
    command: str, translator: Path, writer: Path, guesser: Path
) -> None:
    model = {"translate": translator, "generate": writer, "fill-mask": guesser}[command]
    result = CliRunner().invoke(app, [command, "--model", str(model)], input=b"ein [MASK]\nzwei \xff\n")
    _assert_refused(result, "standard input has the byte 0xff, line 2")


def test_lines_of_another_kind_are_named(guesser: Path) -> None:
    _assert_refused(
        _run("fill-mask", "--model", guesser, stdin="ein [MASK]\n\nzwei\n"), "standard input, line 3: expected"
    )
    long = "[MASK] " + "Hund " * 60
    _assert_refused(
        _run("fill-mask", "--model", guesser, stdin=long), "standard input, line 1: expected at most context=40"
    )


def test_translation_with_a_line_s_end_stays_one_line() -> None:
    assert text.one_line("a\nb\rc\td") == "a b c d"


def test_generate_several_prompts_without_a_token(writer: Path) -> None:
    options = ["generate", "--model", writer, "--prompt", "a", "--prompt", "b", "--tokens", 0]
    assert _run(*options).stdout == "a\nb\n"


def test_generate_character_that_the_model_does_not_know_is_refused(tmp_path: Path) -> None:
    tokenizer, _ = language._characters(["abc abc"], 0)
    GPT(GPTConfig(tokenizer.get_vocab_size(), context=32, layers=1, heads=2, width=16)).save_pretrained(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    _assert_refused(_run("generate", "--model", tmp_path, "--prompt", "Q?"), "the tokenizer cannot read 'Q\\?'")


def test_reference_of_another_length_is_refused(translator: Path, tmp_path: Path) -> None:
    (tmp_path / "source").write_text("eins\nzwei\n")
    (tmp_path / "reference").write_text("one\n")
    files = ["--source", tmp_path / "source", "--reference", tmp_path / "reference"]
    _assert_refused(_run("translate", "--model", translator, *files), "expected 2 lines, as .*source has, .*has 1")
    result = _run("translate", "--model", translator, *files[2:], stdin="eins\nzwei\n")
    _assert_refused(result, "expected 2 lines, as standard input has, .*has 1")
    (tmp_path / "reference").write_text("")
    assert "no lines" in _run("translate", "--model", translator, *files[2:], stdin="").stderr


def test_generate_continues_with_a_recurrent_network(tmp_path: Path) -> None:
    folder = _recurrent(tmp_path / "rnn", RNNLM)
    tokenizer = language.Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt = torch.tensor([tokenizer.encode("zwei Katzen").ids])
    expected = generate(RNNLM.from_pretrained(folder), prompt, 30, sampling=GREEDY)[0]
    options = ["generate", "--model", folder, "--prompt", "zwei Katzen", "--tokens", 30]
    result = _run(*options, "--temperature", 0)
    assert result.stdout == "zwei Katzen" + tokenizer.decode(expected) + "\n", result.stderr
    assert _run(*options, "--beams", 2).exit_code == 0


def test_model_of_a_kind_that_a_command_has_no_use_for_is_named(tagger: Path, writer: Path, tmp_path: Path) -> None:
    _assert_refused(_run("generate", "--model", tagger, "--prompt", "x"), r"expected architectures \['RNNLM'\]")
    expected = "expected model_type or architecture RNNForTokenClassification or RNNForSequenceClassification in "
    _assert_refused(_run("tag", "--model", writer, stdin="x"), expected + ".*config.json, got gpt2 and GPT2LMHeadModel")
    (tmp_path / "config.json").write_text('{"model_type": "rwkv", "architectures": 3}')
    kinds = "gpt2 or openai-gpt or pyattn-rnn or pyattn-transformer-xl or transfo-xl"
    expected = f"expected model_type or architecture {kinds} in .*config.json, got rwkv$"
    _assert_refused(_run("generate", "--model", tmp_path, "--prompt", "x"), expected)
    _assert_refused(
        _run("generate", "--model", tmp_path / "none", "--prompt", "x"), "model: expected a folder, there is no"
    )


def _predicted(folder: Path, kind: type, sentences: list[list[str]]) -> list[list[str]]:
    tokenizer = language.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [labelled.predict(kind.from_pretrained(folder), tokenizer, [words])[0] for words in sentences]


def test_tag_writes_each_word_with_its_tag(tagger: Path, tmp_path: Path) -> None:
    lines = [*SENTENCES, "", "  zwei   Hunde "]
    (tmp_path / "source").write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = _run("tag", "--model", tagger, "--source", tmp_path / "source", "--batch", 2)
    assert result.exit_code == 0, result.stderr
    words = [line.split() for line in lines if line]
    told = _predicted(tagger, RNNForTokenClassification, words)
    blocks = [
        "".join(f"{word}\t{tag}\n" for word, tag in zip(*sentence, strict=True)) + "\n"
        for sentence in zip(words, told, strict=True)
    ]
    assert result.stdout == "".join([*blocks[:4], "\n", blocks[4]])
    assert len({tag for tags in told for tag in tags}) > 1
    assert _run("tag", "--model", tagger, stdin="\n".join(lines)).stdout == result.stdout


def test_tag_writes_each_text_behind_its_label(labeller: Path) -> None:
    result = _run("tag", "--model", labeller, stdin="\n".join([*SENTENCES[:2], "", *SENTENCES[2:]]) + "\n")
    assert result.exit_code == 0, result.stderr
    told = _predicted(labeller, RNNForSequenceClassification, [[sentence] for sentence in SENTENCES])
    expected = [f"{label}\t{sentence}" for (label,), sentence in zip(told, SENTENCES, strict=True)]
    assert result.stdout.split("\n") == [*expected[:2], "", *expected[2:], ""]


@pytest.mark.parametrize("kind", [RNNForTokenClassification, RNNForSequenceClassification])
def test_tag_counts_what_is_right(kind: type, tagger: Path, labeller: Path, tmp_path: Path) -> None:
    model = tagger if kind is RNNForTokenClassification else labeller
    own, changed = tmp_path / "own", tmp_path / "changed"
    own.write_text(_run("tag", "--model", model, stdin="\n".join(SENTENCES)).stdout, encoding="utf-8")
    result = _run("tag", "--model", model, "--reference", own)
    count = sum(map(len, map(str.split, SENTENCES))) if model is tagger else len(SENTENCES)
    assert result.stdout == own.read_text("utf-8")
    assert result.stderr == f"accuracy 1.0000 of {count}\n"
    first, _, rest = own.read_text("utf-8").partition("\n")
    wrong = first.split("\t")[0] + "\tX" if model is tagger else "X\t" + first.split("\t")[1]
    changed.write_text(wrong + "\n" + rest, encoding="utf-8")
    result = _run("tag", "--model", model, "--reference", changed)
    assert result.stdout == own.read_text("utf-8")
    assert result.stderr == f"accuracy {(count - 1) / count:.4f} of {count}\n"


def test_tag_refuses_what_it_cannot_read(tagger: Path, tmp_path: Path) -> None:
    (tmp_path / "reference").write_text("ein\tDET\nHund NOUN\n")
    files = ["--reference", tmp_path / "reference"]
    _assert_refused(
        _run("tag", "--model", tagger, *files), "reference: expected a word, .*reference, line 2, got 'Hund"
    )
    _assert_refused(_run("tag", "--model", tagger, *files, "--source", tmp_path), "reference: expected no --source")
    _assert_refused(_run("tag", "--model", tagger, "--source", tmp_path / "none"), "expected a file, .*does not exist")
    (tmp_path / "reference").write_text("\n")
    result = _run("tag", "--model", tagger, *files)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no lines\n")
    result = CliRunner().invoke(app, ["tag", "--model", str(tagger)], input=b"ein\nzwei \xff\n")
    _assert_refused(result, "standard input has the byte 0xff, line 2")
