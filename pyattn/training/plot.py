"""Pictures of training runs, as PNG."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyattn.files import replacing
from pyattn.training import metrics


def loss_curve(folder: Path) -> Path:
    """Draws the training and validation loss of one run into its folder. Returns the picture's path."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    _curves(figure.subplots(), [folder])
    return _save(figure, folder / "loss.png")


def comparison(folders: list[Path], picture: Path) -> Path:
    """Draws the losses of several runs over one another and their tokens per second side by side."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, speeds = figure.subplots(1, 2, width_ratios=(3, 2))
    _curves(losses, folders)
    values = [metrics.tokens_per_second(metrics.read(folder)) for folder in folders]
    bars = speeds.bar([_shown(folder) for folder in folders], values, color=[f"C{i}" for i in range(len(folders))])
    speeds.bar_label(bars, [f"{value:,.0f}" for value in values])
    speeds.margins(y=0.1)  # room for the numbers above the bars
    speeds.set(ylabel="tokens per second (median over the steps)")
    return _save(figure, picture)


def _curves(axes: Axes, folders: list[Path]) -> None:
    for i, folder in enumerate(folders):
        lines = metrics.read(folder)
        # Each further run is thinner and dashed, so that curves that coincide are all seen.
        style = "-" if i == 0 else "--"
        name = _shown(folder)
        axes.plot(*metrics.curve(lines, "loss"), f"C{i}{style}", alpha=0.5, lw=1, label=f"{name}: training")
        axes.plot(*metrics.curve(lines, "val_loss"), f"C{i}{style}", marker="o", label=f"{name}: validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()


def _shown(folder: Path) -> str:
    """A folder's name as matplotlib shows it: it takes what stands between dollars for a formula, hides what begins
    with an underscore, and has no glyph for bytes that are no text."""
    name = os.fsencode(folder.name).decode("utf-8", "replace").replace("$", r"\$")
    return f"\u200b{name}" if name.startswith("_") else name


def _save(figure: Figure, picture: Path) -> Path:
    with replacing(picture) as path, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a glyph that is missing is drawn as an empty box
        figure.savefig(path, format="png", dpi=150)
    return picture
