"""Backends held against the float64 definition, case by case: what `pyattn verify` runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyattn import core, registry
from pyattn.check import DTYPES, UnsupportedError
from pyattn.spec import FEATURES, AttentionSpec
from pyattn.testing import CASES, Case, Result, check_case, make_inputs

_FEW = 3


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one case: a result per tensor, or the reason of a declared refusal, or an error."""

    backend: str
    case: str
    dtype: torch.dtype
    features: frozenset[str]  # names out of pyattn.spec.FEATURES; empty for plain attention
    results: tuple[Result, ...] = ()
    refusal: str | None = None
    error: str | None = None

    @property
    def failures(self) -> list[str]:
        """What went wrong, a sentence each; empty when the case passed or was refused."""
        if self.error is not None:
            return [self.error]
        return [
            f"{result.name}: error {result.error:.3g}, plain PyTorch's is {result.baseline:.3g}; "
            f"{result.excess:.3g} times what is allowed"
            for result in self.results
            if not result.excess <= 1
        ]


def ready(asked: list[str] | None) -> list[str]:
    """The backends asked for, or all that are ready.

    Raises:
        RangeError: there is no such backend.
        UnsupportedError: one that was asked for is not ready.
    """
    states = registry.list_backends()
    for name in map(registry.requested, asked or []):
        if states[name] != "ready":
            raise UnsupportedError(f"backend: {name} is not ready: {states[name]}")
    return asked or [name for name, state in states.items() if state == "ready"]


def jobs(names: list[str]) -> list[tuple[str, Case, torch.dtype]]:
    """The arguments of every `verify` call that these backends need."""
    return [
        (name, case, dtype)
        for name in names
        for dtype in DTYPES
        if dtype in registry.BACKENDS[name].dtypes
        for case in CASES
    ]


def verify(name: str, case: Case, dtype: torch.dtype) -> Verdict:
    """Runs one case forward and backward, on the GPU where the backend can."""
    backend = registry.BACKENDS[name]
    device = "cuda" if "cuda" in backend.devices and torch.cuda.is_available() else "cpu"
    call = make_inputs(case, dtype, device)
    spec = AttentionSpec.of(*core.prepare(**call.tensors, **call.options))
    if reason := backend.refusal(spec):
        return Verdict(name, case.id, dtype, spec.features, refusal=reason)
    try:
        results = check_case(name, case, dtype, device)
    except Exception as error:  # whatever a kernel raises is this case's failure, and the other cases are still of use
        return Verdict(name, case.id, dtype, spec.features, error=f"{type(error).__name__}: {error}")
    return Verdict(name, case.id, dtype, spec.features, tuple(results))


def by_feature(verdicts: list[Verdict]) -> dict[tuple[str, str], dict[torch.dtype, list[Verdict]]]:
    """The verdicts by (backend, feature) and dtype. A case with a few features counts in each, one with many apart."""
    table: dict[tuple[str, str], dict[torch.dtype, list[Verdict]]] = {}
    for name in dict.fromkeys(verdict.backend for verdict in verdicts):
        for row in ("plain", *FEATURES, "many at once"):
            for verdict in verdicts:
                if verdict.backend == name and row in _rows(verdict):
                    table.setdefault((name, row), {}).setdefault(verdict.dtype, []).append(verdict)
    return table


def _rows(verdict: Verdict) -> frozenset[str]:
    if len(verdict.features) > _FEW:
        return frozenset({"many at once"})
    return verdict.features or frozenset({"plain"})


def worst(verdicts: list[Verdict]) -> Result | None:
    """The result that is nearest to what is allowed, or furthest beyond; None when every case was refused."""
    return max((result for verdict in verdicts for result in verdict.results), key=lambda r: r.excess, default=None)
