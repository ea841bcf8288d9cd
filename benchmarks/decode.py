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


def _cpu_groups(b: int, n: int) -> Groups:
    """12 query heads over 2 key/value heads."""
    return tuple((Case(b, 12, 1, n, 64, dtype, False, group=6),) for dtype in (torch.float32, torch.bfloat16))


def _gpu_groups() -> Groups:
    """32 query heads over 8; the longest cache of the batch is 4 GB."""
    return tuple(
        (Case(b, 32, 1, n, 128, torch.bfloat16, False, group=4),)
        for b in (1, 16)
        for n in (4096, 8192, 16384, 32768, 65536)
    )


def gigabytes_per_second(row: Row) -> float | None:
    """Bytes of k and v over the median time; a copy reads as many and writes them too."""
    if row.timing is None:
        return None
    case = row.case
    bytes_read = case.b * case.hk * case.n * (case.d + case.dv) * case.dtype.itemsize
    return bytes_read * (2 if row.peer == "copy" else 1) / row.timing.p50_ms / 1e6


def of_copy(calls: Sequence[Row], place: int = 0) -> float | None:
    """The rate of one of a call's peers over that of the copy, which is the last."""
    return over(gigabytes_per_second(calls[place]), gigabytes_per_second(calls[-1]))


def _table(rows: Sequence[Row], notes: Notes) -> Table:
    lines = [
        [f"{row.case.label} {row.case.dtype_name}", row.peer, notes.ms(row),
         shown(gigabytes_per_second(row), ".1f"), shown(of_copy(calls, place), ".0%")]
        for calls in by_call(rows)
        for place, row in enumerate(calls)
    ]  # fmt: skip
    return table("decode: forward, one query", ("case", "peer", "ms", "GB/s", "of copy"), lines)


def _panels(rows: Sequence[Row]) -> list[Panel]:
    """One per batch size."""
    calls, sizes = by_call(rows), dict.fromkeys(row.case.b for row in rows)
    return [_panel([group for group in calls if group[0].case.b == b]) for b in sizes]


def _panel(calls: Sequence[Sequence[Row]]) -> Panel:
    rates = {row.peer: [gigabytes_per_second(group[place]) for group in calls] for place, row in enumerate(calls[0])}
    case = calls[0][0].case
    labels = [f"{group[0].case.n}\n{group[0].case.dtype_name}" for group in calls]
    title = f"Decode: k and v read, 1 query,\nb{case.b}, {case.h} heads over {case.hk}, d {case.d}, so many keys"
    few = max(rate or 0.0 for of_peer in rates.values() for rate in of_peer) < 100
    return Panel(title, "GB/s", labels, rates, digits=1 if few else 0)


def _subject(groups: Groups, effort: Effort, seconds: float, quick_groups: Groups = ()) -> Subject:
    return Subject(
        name="decode",
        groups=groups,
        quick_groups=quick_groups,
        peers=(Pyattn(), Sdpa("SDPA"), Copy()),
        baselines=("SDPA",),
        effort=effort,
        seconds=seconds,
        table=_table,
        panels=_panels,
        legend="GB/s of attention: bytes of k and v, read once, over the median time. copy: dst.copy_(src) of as many "
        "bytes; its GB/s count them twice, read and written. of copy: GB/s over the copy's GB/s.",
    )


CPU_SUBJECT = _subject(_cpu_groups(8, 4096), Effort(("forward",)), 6.0, _cpu_groups(2, 1024))
GPU_SUBJECT = _subject(_gpu_groups(), Effort(("forward",), clock_seconds=0.3), 20.0)
