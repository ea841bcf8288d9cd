"""One case after another: check, time, weigh. Every way to run the benchmark goes through here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from pyattn.check import UnsupportedError

from . import memory
from .cases import DIRECTIONS, Case, Direction, Inputs, make_inputs
from .gate import Gate
from .peers import Peer, bound
from .timing import Timing, interleaved

# What a case takes in all when its peers need no preparation.
_CASE_SECONDS = 4.0
# A call that takes longer is weighed as it is checked instead of once more, unless its peer has only just been loaded.
_LONG_MS = 500.0

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
    threads: int | None = None  # None is as many as torch uses

    @property
    def gflops(self) -> float | None:
        """10**9 floating-point operations per second at the median."""
        return None if self.timing is None else self.case.flops(self.direction) / self.timing.p50_ms / 1e6


class Admitted(NamedTuple):
    """A call that was run once and found right, with the peak memory of that run."""

    call: Call
    peak_bytes: int | None


@dataclass(frozen=True)
class Effort:
    """What is measured of a case, and how hard.

    Args:
        directions: each is checked and timed on its own.
        clock_seconds: what the clock gets per direction at most, beyond `min_rounds`.
        min_rounds: every call is timed at least so often.
        repeats: calls in a row that make one sample.
    """

    directions: tuple[Direction, ...] = DIRECTIONS
    clock_seconds: float = 1.0
    min_rounds: int = 5
    repeats: int = 1


def measure(
    groups: Sequence[Sequence[Case]], peers: Sequence[Peer], device: str, seconds: float, effort: Effort = Effort()
) -> Iterator[list[Row]]:
    """The rows of each group in turn, until `seconds` are used up; the groups after that say so and are not run.

    The cases of one group are timed side by side.
    """
    end = time.monotonic() + seconds
    loaded: set[tuple[Peer, Direction]] = set()
    for index, cases in enumerate(groups):
        left, after = end - time.monotonic(), len(groups) - index - 1
        if left <= 0:
            yield _not_run(cases, peers, effort, f"the time budget of {seconds:.0f} s was used up before it")
            continue
        # Half of a group's share goes to the clock; the other half to its inputs, its check and compilation.
        clock = min(left / (after + 1) / 2 / len(effort.directions), effort.clock_seconds)
        try:
            rows = measure_group(cases, peers, device, clock, effort, end - after * _CASE_SECONDS, loaded)
        except RuntimeError as error:  # a GPU's error outlives its call; what was measured must still be shown
            rows = _not_run(cases, peers, effort, in_one_line(error))
        yield rows


def measure_group(
    cases: Sequence[Case],
    peers: Sequence[Peer],
    device: str,
    seconds: float,
    effort: Effort = Effort(),
    setup_until: float = float("inf"),
    loaded: set[tuple[Peer, Direction]] | None = None,
) -> list[Row]:
    """Every direction of some cases, which take turns with one another.

    Args:
        seconds: for the clock, in each direction.
        setup_until: when, by time.monotonic(), the preparation of slow peers must be over.
        loaded: who has run before, and which way; added to.
    """
    loaded = set() if loaded is None else loaded
    inputs = {case: make_inputs(case, device) for case in cases}
    try:
        gates = {case: Gate(case, inputs[case], effort.directions) for case in cases}
    except torch.OutOfMemoryError:
        reason = "not checked, so not timed: the float64 definition does not fit in memory"
        return _not_run(cases, peers, effort, reason)
    rows: list[Row] = []
    for direction in effort.directions:
        with torch.set_grad_enabled(direction != "forward"):
            outcomes = {
                (case, peer): admitted(peer, case, direction, inputs[case], gates[case], setup_until)
                for case in cases
                for peer in peers
            }
            calls = {key: outcome.call for key, outcome in outcomes.items() if not isinstance(outcome, Row)}
            timings = interleaved(calls, device, seconds, effort.repeats, effort.min_rounds)
            for (case, peer), outcome in outcomes.items():
                if isinstance(outcome, Row):
                    rows.append(outcome)
                    continue
                timing = timings[case, peer]
                weighed = (peer, direction) in loaded and timing.p50_ms > _LONG_MS
                peak = outcome.peak_bytes if weighed else memory.weighed(outcome.call, device)[1]
                loaded.add((peer, direction))
                rows.append(Row(case, direction, peer.name, "ok", "", timing, peak, peer.threads))
    return rows


def admitted(
    peer: Peer, case: Case, direction: Direction, x: Inputs, gate: Gate, setup_until: float = float("inf")
) -> Admitted | Row:
    """The peer's call, or the row that says why there is none."""
    device = x.q.device.type
    reason = peer.refusal(case, direction, device)
    setup = peer.setup_seconds.get(device)
    if reason is None and setup is not None and time.monotonic() + setup > setup_until:
        reason = "no time was left to prepare it for this case"
    if reason is not None:
        return Row(case, direction, peer.name, "not run", reason)
    try:
        call = bound(peer, case, direction, x)
        results, peak = memory.weighed(call, device)
        problem = gate.problem(direction, results, peer.comparable(case))
    except Exception as error:  # whatever a peer raises is its reason, shown in the table
        excused = not peer.ours or isinstance(error, UnsupportedError)
        return Row(case, direction, peer.name, "not run" if excused else "failed", in_one_line(error))
    return Admitted(call, peak) if problem is None else Row(case, direction, peer.name, "failed", problem)


def _not_run(cases: Sequence[Case], peers: Sequence[Peer], effort: Effort, reason: str) -> list[Row]:
    return [
        Row(case, direction, peer.name, "not run", reason)
        for direction in effort.directions
        for case in cases
        for peer in peers
    ]


def in_one_line(error: Exception) -> str:
    """Its type and text, cut short."""
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"[:240]
