"""What is measured beyond the table of speeds: one question, its cases, and how its answer is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table

from .cases import Case
from .chart import Panel
from .peers import Peer
from .report import Chapter, Notes
from .suite import Effort, Row, measure

Groups = tuple[tuple[Case, ...], ...]  # the cases of one group are timed side by side


@dataclass(frozen=True)
class Subject:
    """One question on the CPU.

    Args:
        seconds: time for `groups`; `quick_groups` are small enough to need no more than `quick_seconds`.
        baseline: the name of the peer that `speedup` is taken against in the figures.
        table: the rows as one table.
        panels: the rows as panels of the picture.
        legend: what the table's words mean.
    """

    name: str
    groups: Groups
    quick_groups: Groups
    peers: tuple[Peer, ...]
    baseline: str
    effort: Effort
    seconds: float
    table: Callable[[Sequence[Row], Notes], Table]
    panels: Callable[[Sequence[Row]], list[Panel]]
    legend: str
    quick_seconds: float = 2.0

    def measure(self, quick: bool) -> Iterator[list[Row]]:
        """The rows of one group after another."""
        groups, seconds = (self.quick_groups, self.quick_seconds) if quick else (self.groups, self.seconds)
        return measure(groups, self.peers, "cpu", seconds, self.effort)

    def chapter(self, rows: Sequence[Row]) -> Chapter:
        return Chapter(self.name, self.baseline, rows)


def p50(row: Row) -> float | None:
    """The median in milliseconds."""
    return row.timing and row.timing.p50_ms


def over(a: float | None, b: float | None) -> float | None:
    """a / b, where both were measured."""
    return None if a is None or b is None else a / b


def shown(number: float | None, form: str = ".2f") -> str:
    """The number in the format, or nothing."""
    return "" if number is None else format(number, form)
