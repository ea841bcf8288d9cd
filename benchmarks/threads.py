"""Threads: what all of torch's threads gain over one."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from rich.table import Table

from .cases import Case
from .chart import Panel
from .peers import Pyattn
from .report import Notes, by_call, speedup, table
from .subject import Groups, Subject, shown
from .suite import Effort, Row


def _groups(m: int, lengths: Sequence[int]) -> Groups:
    """One long causal sequence, and a ragged packed batch."""
    total = sum(lengths)
    return (
        (Case(1, 12, m, m, 64, torch.float32, True),),
        (Case(1, 12, total, total, 64, torch.float32, True, lengths=tuple(lengths)),),
    )


def _ragged(count: int, longest: int) -> list[int]:
    random = Random(0)
    return [random.randint(32, longest) for _ in range(count)]


def _table(rows: Sequence[Row], notes: Notes) -> Table:
    lines = []
    for every, one in by_call(rows):
        gain = shown(speedup(every, one))
        lines.append([every.case.label, every.direction, notes.ms(one), notes.ms(every), gain])
    columns = ("case", "direction", "1 thread ms", f"{torch.get_num_threads()} threads ms", "speed-up")
    return table("threads: float32", columns, lines)


def _panels(rows: Sequence[Row]) -> list[Panel]:
    calls = by_call(rows)
    labels = [f"{_name(every.case)}\n{every.direction}" for every, _ in calls]
    gains = [speedup(every, one) for every, one in calls]
    threads = torch.get_num_threads()
    title = f"Threads: speed-up of {threads} over 1, float32"
    return [Panel(title, "times as fast", labels, {"pyattn": gains}, ("as many threads", threads), digits=2)]


def _name(case: Case) -> str:
    return f"causal {case.m}" if case.lengths is None else f"{len(case.lengths)} packed sequences"


SUBJECT = Subject(
    name="threads",
    groups=_groups(2048, _ragged(24, 1024)),
    quick_groups=_groups(512, _ragged(6, 256)),
    peers=(Pyattn(), Pyattn("pyattn, 1 thread", threads=1)),
    baselines=("pyattn, 1 thread",),
    effort=Effort(min_rounds=3),
    seconds=10.0,
    table=_table,
    panels=_panels,
    legend="speed-up: the time on one thread over that on all. Packed sequences have random lengths of 32 to 1024.",
)
