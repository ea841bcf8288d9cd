"""The `pyattn` command. Commands only: each parses, calls the package, and prints."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track
    from rich.table import Table
    from rich.text import Text
    from typer.core import TyperGroup
except ModuleNotFoundError as missing:
    raise SystemExit(f"pyattn: the command needs {missing.name}: pip install 'pyattn[tools]'") from None

import torch

from pyattn.check import PyattnError, RangeError
from pyattn.spec import FEATURES, dtype_name

if TYPE_CHECKING:
    from pyattn.training.loop import Step
    from pyattn.training.run import Run
    from pyattn.verification import Verdict


def _console(markup: bool) -> Console:
    # Without a terminal there is no width to ask for; a table in a log file then has room for its columns.
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=markup)


console = _console(markup=False)  # paths and samples may hold brackets


class _Commands(TyperGroup):
    """A user's mistake is one sentence on stderr and exit code 2; only a bug shows a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PyattnError as error:
            message = str(error)
        except ModuleNotFoundError as error:
            message = f"the command needs {error.name}: pip install 'pyattn[tools]'"
        except OSError as error:
            if error.filename is None:
                raise
            message = f"{error.filename}: {error.strerror}"
        typer.echo(f"pyattn: {message}", err=True)
        raise typer.Exit(2)


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False
)
train = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Train a model on text.")
app.add_typer(train, name="train")


@app.callback()
def _help() -> None:
    """Fused attention for PyTorch: what runs here, whether it is right, how fast it is, and a model trained with it.

    [bold]A whole example[/bold]

    pyattn info\n
    pyattn verify\n
    pyattn bench --out runs/bench\n
    pyattn train gpt --text my-book.txt --out runs/pyattn\n
    pyattn train gpt --text my-book.txt --out runs/torch --attention torch\n
    pyattn compare runs/pyattn runs/torch --out runs/compare.png
    """


@app.command()
def info() -> None:
    """Show this machine as pyattn sees it, and which backends can run on it."""
    from pyattn import machine

    facts = Table.grid(padding=(0, 2))
    for name, value in machine.describe().items():
        facts.add_row(Text(name, "bold"), value)
    console.print(facts)
    console.print()
    states = Table("backend", "state")
    for name, state in machine.backends().items():
        states.add_row(name, Text(state, "green" if state == "ready" else ""))
    console.print(states)


@app.command()
def verify(
    backend: Annotated[list[str] | None, typer.Option(help="Only this one; may be given several times.")] = None,
) -> None:
    """Hold every ready backend against the float64 definition, forward and backward. Exit code 1 if a case fails.

    A case passes when its error is at most twice that of plain PyTorch in the same dtype, plus rounding.
    """
    from pyattn import verification

    jobs = verification.jobs(verification.ready(backend))
    bar = track(jobs, "verifying", console=console, transient=True, disable=not console.is_terminal)
    verdicts = [verification.verify(*job) for job in bar]
    console.print(_verification_table(verdicts))
    failed = [verdict for verdict in verdicts if verdict.failures]
    refused = [verdict for verdict in verdicts if verdict.refusal is not None]
    for verdict in failed:
        for failure in verdict.failures:
            name = f"{verdict.backend} {verdict.case} {dtype_name(verdict.dtype)}"
            console.print(f"{name} {failure}", style="red")
    passed = len(verdicts) - len(failed) - len(refused)
    console.print(f"{passed} cases passed, {len(failed)} failed, {len(refused)} are refused by declaration")
    if failed:
        raise typer.Exit(1)


@app.command()
def bench(
    out: Annotated[Path, typer.Option(help="Folder for the chart and the figures.")] = Path("runs/bench"),
    quick: Annotated[bool, typer.Option("--quick", help="A little of everything, on small shapes.")] = False,
) -> None:
    """Time pyattn side by side with torch's own attention on this CPU. Exit code 1 if a result is wrong.

    A case is checked for correctness before it is timed, or it is not timed.
    """
    from pyattn.benchmarks import cpu

    rows = cpu.run(out, quick=quick, console=_console(markup=True))
    if any(row.status == "failed" for row in rows):
        raise typer.Exit(1)


