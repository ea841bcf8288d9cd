"""A sliding window: keys that no query sees must cost nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.table import Table

from .cases import Case
from .chart import Panel
from .peers import Pyattn
from .report import Notes, by_call, table
from .subject import Groups, Subject, over, p50, shown
from .suite import Effort, Row

AIM = 1 / 8  # of full attention's time, at most


def _groups(m: int, window: int) -> Groups:
    """Full attention and a causal window of so many keys, side by side."""
    full = Case(1, 4, m, m, 64, torch.float32, False)
    return ((full, Case(1, 4, m, m, 64, torch.float32, True, left=window - 1)),)


def _table(rows: Sequence[Row], notes: Notes) -> Table:
    (full,), (window,) = by_call(rows)
    ratio = over(p50(window), p50(full))
    colour = "red" if ratio is not None and ratio >= AIM else "bold"
    line = [full.case.label, notes.ms(full), notes.ms(window), f"[{colour}]{shown(ratio, '.4f')}[/{colour}]"]
    columns = ("case", "full ms", f"{window.case.features[1]} ms", "window / full")
    return table("window: forward, float32", columns, [line])


def _panels(rows: Sequence[Row]) -> list[Panel]:
    labels = [" ".join(row.case.features) or "full" for row in rows]
    title = f"Window: forward, {rows[0].case.label}, float32"
    return [Panel(title, "ms", labels, {"pyattn": [p50(row) for row in rows]}, digits=1)]


SUBJECT = Subject(
    name="window",
    groups=_groups(8192, 256),
    quick_groups=_groups(1024, 64),
    peers=(Pyattn(),),
    baselines=(),
    effort=Effort(("forward",)),
    seconds=8.0,
    table=_table,
    panels=_panels,
    legend=f"window / full: the time with a causal window over that of full attention; the aim is under {AIM}.",
)
