"""The pictures: grouped bars in panels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .cases import DIRECTIONS, Case
from .report import NO_LIMITS, Limits, by_call, unit
from .suite import Row

# Okabe and Ito's palette, told apart by colour-blind readers too.
_COLOURS = ("#D55E00", "#0072B2", "#999999", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")


class Panel(NamedTuple):
    """Groups of bars, a bar per series in each."""

    title: str
    unit: str
    groups: list[str]  # their labels
    series: dict[str, list[float | None]]  # a height per group; None leaves the bar out
    line: tuple[str, float] | None = None  # a horizontal line and its label
    digits: int = 0  # of the numbers on the bars, after the point


def draw(
    path: Path,
    rows: Sequence[Row],
    title: str,
    panel: Callable[[Case], str],
    label: Callable[[Case], str],
    limits: Limits = NO_LIMITS,
) -> None:
    """Writes a PNG of speeds: a row of panels per group, forward beside backward.

    Args:
        panel: names the group of panels a case belongs to.
        label: names the case within it.
        limits: the machine's own, drawn as a line.
    """
    names = list(dict.fromkeys(panel(row.case) for row in rows))
    figure, axes = _figure(len(names), len(DIRECTIONS), title)
    for line, name in zip(axes, names, strict=True):
        for axis, direction in zip(line, DIRECTIONS, strict=True):
            chosen = [row for row in rows if panel(row.case) == name and row.direction == direction]
            found = speeds(f"{name}, {direction}", chosen, label, limits)
            _bars(axis, found, list(found.series))
    _legend(figure, axes[0][0])
    _save(figure, path)


def draw_panels(path: Path, panels: Sequence[Panel], title: str) -> None:
    """Writes a PNG of any panels, two in a row, each with its own legend unless that of one says all. A series of one
    name has one colour in all of them."""
    figure, axes = _figure((len(panels) + 1) // 2, min(len(panels), 2), title)
    places = [axis for line in axes for axis in line]
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    fullest = max(range(len(panels)), key=lambda place: len(panels[place].series))
    alike = len(panels[fullest].series) == len(names) and len({panel.line and panel.line[0] for panel in panels}) == 1
    for axis, panel in zip(places, panels, strict=False):
        _bars(axis, panel, names)
        if not alike and (len(panel.series) > 1 or panel.line):
            axis.legend(frameon=False, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    if alike:
        _legend(figure, places[fullest])
    for axis in places[len(panels) :]:
        axis.set_visible(False)
    _save(figure, path)


def speeds(title: str, rows: Sequence[Row], label: Callable[[Case], str], limits: Limits = NO_LIMITS) -> Panel:
    """A panel of one direction: a group of bars per case, a bar per peer."""
    groups, peers = by_call(rows), dict.fromkeys(row.peer for row in rows)
    speed, scale = unit(rows)
    series = {
        peer: [next((row.gflops / scale for row in group if row.peer == peer and row.gflops), None) for group in groups]
        for peer in peers
    }
    limit = limits.get(rows[0].case.dtype_name)
    line = None if limit is None else ("machine limit", limit / scale)
    return Panel(title, speed, [label(group[0].case) for group in groups], series, line)


def _legend(figure: Figure, axis: Axes) -> None:
    """One for all panels, below them."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=10)


def _bars(axis: Axes, panel: Panel, names: Sequence[str]) -> None:
    """names: of the series of all panels, each of which has its colour."""
    width = 0.84 / len(panel.series)
    for place, (name, heights) in enumerate(panel.series.items()):
        offsets = [index + (place - (len(panel.series) - 1) / 2) * width for index in range(len(panel.groups))]
        bars = axis.bar(
            offsets, [h or 0.0 for h in heights], width * 0.94, label=name,
            color=_COLOURS[names.index(name) % len(_COLOURS)],
        )  # fmt: skip
        axis.bar_label(bars, [f"{h:.{panel.digits}f}" if h else "" for h in heights], fontsize=6.5, padding=1)
    if panel.line is not None:
        name, height = panel.line
        axis.axhline(height, color="black", linestyle="--", linewidth=1, label=name)
        axis.annotate(
            f"{height:.0f}", (1, height), xycoords=("axes fraction", "data"), xytext=(2, 0),
            textcoords="offset points", va="center", fontsize=7,
        )  # fmt: skip
    axis.set_title(panel.title, loc="left", fontsize=10, fontweight="bold")
    axis.set_xticks(range(len(panel.groups)), panel.groups, fontsize=8)
    axis.set_ylabel(panel.unit, fontsize=9)
    axis.margins(y=0.1)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3, linewidth=0.6)
    axis.set_axisbelow(True)


def _figure(lines: int, columns: int, title: str) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(9 if columns == 1 else 13, 0.9 + 3.1 * lines), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    return figure, figure.subplots(lines, columns, squeeze=False).tolist()


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
