"""Loads and stores (PTX ISA 9.7.9 "Data Movement and Conversion Instructions": ld, st)."""

from __future__ import annotations

from ptx.assembler import Instruction, instruction
from ptx.text import Operand, PtxError, Vector

_SPACES = {"global": 0, "shared": 1, "param": 2, "local": 3}
_KINDS = "(b|s|u)(8|16|32|64)"


@instruction(
    f"ld.(global|shared[::cta]|param|local)[.(v2|v4)].{_KINDS}",
    "ld.(global|shared[::cta]|param|local)[.(v2|v4)].(f32|f64)",
)
def _load(x: Instruction) -> None:
    to, place = x.take(2)
    space, kind, count = _form(x)
    bits, signed = int(kind[1:]), kind[0] == "s"
    values = _values(x, to, count)
    register = _register_bits(x, values, bits)
    fills = signed and register == 64 != bits
    if fills and bits != 32:
        raise PtxError(f"a sign of {bits} bits that fills 64")
    address, wide = x.address(place, space)
    destinations = [x.destination(value, register) for value in values]
    sub = _sub(space, bits, count, wide) | (signed and not fills) << 8 | (register == 64 != bits) << 10
    x.emit("LD", [*address, *destinations], sub)
    for register_ in destinations if fills else ():
        x.emit("SEXT64", [register_, register_])
    if signed and bits < register == 16:  # the core's sign fills the word
        for register_ in destinations:
            x.emit("CVT_U16_U32", [register_, register_])


@instruction(
    f"st.(global|shared[::cta]|local)[.(v2|v4)].{_KINDS}",
    "st.(global|shared[::cta]|local)[.(v2|v4)].(f32|f64)",
)
def _store(x: Instruction) -> None:
    place, source = x.take(2)
    space, kind, count = _form(x)
    bits = int(kind[1:])
    values = _values(x, source, count)
    address, wide = x.address(place, space)
    register = _register_bits(x, values, bits)
    if register == 64 != bits:
        raise PtxError("a part of a register of 64 bits")
    x.emit("ST", [*address, *(x.source(value, register) for value in values)], _sub(space, bits, count, wide))


def _form(x: Instruction) -> tuple[str, str, int]:
    """State space, type and number of elements."""
    count = next((int(name[1:]) for name in x.modifiers if name in ("v2", "v4")), 1)
    return x.modifiers[0].removesuffix("::cta"), x.modifiers[-1], count


def _values(x: Instruction, operand: Operand, count: int) -> tuple[Operand, ...]:
    return x.vector(operand, count) if count > 1 or isinstance(operand, Vector) else (operand,)


def _register_bits(x: Instruction, values: tuple[Operand, ...], bits: int) -> int:
    """Of the registers that hold the values: they may be wider than the type (9.4.1)."""
    found = {found for value in values if (found := x.bits_of(value))} or {max(bits, 16)}
    if len(found) > 1 or min(found) < bits:
        raise PtxError(f"registers of {sorted(found)} bits hold values of {bits}")
    return found.pop()


def _sub(space: str, bits: int, count: int, wide: bool) -> int:
    return _SPACES[space] | (bits // 8).bit_length() - 1 << 2 | count << 4 | wide << 9


def granule(instructions: list[list[int]], load: int, store: int) -> int:
    """The smallest access of shared memory, in bytes, but at most a word: what the core keeps a record of."""
    shared = (row[1] for row in instructions if row[0] in (load, store) and row[1] & 3 == _SPACES["shared"])
    return min([4, *(1 << (sub >> 2 & 3) for sub in shared)])
