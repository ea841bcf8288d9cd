"""Masks, biases, windows and documents: what FlexAttention is for, and what SDPA takes as a matrix or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.table import Table

from .cases import Case
from .chart import Panel, speeds
from .peers import Flex, Pyattn, Sdpa
from .report import Notes
from .subject import Groups, Subject, comparison
from .suite import Effort, Row

AIM = 1.3  # times as fast as FlexAttention, at least
# Of every row: ragged, as documents are.
_DOCUMENTS = (1000, 300, 700, 523, 129, 911, 341, 192)


def _groups() -> Groups:
    """Each feature by itself; the wider head first, as time may run out."""
    changes: tuple[dict[str, Any], ...] = (
        {"causal": True, "left": 511},
        {"causal": True, "documents": _DOCUMENTS},
        {"bias": "1hmn"},
        {"mask": True},
        {"bias": "bh1n"},
    )
    m = sum(_DOCUMENTS)
    return tuple(
        (replace(Case(4, 16, m, m, d, torch.bfloat16, False), **change),) for d in (128, 64) for change in changes
    )


def _table(rows: Sequence[Row], notes: Notes) -> Table:
    return comparison("features: bfloat16", rows, notes)


def _panels(rows: Sequence[Row]) -> list[Panel]:
    """One per head size and direction."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(f"Features, d = {row.case.d}, {row.direction}", []).append(row)
    return [
        speeds(title, of_kind, lambda case: case.features[-1].replace(" ", "\n")) for title, of_kind in kinds.items()
    ]


SUBJECT = Subject(
    name="features",
    groups=_groups(),
    peers=(Pyattn(), Flex(), Sdpa("SDPA")),
    baselines=("FlexAttention", "SDPA"),
    effort=Effort(clock_seconds=0.5),
    seconds=190.0,
    table=_table,
    panels=_panels,
    legend=f"ratio to a peer: its time over pyattn's; the aim is {AIM} to FlexAttention. MB: peak memory beyond the "
    "inputs, results included. Windows and documents are causal; SDPA gets them as a boolean matrix. Each bias takes a "
    "gradient; its dimensions are named, those that are shared 1. The mask is random, half of it True.",
)
