"""A sliding window, and a window of each query's own: keys that no query sees must cost nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.table import Table

from .cases import Case
from .chart import Panel
from .peers import Pyattn
from .report import Notes, table
from .subject import Groups, Subject, over, p50, shown
from .suite import Effort, Row

# Of full attention's time, at most.
AIM = 1 / 8
ROW_AIM = 1 / 20


def _groups(m: int, window: int, row_window: int | None = None) -> Groups:
    """Full attention, a causal window of so many keys, and one at a place of each query's own, side by side."""
    shape = (1, 4, m, m, 64, torch.float32)
    cases = [Case(*shape, False), Case(*shape, True, left=window - 1)]
    if row_window is not None:
        cases.append(Case(*shape, False, row_window=row_window))
    return (tuple(cases),)


def _table(rows: Sequence[Row], notes: Notes) -> Table:
    full = {row.direction: row for row in rows if not row.case.features}
    lines = []
    for row in rows:
        ratio = over(p50(row), p50(full[row.direction]))
        aim = 1 if not row.case.features else AIM if row.case.row_window is None else ROW_AIM
        colour = "red" if ratio is not None and not ratio <= aim else "bold"
        lines.append([row.case.label, row.direction, notes.ms(row), f"[{colour}]{shown(ratio, '.4f')}[/{colour}]"])
    return table("window: float32", ("case", "direction", "ms", "/ full"), lines)


def _panels(rows: Sequence[Row]) -> list[Panel]:
    panels = []
    for direction in dict.fromkeys(row.direction for row in rows):
        found = [row for row in rows if row.direction == direction]
        labels = [" ".join(row.case.features) or "full" for row in found]
        title = f"Window: {direction}, {rows[0].case.label}, float32"
        panels.append(Panel(title, "ms", labels, {"pyattn": [p50(row) for row in found]}, digits=1))
    return panels


SUBJECT = Subject(
    name="window",
    groups=_groups(8192, 256, 20),
    quick_groups=_groups(1024, 64),
    peers=(Pyattn(),),
    baselines=(),
    effort=Effort(),
    seconds=25.0,
    table=_table,
    panels=_panels,
    legend=(
        f"/ full: over the time of full attention; the aim is at most {AIM} with a causal window, and {ROW_AIM} where "
        "every query has a window of its own."
    ),
)
