"""What is measured: shapes, dtypes and directions, their arithmetic and their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyattn.spec import dtype_name

_UNSTEADY = 8  # keys by which a row's window is at most off its way
Direction = Literal["forward", "backward", "forward + backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
# In units of the forward's two matrix products: the backward has five.
_PRODUCTS = {"forward": 1.0, "backward": 2.5, "forward + backward": 3.5}


@dataclass(frozen=True)
class Case:
    """One attention call: q [b, h, m, d], k [b, hk, n, d], v [b, hk, n, dv]; packed sequences lie on one axis, b = 1.

    Causal cases have m == n, where every peer means the same by the word; elsewhere torch aligns top-left.
    """

    b: int
    h: int
    m: int  # of packed sequences the total, and so n
    n: int
    d: int
    dtype: torch.dtype
    causal: bool
    group: int = 1  # query heads that share a key/value head
    value_dim: int | None = None  # None is d
    left: int | None = None  # with causal: how many keys before its own a query sees at most
    row_window: int | None = None  # how many keys each query sees, at a place of its own
    dropout_p: float = 0.0
    bias: str | None = (
        None  # the dimensions of an additive bias with a gradient, of which b, m, n may be shared: "1hmn"
    )
    mask: bool = False  # a random boolean mask [b, 1, m, n]
    lengths: tuple[int, ...] | None = None  # of packed sequences
    documents: tuple[int, ...] | None = None  # the lengths of those that share each row; m == n

    @property
    def hk(self) -> int:
        return self.h // self.group

    @property
    def dv(self) -> int:
        return self.d if self.value_dim is None else self.value_dim

    @property
    def id(self) -> str:
        return "-".join([f"b{self.b}", f"h{self.h}", f"m{self.m}", f"n{self.n}", f"d{self.d}", self.dtype_name,
                         *(word.replace(" ", "") for word in self.features)])  # fmt: skip

    @property
    def features(self) -> list[str]:
        """What the call uses beyond its shape, in few words."""
        words = {
            "causal": self.causal,
            f"hk {self.hk}": self.group != 1,
            f"dv {self.dv}": self.dv != self.d,
            f"window {(self.left or 0) + 1}": self.left is not None,
            f"row windows {self.row_window}": self.row_window is not None,
            f"dropout {self.dropout_p}": self.dropout_p > 0,
            f"bias {self.bias}": self.bias is not None,
            "mask": self.mask,
            f"packed {len(self.lengths or ())}": self.lengths is not None,
            f"documents {len(self.documents or ())}": self.documents is not None,
        }
        return [word for word, used in words.items() if used]

    @property
    def dtype_name(self) -> str:
        return dtype_name(self.dtype)

    @property
    def label(self) -> str:
        """The shape in few characters, for a table's line."""
        length = f"{self.m}" if self.m == self.n else f"{self.m}x{self.n}"
        return " ".join([f"b{self.b}", f"h{self.h}", length, f"d{self.d}", *self.features])

    def flops(self, direction: Direction) -> float:
        """Floating-point operations of the two matrix products, the convention of Dao 2023 (arXiv:2307.08691, 4.1).

        Causal counts half; the backward has five products where the forward has two.
        """
        return _PRODUCTS[direction] * 2 * self.b * self.h * self._pairs * (self.d + self.dv)

    @property
    def _pairs(self) -> float:
        """How many pairs of a query and a key a head computes; a random mask spares nobody any."""
        if self.left is not None and self.left < self.m:
            return self.m * (self.left + 1) - self.left * (self.left + 1) / 2
        if self.row_window is not None:
            return self.m * self.row_window
        parts = self.lengths or self.documents
        pairs = self.m * self.n if parts is None else sum(length * length for length in parts)
        return pairs / 2 if self.causal else pairs


class Inputs(NamedTuple):
    """Random tensors of one case, and the gradient that comes back to its output."""

    q: Tensor  # [b, h, m, d], or packed [m, h, d]
    k: Tensor  # [b, hk, n, d], or packed [n, hk, d]
    v: Tensor  # [b, hk, n, dv], or packed [n, hk, dv]
    d_out: Tensor  # [b, h, m, dv], or packed [m, h, dv]
    bias: Tensor | None
    mask: Tensor | None  # bool [b, 1, m, n]
    documents: Tensor | None  # int32 [b, m], the number of each position's
    row_windows: tuple[Tensor, Tensor] | None  # int32 [b, m], the first key of each query's, and the one behind it

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What takes a gradient, by the names of the gate."""
        named = {"q": self.q, "k": self.k, "v": self.v, "bias": self.bias}
        return {name: t for name, t in named.items() if t is not None}


def make_inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    """Standard normal tensors, drawn on `device`: at GPU sizes, drawing on the CPU takes longer than the case."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(case.dtype)

    def rows(heads: int, length: int, size: int) -> Tensor:
        return normal(case.b, heads, length, size) if case.lengths is None else normal(length, heads, size)

    sizes = {"b": case.b, "h": case.h, "m": case.m, "n": case.n, "1": 1}
    mask = documents = row_windows = None
    if case.mask:
        mask = torch.rand(case.b, 1, case.m, case.n, generator=generator, device=device) < 0.5
    if case.documents is not None:
        numbers, lengths = torch.arange(len(case.documents), dtype=torch.int32), torch.tensor(case.documents)
        documents = numbers.repeat_interleave(lengths).repeat(case.b, 1).to(device)
    if case.row_window is not None:
        # As a model's that reads a source from its beginning to its end, but not steadily.
        middle = torch.arange(case.m, device=device) * case.n // case.m
        shift = torch.randint(-_UNSTEADY, _UNSTEADY + 1, (case.m,), generator=generator, device=device)
        first = (middle + shift).clamp(0, case.n - case.row_window).int().repeat(case.b, 1)
        row_windows = first, first + case.row_window
    return Inputs(
        rows(case.h, case.m, case.d), rows(case.hk, case.n, case.d), rows(case.hk, case.n, case.dv),
        rows(case.h, case.m, case.dv), normal(*(sizes[s] for s in case.bias)) if case.bias else None, mask, documents,
        row_windows,
    )  # fmt: skip


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
        for m in (4096, 16384, 1024, 8192, 2048)
        for d in (128, 64)
        for causal in (True, False)
    ]
    others = [case(4096, d, torch.float16, True) for d in (128, 64)]
    return tuple(bfloat16 + others + [case(2048, 64, torch.float32, causal) for causal in (True, False)])


# GPT-2's batch, a long sequence, and a wide head over more than the caches hold, with and without the causal mask; what
# takes longest last, as time may run out here too.
CPU_CASES = _cpu_cases(
    (4, 12, 512, 512, 64, True),
    (4, 12, 512, 512, 64, False),
    (1, 12, 2048, 2048, 64, True),
    (1, 12, 2048, 2048, 64, False),
    (1, 8, 4096, 4096, 128, True),
    (1, 8, 4096, 4096, 128, False),
)
CPU_QUICK_CASES = _cpu_cases((1, 12, 512, 512, 64, True), (1, 8, 128, 1024, 64, False))
GPU_CASES = _gpu_cases()
