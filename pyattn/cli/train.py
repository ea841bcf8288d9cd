"""`pyattn train` and `pyattn compare`."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pyattn.cli.console import chosen_device, console, say
from pyattn.cli.options import settings_options, settings_values
from pyattn.files import held
from pyattn.training import parallel
from pyattn.training.recipes import (
    BertSettings,
    GPTSettings,
    TransformerSettings,
    TransformerXLSettings,
    XLNetSettings,
)
from pyattn.training.recurrent_recipes import CaptionSettings, RNNSettings, Seq2SeqSettings
from pyattn.training.settings import Settings

if TYPE_CHECKING:
    from pyattn.training.loop import Step
    from pyattn.training.run import Run

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Train a model on text.")

Out = Annotated[Path, typer.Option(help="Folder for checkpoint, metrics, curve and the best model.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start anew where a checkpoint is.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cuda if there is one")]
SampleTokens = Annotated[int, typer.Option(min=0, help="Length of the text written at the end.")]


@app.command("gpt")
@settings_options(GPTSettings)
def train_gpt(
    ctx: typer.Context,
    out: Out = Path("runs/gpt"),
    resume: Resume = False,
    overwrite: Overwrite = False,
    device: Device = None,
    sample_tokens: SampleTokens = 200,
    **settings: Any,
) -> None:
    """Train a GPT-2 on a text, then let it write.

    [bold]A whole example[/bold]

    pyattn train gpt --text my-book.txt --out runs/book --steps 2000\n
    pyattn train gpt --out runs/book --resume          [dim]# after Ctrl-C, or with more --steps[/dim]\n
    torchrun --nproc-per-node 2 --no-python pyattn train gpt --text my-book.txt --out runs/book

    With --resume every setting comes from the checkpoint; --steps and --patience may be raised.
    """
    with _training(ctx, GPTSettings, out, device, resume=resume, overwrite=overwrite) as run:
        _write_sample(run, sample_tokens)


@app.command("transformer-xl")
@settings_options(TransformerXLSettings)
def train_transformer_xl(
    ctx: typer.Context,
    out: Out = Path("runs/transformer-xl"),
    resume: Resume = False,
    overwrite: Overwrite = False,
    device: Device = None,
    sample_tokens: SampleTokens = 200,
    **settings: Any,
) -> None:
    """Train a Transformer-XL on a text, then let it write.

    The text is read as --batch streams side by side, each step with a memory of what the steps before have read.

    [bold]A whole example[/bold]

    pyattn train transformer-xl --text my-book.txt --out runs/book --steps 2000

    pyattn train transformer-xl --out runs/book --resume          [dim]# after Ctrl-C, or with more --steps[/dim]

    pyattn generate --model runs/book/model --prompt "Once upon a time"

    With --resume every setting comes from the checkpoint; --steps and --patience may be raised.
    """
    with _training(ctx, TransformerXLSettings, out, device, resume=resume, overwrite=overwrite) as run:
        _write_sample(run, sample_tokens)


@app.command("rnn")
@settings_options(RNNSettings)
def train_rnn(
    ctx: typer.Context,
    out: Out = Path("runs/rnn"),
    resume: Resume = False,
    overwrite: Overwrite = False,
    device: Device = None,
    sample_tokens: SampleTokens = 200,
    **settings: Any,
) -> None:
    """Train a recurrent network: on a text, to write; on words with tags, to tag; on texts with labels, to label.

    A text is read as --batch streams side by side, in each step from the states that the step before has left. `pyattn
    generate` writes with the model, `pyattn tag` tags and labels with it.

    [bold]A whole example[/bold]

    pyattn train rnn --text my-book.txt --out runs/book --steps 2000\n
    pyattn train rnn --tagged train.tsv --out runs/tagger --cell gru\n
    pyattn train rnn --labelled reviews.tsv --out runs/reviews\n
    pyattn train rnn --out runs/book --resume          [dim]# after Ctrl-C, or with more --steps[/dim]

    With --resume every setting comes from the checkpoint; --steps and --patience may be raised.
    """
    from pyattn.models.rnn import RNNLM

    with _training(ctx, RNNSettings, out, device, resume=resume, overwrite=overwrite) as run:
        if isinstance(run.model, RNNLM):
            _write_sample(run, sample_tokens)


@app.command("transformer")
@settings_options(TransformerSettings)
def train_transformer(
    ctx: typer.Context,
    out: Out = Path("runs/transformer"),
    resume: Resume = False,
    overwrite: Overwrite = False,
    device: Device = None,
    **settings: Any,
) -> None:
    """Train a Transformer to translate, from two files of which each line of one translates that line of the other.

    [bold]A whole example[/bold]

    pyattn train transformer --source train.de --target train.en --validation-source val.de --validation-target val.en
    --out runs/de-en\n
    pyattn train transformer --out runs/de-en --resume          [dim]# after Ctrl-C, or with more --steps[/dim]

    With --resume every setting comes from the checkpoint; --steps and --patience may be raised.
    """
    with _training(ctx, TransformerSettings, out, device, resume=resume, overwrite=overwrite):
        pass


@app.command("seq2seq")
@settings_options(Seq2SeqSettings)
def train_seq2seq(
    ctx: typer.Context,
    out: Out = Path("runs/seq2seq"),
    resume: Resume = False,
    overwrite: Overwrite = False,
    device: Device = None,
    **settings: Any,
) -> None:
    """Train a recurrent encoder and decoder to translate, from two files as `pyattn train transformer` takes them.

    Attention is Luong's or Bahdanau's, by any score, to all of a sentence, within a window or hard; or there is none.

    [bold]A whole example[/bold]

    pyattn train seq2seq --source train.de --target train.en --score additive --out runs/de-en

    pyattn train seq2seq --source train.de --target train.en --order bahdanau --cell gru --out runs/bahdanau

    pyattn train seq2seq --source train.de --target train.en --window predictive --window-size 5 --out runs/local

    pyattn train seq2seq --source train.de --target train.en --no-attention --out runs/no-attention

    pyattn train seq2seq --out runs/de-en --resume          [dim]# after Ctrl-C, or with more --steps[/dim]

    With --resume every setting comes from the checkpoint; --steps and --patience may be raised.
    """
    with _training(ctx, Seq2SeqSettings, out, device, resume=resume, overwrite=overwrite):
        pass


@app.command("caption")
@settings_options(CaptionSettings)
def train_caption(
    ctx: typer.Context,
    out: Out = Path("runs/caption"),
    resume: Resume = False,
    overwrite: Overwrite = False,
    device: Device = None,
    **settings: Any,
) -> None:
    """Train Show, Attend and Tell to describe pictures: your own, or scenes of coloured shapes that need no download.

    A folder of pictures is one of Flickr8k, COCO, Karpathy's JSON, or has a metadata.csv or .jsonl with file_name and
    caption. Of scenes it says at the end how many captions are right, and how much it looked at what it named.

    [bold]A whole example[/bold]

    pyattn train caption --out runs/scenes\n
    pyattn train caption --hard --out runs/hard\n
    pyattn train caption --images flickr8k --image-size 128 --layers 4 --out runs/caption\n
    pyattn train caption --out runs/caption --resume          [dim]# after Ctrl-C, or with more --steps[/dim]\n
    pyattn caption --model runs/caption/model --pictures runs/looks picture.png

    With --resume every setting comes from the checkpoint; --steps and --patience may be raised.
    """
    with _training(ctx, CaptionSettings, out, device, resume=resume, overwrite=overwrite) as run:
        if run.settings.images is None:  # type: ignore[attr-defined]
            _write_scores(run)


@app.command("bert")
@settings_options(BertSettings)
def train_bert(
    ctx: typer.Context,
    out: Out = Path("runs/bert"),
    resume: Resume = False,
    overwrite: Overwrite = False,
    device: Device = None,
    **settings: Any,
) -> None:
    """Train a BERT on text with a sentence in each line and an empty line between documents.

    It learns to guess masked tokens, and whether one passage follows another; evaluations show both losses, next to
    what guessing by frequency and by coin would reach.

    [bold]A whole example[/bold]

    pyattn train bert --text articles.txt --out runs/bert --steps 20000\n
    pyattn train bert --out runs/bert --resume          [dim]# after Ctrl-C, or with more --steps[/dim]

    With --resume every setting comes from the checkpoint; --steps and --patience may be raised.
    """
    with _training(ctx, BertSettings, out, device, resume=resume, overwrite=overwrite):
        pass


@app.command("xlnet")
@settings_options(XLNetSettings)
def train_xlnet(
    ctx: typer.Context,
    out: Out = Path("runs/xlnet"),
    resume: Resume = False,
    overwrite: Overwrite = False,
    device: Device = None,
    **settings: Any,
) -> None:
    """Train an XLNet on a text: it learns to predict tokens from those that come before them in permuted orders.

    The text is read as --batch streams side by side, each step with a memory of what the steps before have read.
    Evaluations show the loss of the predicted tokens next to what guessing by frequency would reach.

    [bold]A whole example[/bold]

    pyattn train xlnet --text my-book.txt --out runs/xlnet --steps 20000\n
    pyattn train xlnet --out runs/xlnet --resume          [dim]# after Ctrl-C, or with more --steps[/dim]

    With --resume every setting comes from the checkpoint; --steps and --patience may be raised.
    """
    with _training(ctx, XLNetSettings, out, device, resume=resume, overwrite=overwrite):
        pass


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders written by `pyattn train`.")],
    out: Annotated[Path, typer.Option(help="The picture to write, PNG.")] = Path("runs/compare.png"),
) -> None:
    """Draw the loss curves of several runs and their tokens per second into one picture.

    [bold]A whole example[/bold]

    pyattn compare runs/gpt-pyattn runs/gpt-torch --out runs/gpt.png
    """
    from pyattn.training import metrics, plot

    lines = [metrics.read(folder) for folder in runs]
    table = Table("run", "steps", "training loss", "validation loss", "tokens/s", f"/ {runs[-1].name}")
    speeds = [metrics.tokens_per_second(line) for line in lines]
    for folder, line, speed in zip(runs, lines, speeds, strict=True):
        steps, losses = metrics.curve(line, "loss")
        values = metrics.curve(line, "val_loss")[1]
        table.add_row(
            folder.name, str(steps[-1]), f"{losses[-1]:.4f}", f"{values[-1]:.4f}" if values else "",
            f"{speed:,.0f}", f"{speed / speeds[-1]:.2f}",
        )  # fmt: skip
    console.print(table)
    console.print(f"picture {plot.comparison(runs, out)}", soft_wrap=True)


@contextmanager
def _training(
    ctx: typer.Context, recipe: type[Settings], out: Path, device: str | None, *, resume: bool, overwrite: bool
) -> Iterator[Run]:
    """Opens a run, trains it to its end, and yields it: alone, or as one of torchrun's processes."""
    from pyattn.training.run import open_run

    values, given = settings_values(ctx, recipe)
    with ExitStack() as stack:
        chosen = stack.enter_context(parallel.group(chosen_device(device)))
        stack.enter_context(_first_process_speaks())
        if parallel.rank() == 0:
            stack.enter_context(held(out))
        run = open_run(out, recipe, values, given, chosen, resume=resume, overwrite=overwrite)
        _show_run(run)
        _finish(run)
        yield run


