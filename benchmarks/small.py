"""A small call: what attention costs before it computes anything to speak of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.table import Table

from .cases import Case
from .chart import Panel
from .peers import Pyattn, Sdpa
from .report import Notes, by_call, table
from .subject import Subject, p50, shown
from .suite import Effort, Row


def _table(rows: Sequence[Row], notes: Notes) -> Table:
    lines = []
    for ours, torchs in by_call(rows):
        cells = [notes.cell(row, None if p50(row) is None else shown(_microseconds(row))) for row in (ours, torchs)]
        a, b = _microseconds(ours), _microseconds(torchs)
        lines.append([ours.case.label, *cells, "" if a is None or b is None else f"{a - b:+.2f}"])
    return table("small call: forward, no gradient, float32", ("case", "pyattn us", "SDPA us", "difference us"), lines)


def _panels(rows: Sequence[Row]) -> list[Panel]:
    calls = by_call(rows)
    series = {row.peer: [_microseconds(group[place]) for group in calls] for place, row in enumerate(calls[0])}
    return [Panel("Small call: forward, float32", "us", [group[0].case.label for group in calls], series, digits=1)]


def _microseconds(row: Row) -> float | None:
    milliseconds = p50(row)
    return None if milliseconds is None else milliseconds * 1e3


_CASE = Case(1, 4, 16, 16, 32, torch.float32, False)
SUBJECT = Subject(
    name="small call",
    groups=((_CASE,),),
    quick_groups=((_CASE,),),
    peers=(Pyattn(), Sdpa("SDPA")),
    baselines=("SDPA",),
    effort=Effort(("forward",), repeats=500),
    seconds=3.0,
    table=_table,
    panels=_panels,
    legend="us: median over samples of 500 calls in a row each.",
)
