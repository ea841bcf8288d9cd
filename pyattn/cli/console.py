"""What every command shares: where it prints, and how it says no."""

from __future__ import annotations

import sys
from typing import Any

import torch
import typer
from rich.console import Console
from typer.core import TyperGroup

from pyattn.check import PyattnError, RangeError


def make_console(markup: bool) -> Console:
    # Without a terminal there is no width to ask for; a table in a log file then has room for its columns.
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=markup)


console = make_console(markup=False)  # paths and samples may hold brackets


class Commands(TyperGroup):
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


def chosen_device(asked: str | None) -> str:
    """cpu or cuda, as the user asked or as the machine has it."""
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked not in ("cpu", "cuda"):
        raise RangeError(f"device: expected cpu or cuda, got {asked}")
    if asked == "cuda" and not torch.cuda.is_available():
        raise RangeError("device: expected cpu, got cuda, but torch sees no GPU here")
    return asked
