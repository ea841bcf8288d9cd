"""Decoding: one query over a long cache of keys and values, which is as fast as memory is read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.table import Table

from .cases import Case
from .chart import Panel
from .peers import Copy, Pyattn, Sdpa
from .report import Notes, by_call, table
from .subject import Groups, Subject, over, shown
from .suite import Effort, Row


def _groups(b: int, n: int) -> Groups:
    """12 query heads over 2 key/value heads."""
    return tuple((Case(b, 12, 1, n, 64, dtype, False, group=6),) for dtype in (torch.float32, torch.bfloat16))


def gigabytes_per_second(row: Row) -> float | None:
    """Bytes of k and v over the median time; a copy reads as many and writes them too."""
    if row.timing is None:
        return None
    case = row.case
    bytes_read = case.b * case.hk * case.n * (case.d + case.dv) * case.dtype.itemsize
    return bytes_read * (2 if row.peer == "copy" else 1) / row.timing.p50_ms / 1e6


def _table(rows: Sequence[Row], notes: Notes) -> Table:
    lines = []
    for calls in by_call(rows):
        rates = [gigabytes_per_second(row) for row in calls]
        for row, rate in zip(calls, rates, strict=True):
            fraction = shown(over(rate, rates[-1]), ".0%")
            lines.append(
                [f"{row.case.label} {row.case.dtype_name}", row.peer, notes.ms(row), shown(rate, ".1f"), fraction]
            )
    return table("decode: forward, one query", ("case", "peer", "ms", "GB/s", "of copy"), lines)


def _panels(rows: Sequence[Row]) -> list[Panel]:
    calls = by_call(rows)
    series = {row.peer: [gigabytes_per_second(group[place]) for group in calls] for place, row in enumerate(calls[0])}
    case = calls[0][0].case
    title = f"Decode: k and v read, 1 query,\nb{case.b}, {case.h} heads over {case.hk}, {case.n} keys"
    return [Panel(title, "GB/s", [group[0].case.dtype_name for group in calls], series, digits=1)]


SUBJECT = Subject(
    name="decode",
    groups=_groups(8, 4096),
    quick_groups=_groups(2, 1024),
    peers=(Pyattn(), Sdpa("SDPA"), Copy()),
    baseline="SDPA",
    effort=Effort(("forward",)),
    seconds=6.0,
    table=_table,
    panels=_panels,
    legend="GB/s of attention: bytes of k and v, read once, over the median time. copy: dst.copy_(src) of as many "
    "bytes; its GB/s count them twice, read and written. of copy: GB/s over the copy's GB/s.",
)
