"""The `pyattn` command. Commands only: each parses, calls the package, and prints."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import Annotated

import torch

try:
    import rich  # noqa: F401 (the commands use it)
    import typer
except ModuleNotFoundError as missing:
    raise SystemExit(f"pyattn: the command needs {missing.name}: pip install 'pyattn[tools]'") from None

import pyattn
from pyattn import machine
from pyattn.cli import checks, pictures, text, train
from pyattn.cli.console import Commands

app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"pyattn {pyattn.__version__}, torch {torch.__version__}, Triton {machine.triton_version()}")
        raise typer.Exit


@app.callback()
def _help(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fused attention for PyTorch: what runs here, whether it is right, how fast it is, and models trained with it.

    [bold]A whole example[/bold]

    pyattn info\n
    pyattn verify\n
    pyattn bench --out runs/bench\n
    pyattn train gpt --text my-book.txt --out runs/pyattn\n
    pyattn train gpt --text my-book.txt --out runs/torch --attention torch\n
    pyattn compare runs/pyattn runs/torch --out runs/compare.png\n
    pyattn generate --model runs/pyattn/model --prompt "Once upon a time"
    """


app.command()(checks.info)
app.command()(checks.verify)
app.command()(checks.bench)
app.add_typer(train.app, name="train")
app.command()(train.compare)
app.command()(text.translate)
app.command()(text.generate)
app.command()(text.fill_mask)
app.command()(text.tag)
app.command()(pictures.caption)


def main() -> None:
    """Entry point of the installed command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a text, or a file's name, may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    app()