@train.command("gpt")
def train_gpt(
    ctx: typer.Context,
    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 file, or folder of such files.", show_default="Python's standard library"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, metrics, curve and sample.")] = Path("runs/gpt"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew where a checkpoint is.")] = False,
    attention: Annotated[str, typer.Option(help="pyattn or torch (its own fused attention).")] = "pyattn",
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cuda if there is one")] = None,
    sample_tokens: Annotated[int, typer.Option(min=0, help="Length of the text written at the end.")] = 200,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    batch: Annotated[int, typer.Option(help="Windows per step.")] = 2,
    lr: Annotated[float, typer.Option(help="Peak of the learning rate.")] = 1.5e-3,
    dropout: Annotated[float, typer.Option(help="Probability, in [0, 1).")] = 0.0,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 for matrix products and attention.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of weights, batches, dropout and sample.")] = 0,
    layers: Annotated[int, typer.Option(help="Transformer blocks.")] = 6,
    heads: Annotated[int, typer.Option(help="Attention heads per block.")] = 2,
    width: Annotated[int, typer.Option(help="Size of a token's vector.")] = 128,
    context: Annotated[int, typer.Option(help="Tokens that the model looks back.")] = 1024,
    vocab: Annotated[int, typer.Option(help="Size of the byte-level BPE vocabulary.")] = 2048,
) -> None:
    """Train a GPT-2 on a text, then let it write.

    [bold]A whole example[/bold]

    pyattn train gpt --text my-book.txt --out runs/book --steps 2000\n
    pyattn train gpt --out runs/book --resume          [dim]# after Ctrl-C, or with more --steps[/dim]

    With --resume every setting comes from the checkpoint; --steps may be raised.
    """
    from pyattn.training.run import Settings, open_run

    names = Settings.__dataclass_fields__
    values = {name: value for name, value in ctx.params.items() if name in names}
    values["text"] = None if text is None else str(text.resolve())
    given = {name for name in values if ctx.get_parameter_source(name).name == "COMMANDLINE"}  # type: ignore[union-attr]
    run = open_run(out, values, given, _device(device), resume=resume, overwrite=overwrite)
    _show_run(run)
    with _interruptible() as interrupted:
        for step in _watched(run):
            if interrupted():
                run.save()
                console.print(
                    f"stopped after step {step.step} of {run.settings.steps}; go on with: "
                    f"pyattn train gpt --out {out} --resume",
                    soft_wrap=True,
                )
                raise typer.Exit(130)
    console.print(f"checkpoint {run.checkpoint_path}, loss curve {out / 'loss.png'}", soft_wrap=True)
    if sample_tokens:
        console.rule("sample")
        console.print(run.sample(sample_tokens), soft_wrap=True)


@app.command()
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


def _verification_table(verdicts: list[Verdict]) -> Table:
    """backend x feature x dtype: the largest error over the cases, and how many times plain PyTorch's it is."""
    from pyattn import verification

    dtypes = list(dict.fromkeys(verdict.dtype for verdict in verdicts))
    caption = "largest error against float64, forward and backward (in brackets: as a multiple of plain PyTorch's)"
    table = Table("backend", "feature", *map(dtype_name, dtypes), caption=caption)
    for (backend, feature), cells in verification.by_feature(verdicts).items():
        row = [_verification_cell(cells.get(dtype, [])) for dtype in dtypes]
        table.add_row(backend, FEATURES.get(feature, feature), *row)
    return table


def _verification_cell(verdicts: list[Verdict]) -> Text:
    from pyattn import verification

    worst = verification.worst(verdicts)
    numbers = "" if worst is None else f"{worst.error:.1e} ({worst.ratio:.2f})"
    if any(verdict.failures for verdict in verdicts):
        return Text(f"{numbers} FAILED".strip(), "red")
    return Text(numbers) if numbers else Text("refused", "dim")


def _device(asked: str | None) -> str:
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked not in ("cpu", "cuda"):
        raise RangeError(f"device: expected cpu or cuda, got {asked}")
    if asked == "cuda" and not torch.cuda.is_available():
        raise RangeError("device: expected cpu, got cuda, but torch sees no GPU here")
    return asked


def _show_run(run: Run) -> None:
    s = run.settings
    parameters = sum(p.numel() for p in run.model.parameters())
    tokens = len(run.corpus.train) + len(run.corpus.validation)
    console.print(
        f"GPT with {parameters:,} parameters and {s.attention} attention on {run.device}; "
        f"{tokens:,} tokens of {s.text or 'the Python standard library'}; "
        f"{s.steps} steps of {s.batch} x {s.context} tokens"
        + (f", going on after step {run.step}" if run.step else ""),
        soft_wrap=True,
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
                progress.console.print(
                    f"step {step.step:5}/{run.settings.steps}  validation {step.val_loss:.3f}  {state}"
                )
            yield step


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C was pressed: the first one lets the running step end, a second one stops at once."""
    before = signal.getsignal(signal.SIGINT)
    pressed = False

    def stop(*_: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def main() -> None:
    """Entry point of the installed command."""
    app()
