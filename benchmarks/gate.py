"""The gate before the clock: a call is timed only after its result was held against the float64 definition."""

from __future__ import annotations

from torch import Tensor

from pyattn import testing

from .cases import Case, Direction, Inputs

NAMES = {"forward": ("out",), "backward": ("d_q", "d_k", "d_v")}
# The definition holds whole score matrices in float64, a dozen of them at a time: 0.4 GiB at this length for one head.
ONE_HEAD_FROM = 2048


class Gate:
    """The right results of one case on its first and last head, by `pyattn.testing`'s rule.

    Heads are independent, so two of them judge the kernel at its full size; in the others only a NaN or an infinity
    is looked for.
    """

    def __init__(self, case: Case, x: Inputs) -> None:
        self._one_head = case.b * case.h == 1 or max(case.m, case.n) >= ONE_HEAD_FROM
        q, k, v, d_out = (self._sample(t) for t in x)
        b = q.shape[0]
        sample = testing.Case(case.id, b, 1, 1, case.m, case.n, case.d, case.d, causal=case.causal)
        tensors, options = {"q": q, "k": k, "v": v}, {"causal": case.causal}
        call = testing.Call(sample, tensors, options, d_out, d_lse=d_out.new_zeros(d_out.shape[:3]))
        self._oracle = testing.reference(call)

    def problem(self, direction: Direction, results: tuple[Tensor, ...]) -> str | None:
        """What is wrong with the results; None when they may be timed."""
        for name, result in zip(NAMES[direction], results, strict=True):
            if not result.isfinite().all():
                return f"{name} has values that are not finite"
            right = (self._oracle.expected[name], self._oracle.baseline[name], self._oracle.rounding[name])
            found = testing.compare(name, self._sample(result), *right)
            if not found.excess <= 1:
                return f"{name} is wrong: its error {found.error:.2g} is {found.excess:.2g} times what is allowed"
        return None

    def _sample(self, t: Tensor) -> Tensor:
        """[b, h, m, d] to [1 or 2, 1, m, d]: the last head, before it the first."""
        ends = (-1,) if self._one_head else (0, -1)
        return t.detach()[ends, ends].unsqueeze(1)
