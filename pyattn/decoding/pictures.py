"""Pictures of attention, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from pyattn.check import ShapeError
from pyattn.files import replacing

_INCHES = 0.32  # of a word


def draw_alignment(picture: Path, weights: Tensor, source: Sequence[str], target: Sequence[str]) -> None:
    """Draws which words of a source each word of a target was found in: white 0, black 1.

    Args:
        picture: the file to write.
        weights: [target, source], the weights of attention.
        source, target: the words.
    Raises:
        ShapeError: the weights are not of these words.
    Source: Bahdanau, Cho and Bengio 2015, arXiv:1409.0473, figure 3.
    """
    expected = [len(target), len(source)]
    if list(weights.shape) != expected:
        raise ShapeError(f"weights: expected {expected}, target by source words, got {list(weights.shape)}")
    figure = Figure(figsize=(2.5 + _INCHES * len(source), 1.5 + _INCHES * len(target)))
    axes = figure.subplots()
    shown = axes.imshow(weights.float().cpu().numpy(), cmap="gray_r", vmin=0, vmax=1, aspect="equal")
    # A dollar sign in a text is one, and no beginning of a formula.
    as_text = {"parse_math": False}
    axes.set_xticks(range(len(source)), _shown(source), rotation=60, ha="left", rotation_mode="anchor", **as_text)
    axes.set_yticks(range(len(target)), _shown(target), **as_text)
    axes.xaxis.tick_top()
    figure.colorbar(shown, ax=axes, label="weight")
    with replacing(picture) as path:
        figure.savefig(path, format="png", dpi=150, bbox_inches="tight")


def _shown(words: Sequence[str]) -> list[str]:
    """Words, and what is no letter or sign by its number."""
    return [word if word.isprintable() else word.encode("unicode_escape").decode() for word in words]
