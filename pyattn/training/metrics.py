"""The numbers of a run: one JSON object per line, written as they come."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from pyattn.check import PyattnError
from pyattn.files import append_line, is_kind, json_object, replacing

FILE = "metrics.jsonl"
# What numbers can be: pictures of larger ones, and speeds without tokens, are none.
_MOST = 1e30
_LEAST = {"step": 1, "tokens": 1, "seconds": 0}


class RunError(PyattnError, ValueError):
    """A run's folder lacks what was asked of it."""


def start(folder: Path, step: int) -> bool:
    """Makes the file of a run that goes on after `step`: what an interrupted run wrote beyond it is dropped.

    A file that is no longer there is one that somebody removed, and begins anew. Returns whether it has lines.

    Raises:
        RunError: the file is damaged, or lacks a step.
    """
    kept = [line for line in _lines(folder) if line["step"] <= step] if step and (folder / FILE).exists() else []
    steps = [line["step"] for line in kept]
    if steps and steps != list(range(steps[0], step + 1)):
        raise RunError(f"run: {folder / FILE} is damaged (expected every step to {step} once, in a row)")
    with replacing(folder / FILE) as path:
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    return bool(kept)


def append(folder: Path, **values: float) -> None:
    """Adds one line; `values` has a `step`."""
    append_line(folder / FILE, json.dumps(values))


def read(folder: Path) -> list[dict[str, Any]]:
    """All lines of a run.

    Raises:
        RunError: the folder is not one of a run, or nothing was trained in it.
    """
    if not (folder / FILE).is_file():
        raise RunError(f"run: expected a folder written by `pyattn train`, {folder} has no {FILE}")
    lines = _lines(folder)
    if not any("loss" in line for line in lines):
        raise RunError(f"run: {folder / FILE} has no training step")
    return lines


def curve(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one quantity, where it was measured."""
    found = [line for line in lines if name in line]
    return [line["step"] for line in found], [line[name] for line in found]


def tokens_per_second(lines: list[dict[str, Any]]) -> float:
    """Median over the training steps; evaluation, checkpoints and sampling do not count. NaN where none was timed."""
    timed = [line["tokens"] / line["seconds"] for line in lines if line.get("seconds", 0) > 0 and "tokens" in line]
    return statistics.median(timed) if timed else math.nan


def _lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / FILE
    try:
        # What follows the last newline is a line that a killed run did not finish.
        texts = path.read_text("utf-8").split("\n")[:-1]
        lines = [json_object(text) for text in texts]
    except ValueError as error:  # UnicodeDecodeError, too
        raise RunError(f"run: {path} is damaged ({error})") from error
    for number, line in enumerate(lines, 1):
        if not is_kind(line.get("step"), int):
            raise RunError(f"run: {path} is damaged (line {number:,} has no step)")
        for name, value in line.items():
            if not is_kind(value, float) or not _LEAST.get(name, -_MOST) <= value <= _MOST:
                raise RunError(f"run: {path} is damaged (line {number:,}: {name} cannot be {str(value)[:60]})")
    return lines
