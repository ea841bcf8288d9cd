"""The gate before the clock: a call is timed only after its result was held against the float64 definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from pyattn import testing

from .cases import DIRECTIONS, Case, Direction, Inputs

# The definition holds whole score matrices in float64, a dozen of them at a time: 0.4 GiB at this length for one head.
ONE_HEAD_FROM = 2048
# Where no sum over queries is judged they are independent too, and the last so many, which see the most, suffice: of
# the forward alone, and beyond a length (at 32768 whole matrices would take 100 GiB).
LAST_QUERIES, ALL_QUERIES_UNTIL = 512, 16384
# Of dropout's mask; torch's own, which differs, cannot be held against the definition.
SEED = 20


Cut = Callable[[str, Tensor], Tensor]  # of a tensor by its name: q, k, v, bias, mask, out, or a gradient's, d_q


class _Sample:
    """A part of a case that can be computed on its own, and what it should be."""

    def __init__(self, cut: Cut, call: testing.Call) -> None:
        self._cut, self._call = cut, call
        self._expected, self._baseline = (
            testing._evaluate_definition(call, dtype) for dtype in (torch.float64, call.tensors["q"].dtype)
        )

    @cached_property
    def _oracle(self) -> testing.Oracle:
        with torch.enable_grad():  # the clock runs forwards without
            return testing.reference(self._call)

    def compare(self, name: str, result: Tensor) -> testing.Result:
        """First without the rule's allowance for rounding, which takes as long to compute as all the rest."""
        part = self._cut(name, result)
        found = testing.compare(name, part, self._expected[name], self._baseline[name])
        if found.excess <= 1:
            return found
        return testing.compare(name, part, self._expected[name], self._baseline[name], self._oracle.rounding[name])


class Gate:
    """The right results of one case on its first and last head, by `pyattn.testing`'s rule.

    Heads are independent, so two of them judge the kernel at its full size; in the others only a NaN or an infinity
    is looked for. Of packed sequences it is the first head of the first and the last sequence; of a very long one, out
    and d_q of the last queries.
    """

    def __init__(self, case: Case, x: Inputs, directions: Sequence[Direction] = DIRECTIONS) -> None:
        last = tuple(directions) == ("forward",) or case.m > ALL_QUERIES_UNTIL
        cuts = (
            [_head_cut(case, LAST_QUERIES if last else case.m)]
            if case.lengths is None
            else _sequence_cuts(case.lengths)
        )
        self._samples = [_Sample(cut, _call(case, x, cut)) for cut in cuts]
        self._gradients = tuple(f"d_{name}" for name in x.leaves)
        self._judged = ("out", "d_q") if last else ("out", *self._gradients)

    def problem(self, direction: Direction, results: tuple[Tensor, ...], comparable: bool = True) -> str | None:
        """What is wrong with the results; None when they may be timed.

        Args:
            comparable: False for results that the definition does not determine; they need only be finite.
        """
        for name, result in zip(self._names(direction), results, strict=True):
            if not result.isfinite().all():
                return f"{name} has values that are not finite"
            for sample in self._samples if comparable and name in self._judged else ():
                found = sample.compare(name, result)
                if not found.excess <= 1:
                    return f"{name} is wrong: its error {found.error:.2g} is {found.excess:.2g} times what is allowed"
        return None

    def _names(self, direction: Direction) -> tuple[str, ...]:
        out, gradients = ("out",), self._gradients
        return {"forward": out, "backward": gradients, "forward + backward": out + gradients}[direction]


def _head_cut(case: Case, queries: int) -> Cut:
    """[b, heads, length, size] to the heads of one key/value head, and the last queries: [1 to b, group or 1, ...]."""
    batch: Any
    heads: Any
    if case.dropout_p > 0:
        batch = heads = (0,)  # the mask depends on the number of the batch element and of the head
    elif case.bias is not None and case.bias[0] == "1":
        batch, heads = slice(None), -1  # its gradient sums over the batch
    elif case.b * case.hk == 1 or max(case.m, case.n) >= ONE_HEAD_FROM:
        batch = heads = (-1,)
    else:
        batch = heads = (0, -1)

    def cut(name: str, t: Tensor) -> Tensor:
        found = t.detach().unflatten(1, (case.hk, -1))[batch, heads]
        return found[:, :, -queries:] if name in ("q", "out", "d_out", "d_q", "bias", "mask") else found

    return cut


def _sequence_cuts(lengths: tuple[int, ...]) -> list[Cut]:
    """[total, heads, size] to the first head of one sequence, [1, 1, length, size]."""
    spans = list(pairwise(accumulate(lengths, initial=0)))

    def cut_of(start: int, end: int) -> Cut:
        return lambda name, t: t.detach()[start:end, 0][None, None]

    return [cut_of(*spans[end]) for end in (0, -1)]


def _call(case: Case, x: Inputs, cut: Cut) -> testing.Call:
    tensors: dict[str, Any] = {name: cut(name, t) for name, t in x.leaves.items()}
    d_out = cut("d_out", x.d_out)
    options: dict[str, Any] = {
        "causal": case.causal,
        "window": None if case.left is None else (case.left, 0),
        "dropout_p": case.dropout_p,
        "seed": SEED if case.dropout_p > 0 else None,
    }
    if x.mask is not None:
        options["mask"] = cut("mask", x.mask.expand(-1, case.h, -1, -1))
    b, _, m, _ = d_out.shape
    # Both the same in every batch element.
    if x.documents is not None:
        ids = x.documents[:1].expand(b, -1)
        options["segment_ids"] = ids[:, -m:], ids
    if x.row_windows is not None:
        options["row_windows"] = tuple(t[:1, -m:].expand(b, -1) for t in x.row_windows)
    return testing.Call(testing.Case(case.id), tensors, options, d_out, d_lse=d_out.new_zeros(d_out.shape[:3]))
