"""The search for launch sizes: the candidates for a row of `triton_kernels/config.py`, and the fastest of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import log2
from typing import NamedTuple, Protocol

import torch

from pyattn.triton_kernels import config
from pyattn.triton_kernels.config import Config

from .cases import Case, Direction

# In this order, as time may run out.
KERNELS: dict[str, Direction] = {"forward": "forward", "dq": "backward", "dkdv": "backward", "decode": "forward"}
HEAD_DIMS = (128, 64, 256)
LOADS = ("light", "crowded", "heavy")
# Of the 255 that a thread has, what sums and scores may take; with more, they spill.
MOST_REGISTERS = 200
# Candidates that are timed a second time, and how much faster than the present row one must be to take its place.
FINALISTS, GAIN = 6, 1.01


class Cell(NamedTuple):
    """A row that is sought: the arguments of `config.choose`, in its order."""

    kernel: str
    architecture: str
    bits: int
    head_dim: int
    load: str

    def __str__(self) -> str:
        return f"{self.kernel}, {self.bits} bits, d {self.head_dim}, {self.load}"

    @property
    def present(self) -> Config:
        return config.choose(*self)

    @property
    def key(self) -> tuple[str, str, int]:
        """Where in `config.TABLE` `choose` looks for it first."""
        if self.bits == 32:
            return self.kernel, "any", 32
        own = self.load != "light" or self.kernel == "decode"
        return self.kernel, f"{self.architecture} {self.load}" if own else self.architecture, self.bits

    def cases(self, small: bool = False) -> list[Case]:
        """The calls it is measured by, one after the other; the small ones take the same compiled kernels."""
        dtype = torch.bfloat16 if self.bits == 16 else torch.float32
        if self.kernel == "decode":
            shapes = [(1, 1024)] if small else [(1, 65536), (16, 8192)]
            plain = [Case(b, 32, 1, n, self.head_dim, dtype, False, group=4) for b, n in shapes]
        else:
            b, m = (1, 256) if small else (4, 4096 if self.bits == 16 else 1024)
            plain = [Case(b, 2048 // self.head_dim, m, m, self.head_dim, dtype, True)]
        return [case for one in plain for case in _with_load(one, self.load)]


def _with_load(plain: Case, load: str) -> list[Case]:
    """The call with what makes it `load`, by the rule of `triton_kernels/launch.py`."""
    if load == "light":
        return [plain]
    m, n = plain.m, plain.n
    if load == "heavy":
        changed = [replace(plain, causal=False, mask=True), replace(plain, causal=False, bias="1hmn")]
        return changed if m == 1 else [*changed, replace(plain, documents=(m // 2, m // 3, m - m // 2 - m // 3))]
    if m == 1:
        return [replace(plain, causal=True, left=n - n // 4)]
    return [replace(plain, b=1, m=plain.b * m, n=plain.b * n, lengths=(m,) * plain.b)]


def cells(architecture: str, bits: int, kernels: Sequence[str], head_dims: Sequence[int]) -> list[Cell]:
    """Every row that is sought, what matters most first. Rows of 32 bits serve every load."""
    loads = LOADS if bits == 16 else LOADS[:1]
    return [Cell(kernel, architecture, bits, d, load) for load in loads for d in head_dims for kernel in kernels]


def candidates(cell: Cell) -> list[Config]:
    """The present row, then others from near to far."""
    present = cell.present
    tiles = (32, 64, 128) if cell.bits == 16 else (16, 32, 64)
    block_m, block_n = ((present.block_m,), (*tiles, 256)) if cell.kernel == "decode" else (tiles, tiles)
    grid = (Config(*sizes) for sizes in product(block_m, block_n, (4, 8), (1, 2, 3, 4)))
    found = {present, *(sizes for sizes in grid if _registers(cell, sizes) <= MOST_REGISTERS)}
    return sorted(found, key=lambda sizes: (sum(abs(log2(a / b)) for a, b in zip(sizes, present, strict=True)), sizes))


def _registers(cell: Cell, sizes: Config) -> float:
    """How many a thread needs for float32 sums and scores."""
    scores = sizes.block_m * sizes.block_n * (1 if KERNELS[cell.kernel] == "forward" else 2)
    sums = 2 * sizes.block_n if cell.kernel == "dkdv" else sizes.block_m
    return (sums * cell.head_dim + scores) / (32 * sizes.num_warps)


class Trial(Protocol):
    """What needs the GPU, for one cell."""

    def compile(self, chunk: Sequence[Config]) -> list[bool]:
        """Whether each is done compiling, or failed to, in bearable time."""

    def problem(self, sizes: Config) -> str | None:
        """Why it is out of the question, in a word or two."""

    def time(self, chunk: Sequence[Config], rounds: int) -> dict[Config, float]:
        """The median milliseconds of all the cell's calls."""


