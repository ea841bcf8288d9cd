"""Atomic operations on memory (PTX ISA 9.7.13 "Parallel Synchronization and Communication Instructions": atom, red)."""

from __future__ import annotations

from ptx.assembler import Argument, Instruction, instruction
from ptx.text import Operand

_OPERATIONS = ("add", "min", "max", "cas", "exch", "and", "or", "xor", "inc", "dec")
_TYPES = {"u32": 0, "b32": 0, "s32": 1, "u64": 2, "b64": 2, "s64": 3, "f32": 4, "f16x2": 5, "bf16x2": 6}
_WITHOUT_RESULT = 1 << 11

_PLACE = "[.relaxed][.(cta|gpu)].(global|shared[::cta])"
_REDUCTIONS = (
    "add.(u32|s32|u64|f32)",
    "add.noftz.(f16x2|bf16x2)",
    "(min|max).(u32|s32|u64|s64)",
    "(and|or|xor).(b32|b64)",
    "(inc|dec).u32",
)


@instruction(*(f"atom{_PLACE}.{form}" for form in (*_REDUCTIONS, "(cas|exch).(b32|b64)")))
def _atomic(x: Instruction) -> None:
    result, place, *values = x.take(4 if "cas" in x.modifiers else 3)
    _emit(x, place, values, [x.destination(result, _bits(x))], 0)


@instruction(*(f"red{_PLACE}.{form}" for form in _REDUCTIONS))
def _reduction(x: Instruction) -> None:
    place, value = x.take(2)
    _emit(x, place, [value], [], _WITHOUT_RESULT)


def _bits(x: Instruction) -> int:
    return 64 if x.modifiers[-1].endswith("64") else 32


def _emit(x: Instruction, place: Operand, values: list[Operand], result: list[Argument], sub: int) -> None:
    space = "global" if "global" in x.modifiers else "shared"
    address, wide = x.address(place, space)
    sub |= int(space == "shared") | wide << 10
    sub |= _OPERATIONS.index(x.one_of(*_OPERATIONS)) << 2 | _TYPES[x.modifiers[-1]] << 6
    x.emit("ATOM", [*address, *result, *(x.source(value, _bits(x)) for value in values)], sub)
