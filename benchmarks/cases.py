"""What is measured: shapes, dtypes and directions, their arithmetic and their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyattn.spec import dtype_name

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


@dataclass(frozen=True)
class Case:
    """One attention call: q [b, h, m, d], k and v [b, h, n, d].

    Causal cases have m == n, where every peer means the same by the word; elsewhere torch aligns top-left.
    """

    b: int
    h: int
    m: int
    n: int
    d: int
    dtype: torch.dtype
    causal: bool

    @property
    def id(self) -> str:
        causal = "-causal" if self.causal else ""
        return f"b{self.b}-h{self.h}-m{self.m}-n{self.n}-d{self.d}-{self.dtype_name}{causal}"

    @property
    def dtype_name(self) -> str:
        return dtype_name(self.dtype)

    @property
    def label(self) -> str:
        """The shape in few characters, for a table's line."""
        length = f"{self.m}" if self.m == self.n else f"{self.m}x{self.n}"
        return f"b{self.b} h{self.h} {length} d{self.d}{' causal' if self.causal else ''}"

    def flops(self, direction: Direction) -> float:
        """Floating-point operations of the two matrix products, the convention of Dao 2023 (arXiv:2307.08691, 4.1).

        Causal counts half; the backward has five products where the forward has two.
        """
        forward = 2 * (2 * self.b * self.h * self.m * self.n * self.d) / (2 if self.causal else 1)
        return forward if direction == "forward" else 2.5 * forward


class Inputs(NamedTuple):
    """Random tensors of one case, and the gradient that comes back to its output."""

    q: Tensor  # [b, h, m, d]
    k: Tensor  # [b, h, n, d]
    v: Tensor  # [b, h, n, d]
    d_out: Tensor  # [b, h, m, d]


def make_inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    """Standard normal tensors, drawn on `device`: at GPU sizes, drawing on the CPU takes longer than the case."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(length: int) -> Tensor:
        shape = (case.b, case.h, length, case.d)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(case.dtype)

    return Inputs(normal(case.m), normal(case.n), normal(case.n), normal(case.m))


def _cpu_cases(*shapes: tuple[int, int, int, int, int, bool]) -> tuple[Case, ...]:
    return tuple(
        Case(b, h, m, n, d, dtype, causal)
        for b, h, m, n, d, causal in shapes
        for dtype in (torch.float32, torch.bfloat16)
    )


def _gpu_cases() -> tuple[Case, ...]:
    """16k tokens of width 2048 at every length, as Dao 2023 measures; what matters most first, as time may run out."""
    tokens, width = 16384, 2048

    def case(m: int, d: int, dtype: torch.dtype, causal: bool) -> Case:
        return Case(tokens // m, width // d, m, m, d, dtype, causal)

    bfloat16 = [
        case(m, d, torch.bfloat16, causal)
        for m in (4096, 16384, 1024, 8192, 2048, 512)
        for d in (128, 64)
        for causal in (True, False)
    ]
    others = [case(4096, d, torch.float16, True) for d in (128, 64)]
    return tuple(bfloat16 + others + [case(2048, 64, torch.float32, causal) for causal in (True, False)])


# A long sequence with and without the causal mask, GPT-2's batch, a wide head, and few queries over many keys. What
# matters most first here too.
CPU_CASES = _cpu_cases(
    (1, 12, 2048, 2048, 64, True),
    (1, 12, 2048, 2048, 64, False),
    (4, 12, 512, 512, 64, True),
    (1, 8, 1024, 1024, 128, True),
    (2, 8, 256, 2048, 64, False),
)
CPU_QUICK_CASES = _cpu_cases((1, 12, 512, 512, 64, True), (1, 8, 128, 1024, 64, False))
GPU_CASES = _gpu_cases()