@dataclass(frozen=True)
class Found:
    """The outcome for one cell.

    Args:
        ms: of the present row and the fastest others.
        dropped: how many candidates for which reason.
    """

    cell: Cell
    ms: dict[Config, float]
    dropped: Counter[str]

    @property
    def best(self) -> Config:
        """The fastest; the present row unless it is beaten by more than noise."""
        present = self.cell.present
        fastest = min(self.ms, key=self.ms.__getitem__, default=present)
        return present if present in self.ms and self.ms[present] < GAIN * self.ms[fastest] else fastest

    @property
    def remark(self) -> str:
        """The best one's time, and its gain over the present row."""
        best, present = self.best, self.cell.present
        if best not in self.ms:
            return "as before, none could be measured"
        time = f"{self.ms[best]:.3f} ms"
        if best == present:
            return f"{time}, as before"
        gain = f"{self.ms[present] / self.ms[best]:.2f} times as fast as" if present in self.ms else "in place of"
        return f"{time}, {gain} {tuple(present)}"

    def __str__(self) -> str:
        dropped = "".join(f"; {count} {reason}" for reason, count in self.dropped.items())
        return f"{self.cell}: {tuple(self.best)}, {self.remark}{dropped}"


def search(cell: Cell, trial: Trial, until: float, at_once: int, tried: Callable[[int], None]) -> Found:
    """Tries the candidates, `at_once` at a time, until time.monotonic() says `until`; at least the first ones.

    tried: told of as many.
    """
    left, sound, dropped = candidates(cell), list[Config](), Counter[str]()
    while left and (not (sound or dropped) or time.monotonic() < until):
        chunk, left = left[:at_once], left[at_once:]
        for sizes, ready in zip(chunk, trial.compile(chunk), strict=True):
            problem = trial.problem(sizes) if ready else "slow to compile"
            if problem is None:
                sound.append(sizes)
            else:
                dropped[problem] += 1
        tried(len(chunk))
    tried(len(left))
    if left:
        dropped["not tried"] = len(left)
    rough = trial.time(sound, 3)
    finalists = sorted(sound, key=lambda sizes: (sizes != cell.present, rough[sizes]))[:FINALISTS]
    return Found(cell, trial.time(finalists, 30), dropped)


def rows_text(found: Sequence[Found], measured: str) -> str:
    """The rows, to be pasted into `config.TABLE`; where a head size was not sought, the present one.

    measured: on which GPU, and when.
    """
    lines = []
    for key in dict.fromkeys(one.cell.key for one in found):
        sought = {one.cell.head_dim: one for one in found if one.cell.key == key}
        cell = next(iter(sought.values())).cell
        lines.append(f"    {key}: {{".replace("'", '"'))
        for d in sorted(HEAD_DIMS):
            best, remark = cell._replace(head_dim=d).present, ""
            if d in sought:
                best, remark = sought[d].best, f"  # {measured}: {sought[d].remark}"
            lines.append(f"        {d}: Config{tuple(best)},{remark}")
        lines.append("    },")
    return "\n".join(lines)
