"""Rows as JSON lines and as tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from math import exp, log
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .suite import Row

T = TypeVar("T")

Limits = Mapping[str, float]  # GFLOP/s by dtype; empty where the machine's limit is not known
NO_LIMITS: Limits = MappingProxyType({})


class Chapter(NamedTuple):
    """Rows that answer one question. `baselines` names the peers that `speedup` is taken against."""

    name: str
    baselines: Sequence[str]
    rows: Sequence[Row]


def record(
    row: Row, about: dict[str, object], baselines: Sequence[Row], chapter: str, limits: Limits
) -> dict[str, object]:
    """One line of results. `speedup` is each baseline's median time over this peer's."""
    case, timing = row.case, row.timing
    return about | {
        "chapter": chapter, "case": case.id, "b": case.b, "h": case.h, "hk": case.hk, "m": case.m, "n": case.n,
        "d": case.d, "dv": case.dv, "dtype": case.dtype_name, "causal": case.causal, "left": case.left,
        "row_window": case.row_window, "dropout_p": case.dropout_p, "bias": case.bias, "mask": case.mask,
        "lengths": case.lengths, "documents": case.documents,
        "direction": row.direction, "peer": row.peer, "status": row.status, "reason": row.reason,
        "p20_ms": timing and timing.p20_ms, "p50_ms": timing and timing.p50_ms, "p80_ms": timing and timing.p80_ms,
        "rounds": timing and timing.rounds, "gflops": row.gflops, "limit_gflops": limits.get(case.dtype_name),
        "peak_bytes": row.peak_bytes, "speedup": {other.peer: speedup(row, other) for other in baselines},
        "threads": row.threads or about["threads"],
    }  # fmt: skip


def write_lines(path: Path, chapters: Iterable[Chapter], about: dict[str, object], limits: Limits = NO_LIMITS) -> None:
    """Overwrites `path` with one JSON object per row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(record(row, about, [other for other in group if other.peer in baselines], name, limits))
        for name, baselines, rows in chapters
        for group in by_call(rows)
        for row in group
    ]
    path.write_text("".join(f"{line}\n" for line in lines))


def speedup(row: Row, baseline: Row) -> float | None:
    if row.timing is None or baseline.timing is None:
        return None
    return baseline.timing.p50_ms / row.timing.p50_ms


def unit(rows: Iterable[Row]) -> tuple[str, float]:
    """The unit of speed that suits the rows, and what a GFLOP/s figure is divided by."""
    fastest = max((row.gflops or 0.0 for row in rows), default=0.0)
    return ("TFLOP/s", 1e3) if fastest > 1e4 else ("GFLOP/s", 1.0)


class Notes:
    """Why rows have no figures, numbered, to be printed once below the tables."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def cell(self, row: Row, text: str | None) -> str:
        """The text; where there is none, the number of the reason."""
        if text is not None:
            return text
        number = self._numbers.setdefault(row.reason, len(self._numbers) + 1)
        return f"[red]FAILED[/red] ({number})" if row.status == "failed" else f"[dim]({number})[/dim]"

    def ms(self, row: Row) -> str:
        return self.cell(row, row.timing and f"{row.timing.p50_ms:.3f}")

    def print(self, console: Console) -> None:
        for reason, number in self._numbers.items():
            print_dim(f"({number}) {reason}", console)


def print_dim(text: str, console: Console) -> None:
    console.print(f"[dim]{escape(text)}[/dim]", highlight=False)


def table(title: str, columns: Sequence[str], lines: Iterable[Sequence[str]]) -> Table:
    """The first column is text, the others are figures."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        made.add_column(column, justify="right" if place else "left", no_wrap=not place)
    for line in lines:
        made.add_row(*line)
    return made


def print_tables(rows: Sequence[Row], baselines: Sequence[str], console: Console, limits: Limits = NO_LIMITS) -> None:
    """A table per dtype and direction: a line per case, three figures per peer; below, why a peer did not run."""
    notes = Notes()
    for dtype, direction in _in_order((row.case.dtype_name, row.direction) for row in rows):
        chosen = [row for row in rows if (row.case.dtype_name, row.direction) == (dtype, direction)]
        console.print(_speed_table(f"{direction}, {dtype}", chosen, baselines, notes, limits.get(dtype)))
    notes.print(console)
    legend = (
        "ms: median time. GFLOP/s, TFLOP/s: operations of the matrix products alone. MB: peak memory beyond the "
        "inputs, results included. ratio to a peer: its time over pyattn's."
    )
    if limits:
        legend += " of limit: pyattn's speed over the machine's own limit."
    print_dim(legend, console)


def print_summary(rows: Sequence[Row], baselines: Sequence[str], console: Console) -> None:
    """The geometric mean of the first peer's speed-up per dtype and direction."""
    kinds = _in_order((row.case.dtype_name, row.direction) for row in rows)
    for (dtype, direction), baseline in product(kinds, baselines):
        chosen = [row for row in rows if (row.case.dtype_name, row.direction) == (dtype, direction)]
        found = [found for group in by_call(chosen) if (found := ratio(group, baseline)) is not None]
        if found:
            mean = exp(sum(map(log, found)) / len(found))
            spread = f"geometric mean of {len(found)}; {min(found):.2f} to {max(found):.2f}"
            console.print(f"{dtype} {direction}: {mean:.2f} times the speed of {baseline} ({spread})", highlight=False)


def in_a_line(group: Sequence[Row], baselines: Sequence[str]) -> str:
    """What one call showed of the first peer, for a run to print as it goes."""
    ours = group[0]
    if ours.timing is None:
        return f"{ours.case.id} {ours.direction}: {ours.status}, {ours.reason}"
    ratios = [f", {found:.2f} x {name}" for name in baselines if (found := ratio(group, name)) is not None]
    return f"{ours.case.id} {ours.direction}: {ours.timing.p50_ms:.3f} ms{''.join(ratios)}"


def by_call(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each case in each direction, a row per peer, in their order."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.case.id, row.direction), []).append(row)
    return list(groups.values())


def ratio(group: Sequence[Row], baseline: str) -> float | None:
    """The first peer's speed-up over `baseline` within one call."""
    against = next((row for row in group if row.peer == baseline), None)
    return None if against is None else speedup(group[0], against)


def ratio_columns(baselines: Iterable[str]) -> list[str]:
    return [f"ratio to {name}" for name in baselines]


def _speed_table(title: str, rows: Sequence[Row], baselines: Sequence[str], notes: Notes, limit: float | None) -> Table:
    speed, scale = unit(rows)
    peers = _in_order(row.peer for row in rows)
    lines = []
    for group in by_call(rows):
        ratios, gflops = [ratio(group, name) for name in baselines], group[0].gflops
        line = [group[0].case.label, *(_cell(row, scale, notes) for row in group)]
        line += ["" if found is None else f"[bold]{found:.2f}[/bold]" for found in ratios]
        if limit is not None:
            line.append("" if gflops is None else f"{gflops / limit:.0%}")
        lines.append(line)
    columns = ["case", *peers, *ratio_columns(baselines), *([] if limit is None else ["of limit"])]
    return table(f"{title}: ms, {speed}, MB", columns, lines)


def _cell(row: Row, scale: float, notes: Notes) -> str:
    if row.timing is None or row.gflops is None:
        return notes.cell(row, None)
    megabytes = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
    return f"{row.timing.p50_ms:.3f} {row.gflops / scale:5.0f} {megabytes:>4}"


def _in_order(items: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(items))
