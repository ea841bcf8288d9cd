"""Which branches of the kernels' source ran: by the source lines that compiled instructions name (PTX's .loc).

A branch is the body, or the else, of an if or a loop. It was entered if one instruction of one of its lines ran. Most
conditions are constants of the compiler, so a branch that no case asks for is not even compiled.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ptx.launch import Launch


class Branch(NamedTuple):
    """Lines of a file of kernels."""

    file: str
    function: str
    lines: range
    text: str  # its first line

    def __str__(self) -> str:
        return f"{self.file}:{self.lines[0]} of {self.function}: {self.text}"


class Entered:
    """Lines that ran, of launches whose schedule counts."""

    def __init__(self) -> None:
        self.lines: set[tuple[str, int]] = set()
        self.kernels: set[str] = set()
        self.calls = 0

    def add(self, launches: Iterable[Launch]) -> None:
        """The launches of one call."""
        self.calls += 1
        for launch in launches:
            self.kernels.add(launch.kernel)
            if launch.counts is None:
                raise ValueError("launches were not counted")
            statements = launch.program.code.statements
            for location in {statements[k].location for k in np.flatnonzero(launch.counts.executed)}:
                self.lines |= _lines(location)

    def left_out(self, folder: Path, files: Iterable[str]) -> list[Branch]:
        """Branches of the kernels in these files that were not entered."""
        found = [branch for file in files for branch in _branches(folder / file)]
        return [branch for branch in found if not any((branch.file, line) in self.lines for line in branch.lines)]


@lru_cache(None)
def _lines(location: str) -> frozenset[tuple[str, int]]:
    """Of "a.py:3:5 @[ b.py:7:1 ]", a line of a function that is inlined at another: both."""
    return frozenset((file, int(line)) for file, line in re.findall(r"(\w+\.py):(\d+)", location))


def _branches(path: Path) -> Iterator[Branch]:
    source = path.read_text("utf-8")
    lines = source.split("\n")
    for function in ast.parse(source).body:
        if isinstance(function, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in function.decorator_list):
            for first, last in _bodies(function):
                yield Branch(path.name, function.name, range(first, last + 1), lines[first - 1].strip())


def _bodies(function: ast.FunctionDef) -> Iterator[tuple[int, int]]:
    """First and last lines; an elif is an if of its own."""
    for node in ast.walk(function):
        if isinstance(node, ast.If | ast.For | ast.While):
            for body in (node.body, node.orelse):
                if body and not (body is node.orelse and isinstance(body[0], ast.If)):
                    yield body[0].lineno, body[-1].end_lineno or body[-1].lineno
