"""Pictures of attention, as PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from pyattn.check import ShapeError
from pyattn.files import replacing

_INCHES = 0.32  # of a word
_COLUMNS = 6  # of pictures side by side
_SHADE = 0.85  # of what was not looked at


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


def draw_looks(picture: Path, image: Tensor, words: Sequence[str], weights: Tensor) -> None:
    """Draws where each word of a caption was seen: the image, and beside it once for each word, dark where the weight
    is small next to the word's largest.

    Args:
        picture: the file to write.
        image: uint8 [3, height, width].
        words: of the caption.
        weights: [words, L], of a square grid, row by row.
    Raises:
        ShapeError: the weights are not of these words, or of no square grid.
    Source: Xu et al. 2015, arXiv:1502.03044, figure 2.
    """
    side = math.isqrt(weights.shape[-1])
    if weights.ndim != 2 or len(weights) != len(words) or side * side != weights.shape[1] or side == 0:
        raise ShapeError(f"weights: expected [{len(words)}, L], a square grid for each word, got {list(weights.shape)}")
    rows = math.ceil((1 + len(words)) / _COLUMNS)
    figure = Figure(figsize=(1.7 * _COLUMNS, 2 * rows), layout="constrained")
    frames = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    pixels, extent = image.permute(1, 2, 0).cpu().numpy(), (0, image.shape[2], image.shape[1], 0)
    for axes in frames:
        axes.set_axis_off()
    frames[0].imshow(pixels, extent=extent)
    for axes, word, of_word in zip(frames[1:], _shown(words), weights.float().cpu(), strict=False):
        axes.imshow(pixels, extent=extent)
        shade = _SHADE * (1 - of_word / of_word.max().clamp(min=1e-12)).view(1, 1, side, side)
        smooth = F.interpolate(shade, (image.shape[1], image.shape[2]), mode="bilinear")[0, 0].numpy()
        axes.imshow(numpy.zeros_like(smooth), cmap="gray", vmin=0, vmax=1, alpha=smooth, extent=extent)
        axes.set_title(word, parse_math=False)
    with replacing(picture) as path:
        figure.savefig(path, format="png", dpi=100)


def _shown(words: Sequence[str]) -> list[str]:
    """Words, and what is no letter or sign by its number."""
    return [word if word.isprintable() else word.encode("unicode_escape").decode() for word in words]
