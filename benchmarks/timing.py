"""The clock: calls take turns, round by round, so that a slow moment of the machine falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, TypeVar

import torch

Call = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)

# Writing this much clears any GPU's L2; a few times over also keeps the GPU busy while the CPU queues the timed call,
# so that the time between the events is the GPU's own.
_FLUSH_BYTES, _FLUSHES = 256 << 20, 8


class Timing(NamedTuple):
    """Milliseconds of one call: median and the 20th and 80th percentile over `rounds`."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    rounds: int


def interleaved(
    calls: Mapping[Name, Call],
    device: str,
    seconds: float,
    repeats: int = 1,
    min_rounds: int = 5,
    max_rounds: int = 50,
) -> dict[Name, Timing]:
    """Times `calls` for about `seconds` in all, at least `min_rounds` rounds. They must have run once already.

    Args:
        repeats: calls in a row that make one sample, their mean: for calls that are near the clock's own resolution.
    """
    clock = _cuda_clock() if device == "cuda" else _wall_clock
    names = list(calls)
    timed = {name: call if repeats == 1 else _repeated(call, repeats) for name, call in calls.items()}
    samples: dict[Name, list[float]] = {name: [] for name in names}
    end = time.monotonic() + seconds
    done = 0
    while names and (done < min_rounds or (done < max_rounds and time.monotonic() < end)):
        first = done % len(names)  # whoever goes first differs, and so does each one's predecessor in the caches
        for name in names[first:] + names[:first]:
            samples[name].append(clock(timed[name]) / repeats)
        done += 1
    return {name: _timing(taken) for name, taken in samples.items()}


def _timing(samples: list[float]) -> Timing:
    p20, p50, p80 = torch.tensor(samples, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return Timing(p20.item(), p50.item(), p80.item(), len(samples))


def _repeated(call: Call, repeats: int) -> Call:
    def run() -> None:
        for _ in range(repeats):
            call()

    return run


def _wall_clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _cuda_clock() -> Callable[[Call], float]:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def clock(call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(_FLUSHES):
            flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return clock
