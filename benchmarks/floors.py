"""The project's floors on a GPU, each against the worst that a run measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from rich.table import Table

from . import decode, features, growth, hopper
from .cases import Direction
from .report import by_call, ratio, table
from .suite import Row

# Of one doubling of the length, at most: 2, and a little for what does not grow.
LINEAR = 2.1


Figures = list[tuple[str, float | None]]  # what was measured, and None where nothing was


class Floor(NamedTuple):
    """What is asked of every figure of one kind: at least `asked`, or at most where `at_most`."""

    name: str
    asked: float
    figures: Figures
    at_most: bool = False

    @property
    def worst(self) -> tuple[str, float] | None:
        measured = [(name, figure) for name, figure in self.figures if figure is not None]
        return (max if self.at_most else min)(measured, key=lambda found: found[1], default=None)

    @property
    def verdict(self) -> str:
        if self.worst is None:
            return "not measured"
        figure = self.worst[1]
        if figure > self.asked if self.at_most else figure < self.asked:
            return "not met"
        return "met" if all(figure is not None for _, figure in self.figures) else "met where measured"


def floors(answers: dict[str, Sequence[Row]]) -> list[Floor]:
    """Every floor, from the rows of each chapter by its name."""
    plain = by_call(row for row in answers["attention"] if row.case.dtype is torch.bfloat16 and row.case.m >= 1024)
    doublings = answers[growth.SUBJECT.name]
    labels = [group[0].case.label for group in by_call(doublings)]
    return [
        Floor("forward, speed over SDPA flash", 1.15, _ratios(plain, "SDPA flash", "forward")),
        Floor("forward, speed over SDPA cuDNN", 0.6, _ratios(plain, "SDPA cuDNN", "forward")),
        Floor("backward, speed over SDPA flash", 1.0, _ratios(plain, "SDPA flash", "backward")),
        *_of_hopper(by_call(answers[hopper.SUBJECT.name])),
        *_of_features(by_call(answers[features.SUBJECT.name])),
        Floor("decode, GB/s over the copy's", 0.8, _named(by_call(answers[decode.GPU_SUBJECT.name]), decode.of_copy)),
        Floor("peak memory, per doubling", LINEAR, list(zip(labels[1:], growth.growths(doublings), strict=True)), True),
    ]


def floor_table(found: Iterable[Floor]) -> Table:
    colours = {"met": "green", "not met": "red", "met where measured": "yellow", "not measured": "dim"}
    lines = []
    for floor in found:
        where, figure = floor.worst or ("", None)
        measured = sum(figure is not None for _, figure in floor.figures)
        lines.append([
            floor.name, f"{'<=' if floor.at_most else '>='} {floor.asked}", "" if figure is None else f"{figure:.2f}",
            where, f"{measured} of {len(floor.figures)}", f"[{colours[floor.verdict]}]{floor.verdict}[/]",
        ])  # fmt: skip
    return table("floors", ("floor", "asked", "worst", "where", "measured", "verdict"), lines)


def _of_hopper(calls: Sequence[Sequence[Row]]) -> list[Floor]:
    return [
        Floor(
            f"Hopper {aim.direction}, {aim.name}, speed over SDPA cuDNN",
            aim.asked,
            _ratios([group for group in calls if aim.holds(group[0].case)], "SDPA cuDNN", aim.direction),
        )
        for aim in hopper.AIMS
    ]


def _of_features(calls: Sequence[Sequence[Row]]) -> list[Floor]:
    kinds: dict[str, list[Sequence[Row]]] = {}
    for group in calls:
        kinds.setdefault(group[0].case.features[-1], []).append(group)
    return [
        Floor(f"{name}, speed over FlexAttention", features.AIM, _ratios(of_one, "FlexAttention"))
        for name, of_one in kinds.items()
    ]


def _ratios(calls: Iterable[Sequence[Row]], baseline: str, direction: Direction | None = None) -> Figures:
    chosen = [group for group in calls if direction in (None, group[0].direction)]
    return _named(chosen, lambda group: ratio(group, baseline))


def _named(calls: Iterable[Sequence[Row]], figure: Callable[[Sequence[Row]], float | None]) -> Figures:
    return [(f"{group[0].case.label} {group[0].direction}", figure(group)) for group in calls]
