"""Random calls over the whole contract, every instruction set, held against the definition by the tolerance rule.

`make test` draws the same few hundred every time; `pytest tests/test_fuzz.py --hypothesis-profile=long` draws 20,000.

Random calls find what no case in `testing.CASES` has: rows whose exact gradient cancels to nothing, in plain PyTorch
too, as that of an only key does under dropout or beside a sink.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import event, given, note
from hypothesis import strategies as st

from pyattn import registry, testing
from pyattn.backends import cpu
from pyattn.spec import dtype_name
from pyattn.testing import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Empty, one, and the places where a vector or a tile of 64 ends.
LENGTHS = st.one_of(st.integers(0, 9), st.sampled_from((15, 16, 17, 31, 33, 63, 64, 65, 66, 129)))
HEAD_SIZES = st.one_of(st.integers(1, 9), st.sampled_from((15, 16, 17, 31, 32, 33, 40, 64, 65)))
WINDOW_SIDES = st.one_of(st.none(), st.integers(0, 5), st.sampled_from((40, 64, 200)))

SCALES = st.one_of(st.floats(-2, -(2**-6), width=32), st.floats(2**-6, 2, width=32))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads would wait for one another longer than these calls take; test_cpu_threads.py is about them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def patterns() -> st.SearchStrategy[str]:
    """A shape that broadcasts to [b, h, m, n], as `Case` writes it."""
    return st.tuples(*(st.sampled_from(("1", name)) for name in "bhmn")).map("".join)


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype) -> Case:
    wide_bias = draw(st.booleans())
    # Equal weights round alike, and the rule counts independent roundings. Gradients of 16 bits are rounded more.
    zero = () if dtype is torch.float64 or wide_bias else (0.0,)
    hk = draw(st.integers(1, 3))
    options: dict[str, Any] = {
        "h": hk * draw(st.sampled_from((1, 1, 2, 3))),
        "hk": hk,
        "d": draw(HEAD_SIZES),
        "dv": draw(HEAD_SIZES),
        "causal": draw(st.booleans()),
        "window": draw(st.one_of(st.none(), st.tuples(WINDOW_SIDES, WINDOW_SIDES))),
        "scale": draw(st.one_of(st.none(), st.sampled_from((*zero, 1.0)), SCALES)),
        "softcap": draw(st.one_of(st.none(), st.floats(0.25, 30, width=32))),
        "alibi": draw(st.booleans()),
        "sinks": draw(st.booleans()),
        "dropout_p": draw(st.one_of(st.just(0.0), st.floats(0.05, 0.9))),
        "layout": draw(st.sampled_from(("bhmd", "bmhd", "expanded"))),
        "unseen_nan": draw(st.booleans()),
        "additive": draw(st.integers(0, 4)) == 0,
    }
    if draw(st.integers(0, 3)) == 0:
        return Case("fuzz", packed=tuple(draw(st.lists(st.tuples(LENGTHS, LENGTHS), max_size=4))), **options)
    b, n = draw(st.integers(0, 3)), draw(LENGTHS)
    if not options["additive"] and draw(st.integers(0, 3)) == 0:
        options |= {"relative": draw(HEAD_SIZES), "relative_shared": draw(st.booleans())}
    return Case(
        "fuzz", b=b, m=draw(LENGTHS), n=n,
        top_left=draw(st.booleans()),
        key_lengths=draw(st.one_of(st.none(), st.tuples(*[st.integers(0, n)] * b))),
        segments=draw(st.integers(0, 3)),
        ranks=draw(st.sampled_from((0, 0, 0, 1, 4))),
        row_windows=draw(st.sampled_from((None, None, None, 0, 10, 100))),
        mask=draw(st.one_of(st.none(), patterns())),
        bias=draw(st.one_of(st.none(), patterns())),
        wide_bias=wide_bias,
        **options,
    )  # fmt: skip


@given(st.sampled_from(DTYPES).flatmap(lambda dtype: st.tuples(st.just(dtype), cases(dtype))),
       st.sampled_from(cpu.isas()), st.integers(0, 2**31))  # fmt: skip
def test_fuzz_any_call_agrees_with_definition(call_of: tuple[torch.dtype, Case], isa: str, seed: int):
    dtype, case = call_of
    event(f"{isa} {dtype_name(dtype)}")
    event("packed" if case.packed is not None else "batch")
    call = testing.make_inputs(case, dtype, seed=seed)
    with mock.patch.dict(registry.BACKENDS, cpu=cpu.CpuBackend(isa)):
        actual = testing.evaluate_backend(call, "cpu")
    for result in testing.reference(call).compare(actual):
        note(str(result))
        assert result.excess <= 1, result
