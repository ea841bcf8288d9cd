"""What PyTorch cannot fuse on the CPU: calls for which its attention falls back to whole score matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.table import Table

from .cases import Case
from .chart import Panel
from .peers import Pyattn, Sdpa
from .report import Notes, by_call
from .subject import Groups, Subject, comparison, megabytes, p50
from .suite import Effort, Row


def _groups(*lengths: int) -> Groups:
    """Each feature that makes torch leave its fused path, at each length."""
    plain = [Case(1, 8, length, length, 64, torch.float32, False) for length in lengths]
    changes: tuple[dict[str, Any], ...] = ({"dropout_p": 0.1}, {"value_dim": 96}, {"bias": "bh1n"})
    return tuple((replace(case, **change),) for change in changes for case in plain)


def _table(rows: Sequence[Row], notes: Notes) -> Table:
    return comparison("what PyTorch cannot fuse: float32", rows, notes)


def _panels(rows: Sequence[Row]) -> list[Panel]:
    calls = by_call(rows)
    labels = [f"{ours.case.features[0]}\n{ours.case.m}" for ours, _ in calls]
    names = [row.peer for row in calls[0]]
    pairs = list(zip(names, zip(*calls, strict=True), strict=True))
    note = "forward + backward, float32"
    return [
        Panel(f"What PyTorch cannot fuse: time,\n{note}", "ms", labels, {n: [p50(r) for r in c] for n, c in pairs}),
        Panel(f"What PyTorch cannot fuse: peak memory,\n{note}", "MB", labels,
              {n: [megabytes(r) for r in c] for n, c in pairs}),
    ]  # fmt: skip


SUBJECT = Subject(
    name="fallback",
    groups=_groups(2048, 4096),
    quick_groups=_groups(256),
    peers=(Pyattn(), Sdpa("SDPA")),
    baselines=("SDPA",),
    # torch takes seconds for one of these, of which two are enough to tell ratios of 2 and more.
    effort=Effort(("forward + backward",), min_rounds=2),
    seconds=70.0,
    table=_table,
    panels=_panels,
    legend="ratio to SDPA: its time over pyattn's. MB: peak memory beyond the inputs, output and gradients included. "
    "The bias is [b, h, 1, n], so that neither it nor its gradient is an m x n matrix. torch draws a dropout mask of "
    "its own, so SDPA's result with dropout is only looked over for NaN and infinity. At least two rounds.",
)
