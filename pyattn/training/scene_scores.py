"""How well a model describes scenes that it has not seen: what its captions say, and where it looked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyattn.decoding.captions import Caption, tell
from pyattn.training.scene_captions import CaptionError, Description, parse
from pyattn.training.scenes import CELLS, Scene, picture, scene

_FIRST = 2**41  # scenes for scores, which are in no training and no validation


@dataclass(frozen=True, slots=True)
class SceneScores:
    """Of captions of scenes.

    Args:
        scenes: how many.
        parsed: the part that could be parsed.
        right: the part that named all objects of the scene, of the right kinds and numbers, and nothing false.
        inside: over words that named a colour or a shape, the mean weight within the cells of the named objects; 0 for
            what was not there.
        pointed: the part of those words for which the largest weight was in such a cell (the pointing game of Zhang et
            al. 2016, arXiv:1608.00507, section 4.2).
        area: the part of the picture that such cells have, which looking anywhere would reach.
    """

    scenes: int
    parsed: float
    right: float
    inside: float
    pointed: float
    area: float

    def __str__(self) -> str:
        return (
            f"{self.right:.1%} of {self.scenes:,} captions right ({self.parsed:.1%} parsed); of the attention while a "
            f"colour or shape is named {self.inside:.1%} in its cells, the most in {self.pointed:.1%} of cases "
            f"(cells are {self.area:.1%} of the picture)"
        )


def held_back(count: int, *, held_out: bool) -> list[Scene]:
    """`count` scenes, the same ones always, which are in no training and no validation.

    held_out: with a pair of colour and shape that no scene of the training has.
    """
    return [scene(0, _FIRST + number, held_out=held_out) for number in range(count)]


def score_scenes(
    model: Any, tokenizer: Any, *, count: int = 500, held_out: bool = False, beams: int = 4
) -> SceneScores:
    """Lets a model describe the scenes of `held_back`, by beam search, as `pyattn caption` does.

    held_out: as for `held_back`.
    """
    scenes = held_back(count, held_out=held_out)
    images = torch.stack([torch.from_numpy(picture(each)) for each in scenes])
    return scores_of(scenes, tell(model, tokenizer, images, beams=beams))


def scores_of(scenes: Sequence[Scene], told: Sequence[Caption]) -> SceneScores:
    """The scores of captions, one for each scene."""
    parsed, right, looks = 0, 0, []
    for each, caption in zip(scenes, told, strict=True):
        try:
            description = parse(caption.text)
        except CaptionError:
            continue
        parsed += 1
        right += description.is_of(each)
        looks += _looks(each, description, caption.weights)
    inside, pointed, area = (
        sum(column) / max(1, len(looks)) for column in zip(*looks or [(0.0, 0.0, 0.0)], strict=True)
    )
    return SceneScores(len(scenes), parsed / len(scenes), right / len(scenes), inside, pointed, area)


def _looks(scene: Scene, description: Description, weights: Tensor) -> list[tuple[float, float, float]]:
    """For each word that names a colour or a shape: weight within the named objects' cells, whether the largest weight
    is there, and the part of the grid that is. weights: [words, L], of a square grid.

    A position belongs to the cell that its middle is in. A word whose cells have no position, as the middle ones of a
    grid of 2 x 2, is left out.
    """
    side = round(weights.shape[1] ** 0.5)
    place = ((torch.arange(side) + 0.5) * CELLS / side).long()  # the cell in which the middle of a position is
    cells = (place[:, None] * CELLS + place).flatten()
    found = []
    for phrase in description.phrases:
        named = torch.zeros(CELLS * CELLS, dtype=torch.bool)
        named[[each.cell for each in scene.of(phrase.kind)]] = True
        is_inside = named[cells]
        is_there = bool(is_inside.any()) or not scene.of(phrase.kind)
        for word in phrase.words if is_there else ():
            inside = weights[word][is_inside].sum().item()
            found.append((inside, float(is_inside[weights[word].argmax()]), is_inside.float().mean().item()))
    return found
