"""`pyattn translate`, `generate`, `fill-mask` and `tag`: text in, text out, in a terminal or a pipe."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import track

from pyattn.check import RangeError
from pyattn.cli.console import chosen_device, types_in
from pyattn.cli.models import load
from pyattn.cli.options import configurable
from pyattn.files import replacing
from pyattn.tokens import encode, read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from pyattn.decoding.translation import Translation
    from pyattn.models.seq2seq import Seq2Seq

_LINES_AT_ONCE = 1024  # so that sentences of similar length meet, and a pipe of any length goes through

Item = TypeVar("Item")
Model = Annotated[Path, typer.Option(help="Folder with config.json, model.safetensors and tokenizer.json.")]
Attention = Annotated[str, typer.Option(help="pyattn, or torch: what there is without pyattn.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cuda if there is one")]
Beams = Annotated[int, typer.Option(min=1, help="Width of the beam search.")]
Penalty = Annotated[float, typer.Option(help="Divide the scores of tokens that the text has already by this.")]
Ngram = Annotated[int, typer.Option(min=0, help="Let no run of so many tokens come twice; 0: any may.")]


@configurable
def translate(
    model: Model,
    source: Annotated[Path | None, typer.Option(help="Sentences, one per line.", show_default="standard input")] = None,
    out: Annotated[Path | None, typer.Option(help="Where they go.", show_default="standard output")] = None,
    reference: Annotated[Path | None, typer.Option(help="Right translations: prints BLEU to standard error.")] = None,
    beams: Beams = 4,
    best: Annotated[
        int,
        typer.Option(
            min=1,
            help="Translations per sentence; several come with the sentence's number and their scores, behind tabs.",
        ),
    ] = 1,
    pictures: Annotated[
        Path | None,
        typer.Option(help="Folder for a picture of each line: which words the translation's words were found in."),
    ] = None,
    length_penalty: Annotated[float, typer.Option(help="Scores are divided by length to this power.")] = 1.0,
    gnmt: Annotated[float | None, typer.Option(help="Divide by GNMT's length penalty with this alpha instead.")] = None,
    repetition_penalty: Penalty = 1.0,
    no_repeat_ngram: Ngram = 0,
    batch: Annotated[int, typer.Option(min=1, help="Sentences translated at once.")] = 64,
    attention: Attention = "pyattn",
    device: Device = None,
) -> None:
    """Translate sentences with a Transformer, a recurrent model, or a MarianMT model with a tokenizer.json.

    --pictures takes a recurrent model with attention, whose weights for a line go to the file of its number.

    [bold]A whole example[/bold]

    pyattn train transformer --source train.de --target train.en --out runs/de-en\n
    echo "Ein Hund läuft über eine Wiese." | pyattn translate --model runs/de-en/model\n
    pyattn translate --model runs/de-en/model --source test.de --reference test.en --out test.translated\n
    pyattn train seq2seq --source train.de --target train.en --out runs/recurrent\n
    pyattn translate --model runs/recurrent/model --source test.de --pictures runs/alignments
    """
    from pyattn.decoding.beam import by_length
    from pyattn.decoding.beam import gnmt as by_gnmt
    from pyattn.decoding.rules import Rules
    from pyattn.decoding.translation import translate as run
    from pyattn.models import seq2seq, transformer
    from pyattn.training import text

    if best > beams:
        raise RangeError(f"best: expected at most beams={beams}, got {best}")
    references = None if reference is None else text.lines(reference, "reference")
    if references is not None:
        import sacrebleu  # before the work, that none is done where it is missing
    kinds: dict[str, Any] = dict.fromkeys(("marian", transformer.OWN_TYPE), transformer.Transformer)
    kinds[seq2seq.OWN_TYPE] = seq2seq.Seq2Seq
    network = load(model, kinds, attention=attention).to(chosen_device(device))
    if pictures is not None and getattr(network, "score", None) is None:
        raise RangeError(f"pictures: expected a recurrent model with attention, {model} has a {type(network).__name__}"
                         " without alignment")  # fmt: skip
    tokenizer = tokenizer_beside(model, network.config.vocab)
    rules = Rules(repetition_penalty, no_repeat_ngram, forbidden=(network.config.pad, network.config.start))
    normalize = by_length(length_penalty) if gnmt is None else by_gnmt(gnmt)
    given = text.standard_input() if source is None else text.lines(source, "source")
    if references is not None and isinstance(given, list):
        _check_count(references, len(given), reference, source)
    size = 1 if source is None and types_in() else _LINES_AT_ONCE
    told: list[str] = []
    errors = Console(stderr=True)
    bar: dict[str, Any] = {"console": errors, "transient": True, "disable": source is None or not errors.is_terminal}
    with _opened(out) as file:
        for sentences in _portions(given, size):
            try:
                found = run(
                    network, tokenizer, sentences, beams=beams, batch=batch, normalize=normalize, rules=rules,
                    first=len(told) + 1, watch=partial(track, description="translating", **bar),
                )  # fmt: skip
            except RangeError as error:
                raise RangeError(f"{source or 'standard input'}, {error}") from None
            if pictures is not None:
                _draw_alignments(network, tokenizer, sentences, found, pictures, len(told) + 1)
            for translations in found:
                told.append(one_line(translations[0].text) if translations else "")
                scored = [f"{len(told)}\t{each.score:.4f}\t{one_line(each.text)}" for each in translations[:best]]
                print(*(scored if best > 1 else told[-1:]), sep="\n", file=file, flush=True)
    if references is not None:
        _check_count(references, len(told), reference, source)
        bleu = sacrebleu.metrics.BLEU()
        typer.echo(f"{bleu.corpus_score(told, [references])}  {bleu.get_signature()}" if told else "no lines", err=True)


@configurable
def generate(
    model: Model,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text to go on from; several are continued together.", show_default="standard input"),
    ] = None,
    tokens: Annotated[int, typer.Option(min=0, help="Most tokens to add.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many most probable tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the fewest tokens that reach this probability.")
    ] = 0.95,
    min_p: Annotated[
        float | None, typer.Option(help="Draw from tokens at least so probable, relative to the first.")
    ] = None,
    beams: Annotated[int, typer.Option(min=1, help="More than 1: beam search, and nothing is drawn.")] = 1,
    repetition_penalty: Penalty = 1.0,
    no_repeat_ngram: Ngram = 0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of what is drawn.")] = 0,
    attention: Attention = "pyattn",
    device: Device = None,
) -> None:
    """Continue a text with a GPT, a Transformer-XL or a recurrent network, token by token as they come.

    [bold]A whole example[/bold]

    pyattn train gpt --text my-book.txt --out runs/book          [dim]# or train transformer-xl, train rnn[/dim]\n
    pyattn generate --model runs/book/model --prompt "Once upon a time" --tokens 100\n
    cat chapter-1.txt | pyattn generate --model runs/book/model --temperature 0 > chapter-2.txt
    """
    from pyattn.decoding.beam import beam_search
    from pyattn.decoding.protocol import pad_batch
    from pyattn.decoding.rules import Rules
    from pyattn.decoding.sampling import Sampling, stream
    from pyattn.models import rnn, transformer_xl
    from pyattn.models.gpt import GPT
    from pyattn.training.language import first_token
    from pyattn.training.text import standard_input

    chosen = chosen_device(device)
    kinds = {"gpt2": GPT, "openai-gpt": GPT, rnn.OWN_TYPE: rnn.RNNLM}
    kinds |= dict.fromkeys((transformer_xl.OWN_TYPE, "transfo-xl"), transformer_xl.TransformerXL)
    network = load(model, kinds, attention=attention).to(chosen)
    tokenizer = tokenizer_beside(model, network.config.vocab)
    texts = prompt or ["" if types_in() else "\n".join(standard_input())]
    prompts = [encode(tokenizer, text).ids or [first_token(tokenizer)] for text in texts]
    padded, lengths = pad_batch(prompts, chosen)
    rules = Rules(repetition_penalty, no_repeat_ngram)
    if beams > 1:
        found = beam_search(network, padded, tokens, beams=beams, lengths=lengths, rules=rules, end=network.config.end)
        for text, best in zip(texts, found, strict=True):
            typer.echo(text + tokenizer.decode(best[0].tokens if best else []))
        return
    steps = stream(
        network, padded, tokens, lengths=lengths, sampling=Sampling(temperature, top_k, top_p, min_p), rules=rules,
        end=network.config.end, generator=torch.Generator(chosen).manual_seed(seed),
    )  # fmt: skip
    if len(texts) > 1:
        columns: list[list[int]] = [[] for _ in texts]
        for column, token in ((columns[i], token) for step in steps for i, token in enumerate(step)):
            column += [] if token is None else [token]
        for text, column in zip(texts, columns, strict=True):
            typer.echo(text + tokenizer.decode(column))
        return
    typer.echo(texts[0], nl=False)
    added: list[int] = []
    told = ""
    for tokens_of_step in steps:
        added += [token for token in tokens_of_step if token is not None]
        now = tokenizer.decode(added)
        if not now.endswith("\ufffd"):  # else the bytes of a character have not all come yet
            print(now[len(told) :], end="", flush=True)
            told = now
    typer.echo(tokenizer.decode(added)[len(told) :])


@configurable
def fill_mask(
    model: Model,
    text: Annotated[
        list[str] | None, typer.Option(help="Text with [MASK] in it.", show_default="standard input")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Words to show for each mask.")] = 5,
    attention: Attention = "pyattn",
    device: Device = None,
) -> None:
    """Show what BERT would put in place of each [MASK], with its probability.

    [bold]A whole example[/bold]

    pyattn train bert --text my-books.txt --out runs/bert\n
    echo "The capital of France is [MASK]." | pyattn fill-mask --model runs/bert/model
    """
    from pyattn.models.bert import BertForMaskedLM
    from pyattn.training.text import TextError, standard_input

    network = BertForMaskedLM.from_pretrained(model, attention=attention).to(chosen_device(device))
    tokenizer = tokenizer_beside(model, network.config.vocab)
    tokenizer.encode_special_tokens = False  # [MASK] is meant
    if (mask := tokenizer.token_to_id("[MASK]")) is None:
        raise TextError(f"text: the tokenizer beside {model} has no [MASK]")
    for number, line in enumerate(text or standard_input(), 1):
        where = "text" if text else f"standard input, line {number:,}"
        if not line.strip():
            typer.echo()
            continue
        ids = encode(tokenizer, line).ids
        if mask not in ids:
            raise TextError(f"{where}: expected [MASK] in it, got {line!r}")
        if len(ids) > network.config.context:
            raise TextError(f"{where}: expected at most context={network.config.context} tokens, got {len(ids)}")
        with torch.no_grad():
            logits = network(torch.tensor([ids], device=network.bert.tokens.weight.device))[0]
        for place in [place for place, token in enumerate(ids) if token == mask]:
            p, tokens = logits[place].softmax(-1).topk(min(top, logits.shape[-1]))
            for probability, token in zip(p.tolist(), tokens.tolist(), strict=True):
                filled = [*ids[:place], token, *ids[place + 1 :]]
                typer.echo(f"{probability:.4f}\t{tokenizer.id_to_token(token)}\t{tokenizer.decode(filled)}")


@configurable
def tag(
    model: Model,
    source: Annotated[
        Path | None, typer.Option(help="Sentences or texts, one per line.", show_default="standard input")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="Sentences or texts with right labels, as for training: prints the accuracy, too."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sentences or texts read at once.")] = 64,
    device: Device = None,
) -> None:
    """Tag the words of sentences, or label texts, with a recurrent network.

    Words stand between spaces. Each comes with its tag in a line, behind a tab, with an empty line behind a sentence.
    A text comes behind its label and a tab. Empty lines stay empty. Accuracy goes to standard error.

    [bold]A whole example[/bold]

    pyattn train rnn --tagged train.tsv --out runs/tagger\n
    echo "Anna lives in Rome ." | pyattn tag --model runs/tagger/model\n
    pyattn tag --model runs/tagger/model --reference test.tsv > test.tagged
    """
    from pyattn.models.rnn import RNNForSequenceClassification, RNNForTokenClassification
    from pyattn.training import text
    from pyattn.training.labelled import predict, read_labelled, read_tagged

    if source is not None and reference is not None:
        raise RangeError("reference: expected no --source beside it, because its own words are read")
    kinds = {kind.__name__: kind for kind in (RNNForTokenClassification, RNNForSequenceClassification)}
    network = load(model, kinds).to(chosen_device(device))
    tokenizer = tokenizer_beside(model, network.config.vocab)
    by_word = isinstance(network, RNNForTokenClassification)
    given: Iterable[list[str]]
    if reference is None:
        lines = text.standard_input() if source is None else text.lines(source, "source")
        given = (line.split() if by_word else [line.strip()] if line.strip() else [] for line in lines)
    else:
        examples = (read_tagged if by_word else read_labelled)(reference, "reference")
        given = [example.words for example in examples]
    size = 1 if source is None and reference is None and types_in() else batch
    told: list[str] = []
    for sentences in _portions(given, size):
        found = iter(predict(network, tokenizer, [words for words in sentences if words]))
        for words in sentences:
            labels = next(found) if words else []
            print(_labelled(words, labels, by_word), flush=True)
            told += labels
    if reference is not None:
        right = [label for example in examples for label in example.labels]
        same = sum(ours == theirs for ours, theirs in zip(told, right, strict=True))
        typer.echo(f"accuracy {same / len(right):.4f} of {len(right):,}" if right else "no lines", err=True)


def _check_count(references: Sequence[str], count: int, reference: Path | None, source: Path | None) -> None:
    if len(references) != count:
        given = f"as {source or 'standard input'} has, {reference} has {len(references):,}"
        raise RangeError(f"reference: expected {count:,} lines, {given}")


@torch.no_grad()
def _draw_alignments(
    network: Seq2Seq,
    tokenizer: Tokenizer,
    sentences: Sequence[str],
    found: Sequence[Sequence[Translation]],
    folder: Path,
    first: int,
) -> None:
    """Draws the best translation of each sentence that has one, the first in the file `first`.png."""
    from pyattn.decoding.pictures import draw_alignment

    folder.mkdir(parents=True, exist_ok=True)
    device, c = network.output.bias.device, network.config

    def words(tokens: Sequence[int]) -> list[str]:
        return [tokenizer.decode([token], skip_special_tokens=False).strip() for token in tokens]

    for number, (sentence, translations) in enumerate(zip(sentences, found, strict=True), first):
        if translations:
            best, source = translations[0], encode(tokenizer, sentence).ids
            target = [*best.tokens, c.end] if best.ended else best.tokens
            rows = torch.tensor([source], device=device), torch.tensor([[c.start, *target[:-1]]], device=device)
            draw_alignment(folder / f"{number}.png", network.alignment(*rows)[0], words(source), words(target))


def tokenizer_beside(folder: Path, vocab: int) -> Tokenizer:
    """The tokenizer.json beside a model.

    Raises:
        PretrainedError: there is none, it is damaged, or it has more tokens than the model.
    """
    from pyattn.models.pretrained import PretrainedError

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise PretrainedError(f"model: expected a file {path}, there is none")
    try:
        tokenizer = read_tokenizer(path.read_text("utf-8"), path)
    except UnicodeDecodeError as error:
        raise PretrainedError(f"model: {path} is damaged ({error})") from error
    if (largest := max(tokenizer.get_vocab().values(), default=0)) >= vocab:
        raise PretrainedError(
            f"model: {path} has {largest + 1:,} tokens, more than the {vocab:,} of the model beside it"
        )
    tokenizer.encode_special_tokens = True  # "</s>" in a text is text; the file does not say so
    return tokenizer


def one_line(text: str) -> str:
    """A translation for a file of lines: one that has several would move all behind it."""
    return re.sub(r"[\n\r\t]", " ", text)


def _labelled(words: list[str], labels: list[str], by_word: bool) -> str:
    """A line for each word and its tag, and an empty one; or a line for a text and its label."""
    if by_word:
        return "".join(f"{word}\t{label}\n" for word, label in zip(words, labels, strict=True))
    return "".join(f"{label}\t{text}" for text, label in zip(words, labels, strict=True))


def _portions(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    remaining = iter(items)
    while portion := list(islice(remaining, size)):
        yield portion


@contextmanager
def _opened(out: Path | None) -> Iterator[TextIO]:
    """The file to write to, which replaces an older one only when all is written; or standard output."""
    if out is None:
        yield sys.stdout
        return
    if out.is_dir():
        raise RangeError(f"out: expected a file, {out} is a folder")
    with replacing(out) as path, path.open("w", encoding="utf-8") as file:
        yield file