@contextmanager
def _first_process_speaks() -> Iterator[None]:
    """Of several processes, which all come to the same, the others print errors only."""
    console.quiet = parallel.rank() > 0
    try:
        yield
    finally:
        console.quiet = False


def _finish(run: Run) -> None:
    with _interruptible() as interrupted:
        for step in _watched(run):
            if parallel.anywhere(interrupted() > 0, run.device):
                run.save()
                say(
                    f"stopped after step {step.step} of {run.settings.steps}; go on with: "
                    f"pyattn train {run.settings.kind} --out {run.folder} --resume"
                )
                raise typer.Exit(128 + (interrupted() or signal.SIGINT))
    if run.out_of_patience:
        say(f"stopped after step {run.step}: no better validation loss in {run.evaluations_since_best} evaluations")
    say(f"checkpoint {run.checkpoint_path}, loss curve {run.folder / 'loss.png'}")
    say(f"best model, validation loss {run.best_loss:.3f}: {run.model_path}")


def _write_sample(run: Run, count: int) -> None:
    """Lets a language model write `count` tokens."""
    if count and parallel.rank() == 0:
        from pyattn.training.language import write_sample

        text = write_sample(run.model, run.task.tokenizer, run.folder / "sample.txt", count, run.settings.seed)
        console.rule("sample")
        console.print(text, soft_wrap=True)


