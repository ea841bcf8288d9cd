"""Rows as JSON lines and as tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from math import exp, log
from pathlib import Path
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .suite import Row

T = TypeVar("T")


def record(row: Row, about: dict[str, object], baseline: Row | None) -> dict[str, object]:
    """One line of results. `speedup` is the baseline's median time over this peer's."""
    case, timing = row.case, row.timing
    return {
        "case": case.id, "b": case.b, "h": case.h, "m": case.m, "n": case.n, "d": case.d,
        "dtype": case.dtype_name, "causal": case.causal, "direction": row.direction,
        "peer": row.peer, "status": row.status, "reason": row.reason,
        "p20_ms": timing and timing.p20_ms, "p50_ms": timing and timing.p50_ms, "p80_ms": timing and timing.p80_ms,
        "rounds": timing and timing.rounds, "gflops": row.gflops, "peak_bytes": row.peak_bytes,
        "speedup": baseline and speedup(row, baseline), **about,
    }  # fmt: skip


def write_lines(path: Path, rows: Sequence[Row], about: dict[str, object], baseline: str) -> None:
    """Overwrites `path` with one JSON object per row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    against = {(row.case, row.direction): row for row in rows if row.peer == baseline}
    lines = (json.dumps(record(row, about, against.get((row.case, row.direction)))) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines))


def speedup(row: Row, baseline: Row) -> float | None:
    if row.timing is None or baseline.timing is None:
        return None
    return baseline.timing.p50_ms / row.timing.p50_ms


def unit(rows: Iterable[Row]) -> tuple[str, float]:
    """The unit of speed that suits the rows, and what a GFLOP/s figure is divided by."""
    fastest = max((row.gflops or 0.0 for row in rows), default=0.0)
    return ("TFLOP/s", 1e3) if fastest > 1e4 else ("GFLOP/s", 1.0)


def print_tables(rows: Sequence[Row], baseline: str, console: Console) -> None:
    """A table per dtype and direction: a line per case, three figures per peer; below, why a peer did not run."""
    notes: dict[str, int] = {}
    for dtype, direction in _in_order((row.case.dtype_name, row.direction) for row in rows):
        chosen = [row for row in rows if (row.case.dtype_name, row.direction) == (dtype, direction)]
        console.print(_table(f"{direction}, {dtype}", chosen, baseline, notes))
    for reason, number in notes.items():
        console.print(f"[dim]({number}) {escape(reason)}[/dim]", highlight=False)
    legend = (
        "ms: median time. GFLOP/s, TFLOP/s: operations of the matrix products alone. MB: peak memory beyond the "
        f"inputs, results included. ratio: {baseline}'s time over pyattn's."
    )
    console.print(f"[dim]{legend}[/dim]", highlight=False)


def print_summary(rows: Sequence[Row], baseline: str, console: Console) -> None:
    """The geometric mean of the first peer's speed-up per dtype and direction."""
    for dtype, direction in _in_order((row.case.dtype_name, row.direction) for row in rows):
        found = [
            ratio
            for group in by_case(row for row in rows if (row.case.dtype_name, row.direction) == (dtype, direction))
            if (ratio := _ratio(group, baseline)) is not None
        ]
        if found:
            mean = exp(sum(map(log, found)) / len(found))
            spread = f"geometric mean of {len(found)}; {min(found):.2f} to {max(found):.2f}"
            console.print(f"{dtype} {direction}: {mean:.2f} times the speed of {baseline} ({spread})", highlight=False)


def by_case(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of one direction, grouped by case in their order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.case.id, []).append(row)
    return list(groups.values())


def _table(title: str, rows: Sequence[Row], baseline: str, notes: dict[str, int]) -> Table:
    speed, scale = unit(rows)
    table = Table(title=f"{title}: ms, {speed}, MB", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("case", no_wrap=True)
    for peer in _in_order(row.peer for row in rows):
        table.add_column(peer, justify="right")
    table.add_column("ratio", justify="right")
    for group in by_case(rows):
        ratio = _ratio(group, baseline)
        cells = [_cell(row, scale, notes) for row in group]
        table.add_row(group[0].case.label, *cells, "" if ratio is None else f"[bold]{ratio:.2f}[/bold]")
    return table


def _cell(row: Row, scale: float, notes: dict[str, int]) -> str:
    if row.timing is None or row.gflops is None:
        number = notes.setdefault(row.reason, len(notes) + 1)
        return f"[red]FAILED[/red] ({number})" if row.status == "failed" else f"[dim]({number})[/dim]"
    megabytes = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
    return f"{row.timing.p50_ms:.2f} {row.gflops / scale:5.0f} {megabytes:>4}"


def _ratio(group: Sequence[Row], baseline: str) -> float | None:
    """The first peer's speed-up over `baseline` within one case."""
    against = next((row for row in group if row.peer == baseline), None)
    return None if against is None else speedup(group[0], against)


def _in_order(items: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(items))
