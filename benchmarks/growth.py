"""Growth of memory: twice the length may take twice the peak of forward and backward, not four times."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from rich.table import Table
from torch.nn.attention import SDPBackend

from .cases import Case
from .chart import Panel
from .peers import Pyattn, Sdpa
from .report import Notes, by_call, table
from .subject import Subject, megabytes, over, shown
from .suite import Effort, Row


def growths(rows: Sequence[Row], place: int = 0) -> list[float | None]:
    """How many times the memory of the length before each length takes, from the second on; of one peer."""
    peaks = [megabytes(group[place]) for group in by_call(rows)]
    return [over(after, before) for before, after in pairwise(peaks)]


def _table(rows: Sequence[Row], notes: Notes) -> Table:
    calls = by_call(rows)
    columns, lines = ["case"], [[group[0].case.label] for group in calls]
    for place, peer in enumerate(row.peer for row in calls[0]):
        columns += [f"{peer} MB", "growth"]
        for line, group, growth in zip(lines, calls, [None, *growths(rows, place)], strict=True):
            line += [notes.cell(group[place], shown(megabytes(group[place]), ".1f") or None), shown(growth, ".3f")]
    return table("growth of memory: forward + backward", columns, lines)


def _panels(rows: Sequence[Row]) -> list[Panel]:
    calls = by_call(rows)
    labels = [f"{group[0].case.m}" for group in calls]
    series = {row.peer: [megabytes(group[place]) for group in calls] for place, row in enumerate(calls[0])}
    return [Panel(f"Peak memory, forward + backward:\n{calls[0][0].case.label} and longer", "MB", labels, series)]


SUBJECT = Subject(
    name="growth",
    groups=tuple((Case(1, 16, m, m, 128, torch.bfloat16, True),) for m in (4096, 8192, 16384, 32768)),
    peers=(Pyattn(), Sdpa("SDPA flash", SDPBackend.FLASH_ATTENTION)),
    baselines=("SDPA flash",),
    effort=Effort(("forward + backward",), clock_seconds=0.2, min_rounds=3),
    seconds=15.0,
    table=_table,
    panels=_panels,
    legend="MB: peak beyond the inputs, output and gradients included. growth: over that of half the length.",
)
