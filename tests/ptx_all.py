"""All that the PTX machine can run of pyattn, for hours: `pytest tests/ptx_all.py`. Not among what pytest finds itself.

The whole contract in every dtype on every chip, cached and paged decoding, random calls under random schedules, and
tensors whose offsets do not fit 32 bits.
"""

import random
import zlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from ptx.cases import CHOSEN, DTYPES, Row, whole
from ptx.contract import excesses, paged_excesses
from ptx.launch import pyattn_on
from ptx.program import Landing, Schedule
from test_kvcache import OPTIONS

from pyattn import testing
from pyattn.testing import Case

ROWS = [row for chip in CHOSEN for row in whole(chip)]
RANDOM_CALLS = 200  # on each chip


@pytest.mark.parametrize("truncate", [False, True], ids=["", "truncated sums"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_case_is_as_accurate_as_plain_pytorch_or_refused(row: Row, truncate: bool) -> None:
    with pyattn_on(row.chip):
        refused = testing.refusal(row.backend, row.case, row.dtype)
    if refused is None:
        assert excesses(row, schedule=Schedule(seed=zlib.crc32(row.id.encode()), truncate=truncate)) == []


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("m", "page_size"), [(0, 16), (1, None), (1, 16), (5, 7), (5, 64), (24, 16), (70, 1)])
@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100"])
def test_cache_is_as_accurate_as_plain_pytorch(chip, m, page_size, options, dtype) -> None:
    assert paged_excesses(chip, m, page_size, options, dtype) == []


def kinds(backend: str, r: random.Random, number: int) -> list[tuple[Case, torch.dtype]]:
    """Kinds of calls that compile to different kernels: few, while their sizes and schedules are many."""
    found = []
    for _ in range(number):
        d = r.choice([64, 64, 128, 32, 40])
        case = Case(
            "random", d=d, dv=r.choice([d, d, 24, 72]), causal=r.random() < 0.5, layout=r.choice(["bhmd", "bmhd"])
        )
        case = replace(case, window=r.choice([None, None, (1, 1), (1, None)]))
        if r.random() < 0.3:
            case = replace(case, packed=())
        elif r.random() < 0.5:
            case = replace(case, key_lengths=())
        if backend == "triton":
            case = replace(case, softcap=r.choice([None, None, 3.0]), alibi=r.random() < 0.2, sinks=r.random() < 0.3)
            case = replace(case, dropout_p=r.choice([0.0, 0.0, 0.3]))
            if case.packed is None:
                case = replace(case, segments=r.choice([0, 0, 3]), mask=r.choice([None, None, "bhmn", "b11n"]))
                case = replace(case, bias=r.choice([None, None, "1hmn"]))
        found.append((case, r.choice([torch.bfloat16, torch.float16])))
    return found


def instance(case: Case, r: random.Random) -> Case:
    """A call of a kind, with sizes around the ends of blocks."""

    def length() -> int:
        return r.choice([1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, r.randint(1, 400)])

    hk, n = r.choice([1, 2]), length()
    case = replace(case, b=r.choice([1, 1, 2]), hk=hk, h=hk * r.choice([1, 1, 2, 3]), m=length(), n=n)
    case = replace(case, unseen_nan=r.random() < 0.5, top_left=r.random() < 0.3 and case.packed is None)
    if case.window:
        sides = [None if side is None else r.choice([0, 1, 5, 64, 130, r.randint(0, 300)]) for side in case.window]
        case = replace(case, window=(sides[0], sides[1]))
    if case.packed is not None:
        pairs = [(r.choice([0, 1, length()]), r.choice([0, 1, length()])) for _ in range(r.randint(1, 5))]
        case = replace(case, packed=tuple(pairs))
    if case.key_lengths is not None:
        case = replace(case, key_lengths=tuple(r.randint(0, n) for _ in range(case.b)))
    return case


@pytest.mark.parametrize("chip", CHOSEN)
def test_random_calls_under_random_schedules(chip: str) -> None:
    backend, r = CHOSEN[chip][0], random.Random(0)
    of = kinds(backend, r, 8)
    for _ in range(RANDOM_CALLS):
        case, dtype = r.choice(of)
        row = Row(chip, backend, instance(case, r), dtype)
        landing, quantum = r.choice(list(Landing)), r.choice([1, 30, 400, 5000])
        schedule = Schedule(seed=r.randint(0, 1 << 30), landing=landing, quantum=quantum)
        try:
            assert excesses(row, schedule=schedule) == [], (row, schedule)
        except ValueError:  # a call that is refused
            continue


SIZES: dict[str, Any] = {"b": 2, "h": 2, "hk": 2, "m": 150, "n": 200, "d": 64, "dv": 64}
# (case, elements from one batch element, head and row to the next), in memory that is reserved and hardly touched
FAR = {
    "rows": (Case("far", **SIZES), (64, 128, (1 << 23) + 256)),
    "rows-causal": (Case("far", **SIZES, causal=True), (64, 128, (1 << 23) + 256)),
    "rows-just-below": (Case("far", **SIZES), (64, 128, (1 << 23) - 64)),
    "heads": (Case("far", **SIZES), (64, (1 << 31) + 64 * 1024, 128)),
    "batch": (Case("far", **SIZES, causal=True), ((1 << 31) + 64 * 1024, 64, 128)),
    "one-query": (Case("far", **SIZES | {"m": 1}), (64, 128, (1 << 23) + 256)),
}


def spread(t: torch.Tensor, strides: tuple[int, int, int]) -> torch.Tensor:
    """A copy with these strides."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, (*strides, 1), strict=True))
    return torch.empty(size, dtype=t.dtype).as_strided(t.shape, (*strides, 1)).copy_(t)


@pytest.mark.parametrize("which", ["q", "k", "v", "qkv"])
@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("chip", ["sm_80", "sm_90a"])
def test_offsets_beyond_32_bits(chip: str, far: str, which: str) -> None:
    case, strides = FAR[far]
    call = testing.make_inputs(case, torch.bfloat16)
    given = {name: spread(t, strides) if name in which else t for name, t in call.tensors.items()}
    with pyattn_on(chip):
        found = testing.evaluate_backend(call._replace(tensors=given), CHOSEN[chip][0])
    assert [r for r in testing.reference(call).compare(found) if not r.excess <= 1] == []
