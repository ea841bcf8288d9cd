"""The cases as a pytest-benchmark suite, to follow one machine over time: `pytest benchmarks --benchmark-only`.

On a GPU when there is one. `--benchmark-autosave` keeps a run, `--benchmark-compare` holds the next one against it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch

from .cases import CPU_CASES, DIRECTIONS, GPU_CASES, Case, Direction, Inputs, make_inputs
from .gate import Gate
from .peers import CPU_PEERS, GPU_PEERS, Peer
from .suite import Row, admitted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES, PEERS = (GPU_CASES, GPU_PEERS) if DEVICE == "cuda" else (CPU_CASES, CPU_PEERS)


@lru_cache(maxsize=1)
def _inputs_and_gate(case: Case) -> tuple[Inputs, Gate]:
    x = make_inputs(case, DEVICE)
    return x, Gate(case, x)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name.replace(" ", "-"))
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_attention(benchmark: Callable, case: Case, direction: Direction, peer: Peer) -> None:
    x, gate = _inputs_and_gate(case)
    outcome = admitted(peer, case, direction, x, gate)
    if isinstance(outcome, Row):
        (pytest.fail if outcome.status == "failed" else pytest.skip)(outcome.reason)
    benchmark.group = f"{case.id} {direction}"  # type: ignore[attr-defined]
    benchmark.extra_info["flops"] = case.flops(direction)  # type: ignore[attr-defined]
    benchmark.pedantic(_finished(outcome.call), rounds=10, warmup_rounds=1)  # type: ignore[attr-defined]


def _finished(call: Callable[[], object]) -> Callable[[], object]:
    """The call as pytest-benchmark's wall clock needs it: on a GPU, over only when the GPU is done."""
    if DEVICE == "cpu":
        return call

    def wait() -> None:
        call()
        torch.cuda.synchronize()

    return wait
