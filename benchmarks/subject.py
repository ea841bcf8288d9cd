"""What is measured beyond the table of speeds: one question, its cases, and how its answer is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from .cases import Case
from .chart import Panel
from .peers import Peer
from .report import Chapter, Notes, by_call, print_dim, ratio_columns, speedup, table
from .suite import Effort, Row, measure

Groups = tuple[tuple[Case, ...], ...]  # the cases of one group are timed side by side


@dataclass(frozen=True)
class Subject:
    """One question.

    Args:
        seconds: time for `groups`; `quick_groups` are small enough to need no more than `quick_seconds`.
        baselines: the names of the peers that `speedup` is taken against in the figures.
        table: the rows as one table.
        panels: the rows as panels of the picture.
        legend: what the table's words mean.
    """

    name: str
    groups: Groups
    peers: tuple[Peer, ...]
    baselines: tuple[str, ...]
    effort: Effort
    seconds: float
    table: Callable[[Sequence[Row], Notes], Table]
    panels: Callable[[Sequence[Row]], list[Panel]]
    legend: str
    quick_groups: Groups = ()
    quick_seconds: float = 2.0

    def quick(self) -> Subject:
        """The same question of `quick_groups`."""
        return replace(self, groups=self.quick_groups, seconds=self.quick_seconds)

    def measure(self, device: str) -> Iterator[list[Row]]:
        """The rows of one group after another."""
        return measure(self.groups, self.peers, device, self.seconds, self.effort)

    def chapter(self, rows: Sequence[Row]) -> Chapter:
        return Chapter(self.name, self.baselines, rows)

    def print(self, rows: Sequence[Row], console: Console) -> None:
        """The table, below it why rows have no figures, and the legend."""
        notes = Notes()
        console.print(self.table(rows, notes))
        notes.print(console)
        print_dim(self.legend, console)


def comparison(title: str, rows: Sequence[Row], notes: Notes) -> Table:
    """A line per case and direction: everyone's time, the ratios of the others' to ours, everyone's peak memory."""
    calls = by_call(rows)
    peers = [row.peer for row in calls[0]]
    lines = []
    for group in calls:
        ratios = [shown(speedup(group[0], other)) for other in group[1:]]
        line = [group[0].case.label, group[0].direction, *map(notes.ms, group), *ratios]
        lines.append(line + [shown(megabytes(row), ".0f") for row in group])
    columns = ["case", "direction", *(f"{name} ms" for name in peers), *ratio_columns(peers[1:])]
    return table(title, columns + [f"{name} MB" for name in peers], lines)


def p50(row: Row) -> float | None:
    """The median in milliseconds."""
    return row.timing and row.timing.p50_ms


def megabytes(row: Row) -> float | None:
    """The peak memory in 10**6 bytes."""
    return None if row.peak_bytes is None else row.peak_bytes / 1e6


def over(a: float | None, b: float | None) -> float | None:
    """a / b, where both were measured."""
    return None if a is None or not b else a / b


def shown(number: float | None, form: str = ".2f") -> str:
    """The number in the format, or nothing."""
    return "" if number is None else format(number, form)
