"""Atomic operations of the PTX machine, held against the manual (PTX ISA 9.0, 9.7.13: atom, red)."""

import numpy as np
import pytest
import torch
from ptx.program import Fault, Program
from ptx.small import kernel, run
from ptx.text import PtxError

LANES = range(32)
VALUES = [(t * 2654435761 + 12345) % (1 << 64) for t in LANES]


def signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> bits - 1 else value


OPERATIONS = {
    "add.u32": lambda a, b: a + b,
    "add.s32": lambda a, b: a + b,
    "add.u64": lambda a, b: a + b,
    "min.u32": min,
    "max.u32": max,
    "min.u64": min,
    "max.u64": max,
    "min.s32": lambda a, b: min(a, b, key=lambda v: signed(v, 32)),
    "max.s32": lambda a, b: max(a, b, key=lambda v: signed(v, 32)),
    "min.s64": lambda a, b: min(a, b, key=lambda v: signed(v, 64)),
    "max.s64": lambda a, b: max(a, b, key=lambda v: signed(v, 64)),
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "xor.b64": lambda a, b: a ^ b,
    "exch.b32": lambda a, b: b,
    "exch.b64": lambda a, b: b,
    "inc.u32": lambda a, b: 0 if a >= b else a + 1,
    "dec.u32": lambda a, b: b if a == 0 or a > b else a - 1,
}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_atomic_operation(operation, space):
    """atom gives what was there before and leaves the operation's result, one thread after another."""
    bits = int(operation[-2:])
    kind = {32: np.uint32, 64: np.uint64}[bits]
    values = np.array([v & (1 << bits) - 1 for v in VALUES], kind)
    if operation[:3] in ("inc", "dec"):
        values = np.full(32, 20, kind)
    register, size = {32: "r", 64: "d"}[bits], bits // 8
    place = "%a1" if space == "global" else "%r30"
    body = f"""
        mov.u32 %r30, dynamic;
        setp.eq.u32 %p1, %t, 0;
        ld.global.b{bits} %{register}9, [%a1];
        @%p1 st.shared.b{bits} [%r30], %{register}9;
        bar.sync 0;
        mad.wide.u32 %d20, %t, {size}, %a0;
        ld.global.b{bits} %{register}10, [%d20];
        atom.{space}.{operation} %{register}11, [{place}], %{register}10;
        mad.wide.u32 %d20, %t, {size}, %a2;
        st.global.b{bits} [%d20], %{register}11;
        bar.sync 0;
        @%p1 ld.{space}.b{bits} %{register}12, [{place}];
        @%p1 st.global.b{bits} [%a3], %{register}12;
    """
    start, before, result = np.array([7], kind), np.zeros(32, kind), np.zeros(1, kind)
    run(body, values, start, before, result, shared=8)
    apply, current = OPERATIONS[operation], 7
    for old, value in zip(before.tolist(), values.tolist(), strict=True):  # lanes take their turns in order
        assert old == current
        current = apply(current, value) & (1 << bits) - 1
    assert result.tolist() == [current]


def test_compare_and_swap():
    """atom.cas: stores c where b was found."""
    memory, before = np.zeros(1, np.uint32), np.zeros(32, np.uint32)
    body = """
        add.u32 %r1, %t, 1;
        atom.global.cas.b32 %r2, [%a0], %t, %r1;
        mad.wide.u32 %d0, %t, 4, %a1;
        st.global.b32 [%d0], %r2;
    """
    run(body, memory, before)
    assert memory.tolist() == [32]
    assert before.tolist() == list(LANES)


def test_sums_of_floats():
    memory = np.zeros(1, np.float32)
    run("cvt.rn.f32.u32 %r1, %t; red.global.add.f32 [%a0], %r1;", memory)
    assert memory.tolist() == [sum(LANES)]
    for name, kind in (("f16x2", torch.float16), ("bf16x2", torch.bfloat16)):
        two = torch.tensor([1.0, 2.0]).to(kind).view(torch.int32).item()
        memory = np.zeros(1, np.uint32)
        run(f"mov.b32 %r1, {two}; atom.global.add.noftz.{name} %r2, [%a0], %r1;", memory)
        assert torch.from_numpy(memory.view(np.int16)).view(kind).tolist() == [32, 64]


def test_ctas_add_without_a_race():
    memory = np.zeros(1, np.uint32)
    run("red.global.add.u32 [%a0], 1;", memory, grid=(5, 1, 1), threads=64)
    assert memory.tolist() == [320]
    with pytest.raises(Fault, match="race between CTAs"):
        run("red.global.add.u32 [%a0], 1; st.global.b32 [%a0], 0;", memory, grid=(5, 1, 1))


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("red.global.add.u32 [%a0+4], 1;", "out of bounds"),
        ("red.global.add.u32 [%a0+2], 1;", "misaligned|out of bounds"),
        ("atom.shared.add.u32 %r1, [dynamic], 1;", "never written"),
    ],
)
def test_atomics_used_wrongly_are_faults(body, fault):
    with pytest.raises(Fault, match=fault):
        run(body, np.zeros(1, np.uint32), shared=4)


@pytest.mark.parametrize(
    "wrong",
    [
        "atom.global.add.b32 %r1, [%a0], 1;",
        "atom.global.add.f16x2 %r1, [%a0], %r2;",
        "atom.global.cas.b32 %r1, [%a0], %r2;",
        "red.global.exch.b32 [%a0], %r2;",
        "atom.add.u32 %r1, [%a0], 1;",
        "atom.acquire.gpu.global.add.u32 %r1, [%a0], 1;",
    ],
)
def test_what_is_not_known_is_an_error(wrong):
    with pytest.raises(PtxError, match="line 14"):
        Program(kernel(wrong, 1))
