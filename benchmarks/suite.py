"""One case after another: check, time, weigh. Every way to run the benchmark goes through here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from pyattn.check import UnsupportedError

from . import memory
from .cases import DIRECTIONS, Case, Direction, Inputs, make_inputs
from .gate import Gate
from .peers import Peer, bound
from .timing import Timing, interleaved

# What the clock gets per direction at most, and what a case takes in all when its peers need no preparation.
_CLOCK_SECONDS, _CASE_SECONDS = 1.0, 4.0

Call = Callable[[], tuple[torch.Tensor, ...]]
Status = Literal["ok", "failed", "not run"]


@dataclass(frozen=True)
class Row:
    """One peer on one case in one direction. `failed` is a wrong result, which is never timed, or an error of ours."""

    case: Case
    direction: Direction
    peer: str
    status: Status
    reason: str = ""
    timing: Timing | None = None
    peak_bytes: int | None = None  # beyond the inputs, the results included

    @property
    def gflops(self) -> float | None:
        """10**9 floating-point operations per second at the median."""
        return None if self.timing is None else self.case.flops(self.direction) / self.timing.p50_ms / 1e6


def measure(cases: Sequence[Case], peers: Sequence[Peer], device: str, seconds: float) -> Iterator[list[Row]]:
    """The rows of each case in turn, until `seconds` are used up; the cases after that say so and are not run."""
    end = time.monotonic() + seconds
    for index, case in enumerate(cases):
        left, after = end - time.monotonic(), len(cases) - index - 1
        if left <= 0:
            yield _not_run(case, peers, f"the time budget of {seconds:.0f} s was used up before it")
            continue
        # Half of a case's share goes to the clock; the other half to its inputs, its check and compilation.
        clock = min(left / (after + 1) / 2 / len(DIRECTIONS), _CLOCK_SECONDS)
        yield measure_case(case, peers, device, clock, setup_until=end - after * _CASE_SECONDS)


def measure_case(
    case: Case, peers: Sequence[Peer], device: str, seconds: float, setup_until: float = float("inf")
) -> list[Row]:
    """Both directions of one case.

    Args:
        seconds: for the clock, in each direction.
        setup_until: when, by time.monotonic(), the preparation of slow peers must be over.
    """
    x = make_inputs(case, device)
    try:
        gate = Gate(case, x)
    except torch.OutOfMemoryError:
        return _not_run(case, peers, "not checked, so not timed: the float64 definition does not fit in memory")
    rows: list[Row] = []
    for direction in DIRECTIONS:
        outcomes = {peer.name: admitted(peer, case, direction, x, gate, setup_until) for peer in peers}
        calls = {name: outcome for name, outcome in outcomes.items() if not isinstance(outcome, Row)}
        timings = interleaved(calls, device, seconds)
        for name, outcome in outcomes.items():
            if isinstance(outcome, Row):
                rows.append(outcome)
            else:
                rows.append(Row(case, direction, name, "ok", "", timings[name], memory.peak(outcome, device)))
    return rows


def admitted(
    peer: Peer, case: Case, direction: Direction, x: Inputs, gate: Gate, setup_until: float = float("inf")
) -> Call | Row:
    """The peer's call, run once and found right; or the row that says why there is none."""
    device = x.q.device.type
    reason = peer.refusal(case, direction, device)
    setup = peer.setup_seconds.get(device)
    if reason is None and setup is not None and time.monotonic() + setup > setup_until:
        reason = "no time was left to prepare it for this case"
    if reason is not None:
        return Row(case, direction, peer.name, "not run", reason)
    try:
        call = bound(peer, case, direction, x)
        problem = gate.problem(direction, call())
    except Exception as error:  # whatever a peer raises is its reason, shown in the table
        excused = not peer.ours or isinstance(error, UnsupportedError)
        return Row(case, direction, peer.name, "not run" if excused else "failed", _in_one_line(error))
    return call if problem is None else Row(case, direction, peer.name, "failed", problem)


def _not_run(case: Case, peers: Sequence[Peer], reason: str) -> list[Row]:
    return [Row(case, direction, peer.name, "not run", reason) for direction in DIRECTIONS for peer in peers]


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"[:240]
