"""Short runs, for tests of training whose state goes from step to step."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from pyattn.cli import app
from pyattn.training.run import Run, open_run
from pyattn.training.settings import Settings


def open_on_text(folder: Path, recipe: type[Settings], settings: dict[str, Any], resume: bool, **given: Any) -> Run:
    """On a text of 160 characters. given: settings that the user names."""
    folder.parent.mkdir(exist_ok=True)
    text = folder.parent / "text"
    text.write_text(Path(argparse.__file__).read_text("utf-8")[:160])
    settings = settings | {"text": str(text)} | given
    return open_run(folder, recipe, settings, set(given), "cpu", resume=resume, overwrite=False)


def results(run: Run, last: int = 1000) -> list[tuple[float | None, ...]]:
    """Of every step up to `last`, after which the run is saved as by Ctrl-C."""
    found = []
    for step in run.steps():
        found.append((step.loss, step.grad_norm, step.val_loss))
        if step.step == last:
            run.save()
            break
    return found


def command(*arguments: object) -> str:
    """What pyattn shows for a command that ends well."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output
