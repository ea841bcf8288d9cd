"""What every command shares: where it prints, and how it says no."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

import torch
import typer
from rich.console import Console
from typer.core import TyperGroup

from pyattn.check import PyattnError, RangeError


def make_console(markup: bool) -> Console:
    # Without a terminal there is no width to ask for; a table in a log file then has room for its columns.
    on_terminal = sys.stdout is not None and sys.stdout.isatty()  # None where it was closed before Python began
    return Console(width=None if on_terminal else 120, highlight=False, markup=markup)


console = make_console(markup=False)  # paths and samples may hold brackets


def say(text: str, *, to: Console = console) -> None:
    """Prints a line of a long run, which goes on where nothing can be printed: on a full disk, into a closed pipe."""
    try:
        to.print(text, soft_wrap=True)
    except OSError:
        _silence()


def types_in() -> bool:
    """Whether a person at a terminal is to type what a command reads."""
    return sys.stdin is not None and sys.stdin.isatty()  # None where it was closed before Python began


def _silence() -> None:
    """Sends what is still to be printed nowhere, also what Python holds back until it ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
                _silence()
            message = f"{error.filename or 'cannot write the output'}: {error.strerror}"
        except RuntimeError as error:
            if "can't allocate memory" not in str(error) and not isinstance(error, torch.OutOfMemoryError):
                raise
            message = f"out of memory: {str(error).splitlines()[0]}"
        with suppress(OSError):
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
