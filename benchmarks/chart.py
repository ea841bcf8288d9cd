"""The picture: grouped bars of speed, a row of panels per group, forward beside backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .cases import DIRECTIONS, Case
from .report import by_case, unit
from .suite import Row

# Okabe and Ito's palette, told apart by colour-blind readers too.
_COLOURS = ("#D55E00", "#0072B2", "#999999", "#009E73", "#E69F00", "#CC79A7")


def draw(
    path: Path,
    rows: Sequence[Row],
    title: str,
    panel: Callable[[Case], str],
    label: Callable[[Case], str],
) -> None:
    """Writes a PNG. `panel` names the group of panels a case belongs to, `label` the case within it."""
    panels = list(dict.fromkeys(panel(row.case) for row in rows))
    peers = list(dict.fromkeys(row.peer for row in rows))
    figure = Figure(figsize=(13, 0.9 + 3.1 * len(panels)), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), len(DIRECTIONS), squeeze=False)
    for line, name in zip(axes, panels, strict=True):
        for axis, direction in zip(line, DIRECTIONS, strict=True):
            chosen = [row for row in rows if panel(row.case) == name and row.direction == direction]
            _bars(axis, chosen, peers, label)
            axis.set_title(f"{name}, {direction}", loc="left", fontsize=10, fontweight="bold")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(peers), frameon=False, fontsize=10)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _bars(axis: Axes, rows: Sequence[Row], peers: Sequence[str], label: Callable[[Case], str]) -> None:
    groups = by_case(rows)
    speed, scale = unit(rows)
    width = 0.84 / len(peers)
    for place, peer in enumerate(peers):
        heights = [next((row.gflops or 0.0 for row in group if row.peer == peer), 0.0) / scale for group in groups]
        offsets = [index + (place - (len(peers) - 1) / 2) * width for index in range(len(groups))]
        bars = axis.bar(offsets, heights, width * 0.94, label=peer, color=_COLOURS[place % len(_COLOURS)])
        axis.bar_label(bars, [f"{h:.0f}" if h else "" for h in heights], fontsize=6.5, padding=1)
    axis.set_xticks(range(len(groups)), [label(group[0].case) for group in groups], fontsize=8)
    axis.set_ylabel(speed, fontsize=9)
    axis.margins(y=0.1)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3, linewidth=0.6)
    axis.set_axisbelow(True)