def _write_scores(run: Run) -> None:
    """Says how well scenes are described by the best model."""
    if parallel.rank() == 0:
        from pyattn.models.caption import ShowAttendTell
        from pyattn.training.scene_scores import score_scenes

        model = ShowAttendTell.from_pretrained(run.model_path).to(run.device)
        for name, held_out in (("seen pairs of colour and shape", False), ("held-out pairs", True)):
            say(f"{name}: {score_scenes(model, run.task.tokenizer, held_out=held_out)}")


def _show_run(run: Run) -> None:
    parameters = sum(p.numel() for p in run.model.parameters())
    attention = f" and {run.settings.attention} attention" if run.settings.attends else ""
    say(
        f"{type(run.model).__name__} with {parameters:,} parameters{attention} on {run.device}; "
        f"{run.task.describe()}; {run.settings.steps:,} steps"
        + (f" in {parallel.world()} processes" if parallel.world() > 1 else "")
        + (f", going on after step {run.step}" if run.step else "")
    )


def _watched(run: Run) -> Iterator[Step]:
    """The run's steps, with a progress bar on a terminal and a line for each evaluation anywhere."""
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
    tokens, seconds = 0, 0.0
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=run.settings.steps, completed=run.step, state="")
        for step in run.steps():
            tokens, seconds = tokens + step.tokens, seconds + step.seconds
            state = f"loss {step.loss:.3f}  {tokens / seconds:,.0f} tokens/s"
            progress.update(task, completed=step.step, state=state)
            if step.val_loss is not None:
                line = f"step {step.step:5}/{run.settings.steps}  {_validation(run, step)}  {state}"
                say(line, to=progress.console)
            yield step


def _validation(run: Run, step: Step) -> str:
    """The validation loss, with its parts and what they must beat where it has several."""
    words = [f"validation {step.val_losses['loss']:.3f}"]
    for name, baseline in run.task.baselines.items():
        words.append(f"{name} {step.val_losses[name]:.3f} (of {baseline:.3f})")
    return "  ".join(words)


@contextmanager
def _interruptible() -> Iterator[Callable[[], int]]:
    """Yields which signal asked the run to stop, 0 if none: Ctrl-C, or what a scheduler and a closed terminal send.

    The first one lets the running step end, a second one stops at once. What is ignored (nohup) stays so.
    """
    names = "SIGINT", "SIGTERM", "SIGHUP"
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: handler for number in numbers if (handler := signal.getsignal(number)) is not signal.SIG_IGN}
    came = 0

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, _: object) -> None:
        nonlocal came
        came = number
        restore()

    for number in before:
        signal.signal(number, stop)
    try:
        yield lambda: came
    finally:
        restore()
