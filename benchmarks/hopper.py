"""The Hopper kernels, by name, against cuDNN's and against the Triton kernels that take the call without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from rich.table import Table
from torch.nn.attention import SDPBackend

from .cases import Case, Direction
from .chart import Panel, speeds
from .peers import Pyattn, Sdpa
from .report import Notes
from .subject import Groups, Subject, comparison
from .suite import Effort, Row


class Aim(NamedTuple):
    """How many times as fast as cuDNN's the kernels are to be, at least, in some of the cases."""

    name: str
    asked: float
    direction: Direction
    holds: Callable[[Case], bool]


AIMS = (
    Aim("d 128, 4k and longer", 0.95, "forward", lambda case: case.d == 128 and case.m >= 4096),
    Aim("d 64, 2k and longer", 1.0, "forward", lambda case: case.d == 64 and case.m >= 2048),
    Aim("d 64, 512 to 1k", 0.95, "forward", lambda case: case.d == 64 and case.m <= 1024),
    Aim("d 128, 4k and longer", 0.9, "backward", lambda case: case.d == 128 and case.m >= 4096),
    Aim("d 64", 0.9, "backward", lambda case: case.d == 64),
)


def _groups() -> Groups:
    """16k tokens of width 2048, as in the table of speeds."""
    return tuple(
        (Case(16384 // m, 2048 // d, m, m, d, torch.bfloat16, causal),)
        for m, sizes in ((8192, (128, 64)), (1024, (64,)), (4096, (128, 64)), (512, (64,)), (2048, (64,)))
        for d in sizes
        for causal in (True, False)
    )


def _table(rows: Sequence[Row], notes: Notes) -> Table:
    return comparison("Hopper kernels: bfloat16", rows, notes)


def _panels(rows: Sequence[Row]) -> list[Panel]:
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(f"Hopper kernels, d = {row.case.d}, {row.direction}", []).append(row)
    return [
        speeds(title, of_kind, lambda case: f"{case.m}\n{'causal' if case.causal else 'full'}")
        for title, of_kind in kinds.items()
    ]


SUBJECT = Subject(
    name="hopper",
    groups=_groups(),
    peers=(
        Pyattn("pyattn hopper", backend="hopper"), Sdpa("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION),
        Pyattn("pyattn triton", backend="triton"),
    ),
    baselines=("SDPA cuDNN", "pyattn triton"),
    effort=Effort(clock_seconds=0.5),
    seconds=60.0,
    table=_table,
    panels=_panels,
    legend="ratio to a peer: its time over that of pyattn's Hopper kernels, whose backward always has the same bits.",
)  # fmt: skip
