"""PTX text to statements (PTX ISA, chapters 4 "Syntax", 5 "State Spaces, Types, and Variables" and 11 "Directives").

One kernel a text, as compilers of kernels write it. What is not understood is an error, never skipped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

Scope = tuple[int, ...]  # the numbers of the braces that something stands in, from the outermost one


class PtxError(Exception):
    """The text holds something that the machine does not know."""


class Name(NamedTuple):
    """A register, a variable, a label, or the address `offset` bytes behind a variable."""

    name: str
    offset: int = 0


class Number(NamedTuple):
    """An integer, or the bits of a float, which says how many it has."""

    value: int
    bits: int | None = None


class Vector(NamedTuple):
    """{a, b, ...}"""

    items: tuple[Operand, ...]


class Address(NamedTuple):
    """[base + offset], or [map, {coordinates}] of a tensor copy."""

    base: Name | Number
    offset: int
    coordinates: Vector | None = None


class Negated(NamedTuple):
    """!p"""

    name: Name


class Pair(NamedTuple):
    """first|second: two destinations."""

    first: Operand
    second: Operand


Operand = Name | Number | Vector | Address | Negated | Pair


class Guard(NamedTuple):
    """@register, or @!register."""

    register: str
    negated: bool


class Statement(NamedTuple):
    """One instruction."""

    line: int
    location: str  # the kernel's own source line, where the text says it
    guard: Guard | None
    opcode: str
    operands: tuple[Operand, ...]
    text: str
    scope: Scope


class Parameter(NamedTuple):
    """One parameter of the kernel, at its place in parameter space."""

    kind: str  # its type: "u32"; "b8" of an array
    offset: int
    size: int


class Shared(NamedTuple):
    """A variable in shared memory; of an extern one, the launch says how large it is."""

    name: str
    align: int
    size: int | None


@dataclass
class Kernel:
    """All that the text of a kernel says."""

    entry: str = ""
    threads: int = 0  # .reqntid
    registers: int = 0  # .maxnreg: that a thread has at the start
    parameters: dict[str, Parameter] = field(default_factory=dict)
    parameter_bytes: int = 0
    shared: list[Shared] = field(default_factory=list)
    local: dict[str, tuple[int, int]] = field(default_factory=dict)  # name: (align, size)
    kinds: dict[tuple[str, Scope], str] = field(default_factory=dict)  # of registers declared by name
    ranges: dict[str, tuple[str, int]] = field(default_factory=dict)  # of "%r<10>": {"%r": ("b32", 10)}
    statements: list[Statement] = field(default_factory=list)
    labels: dict[tuple[str, Scope], int] = field(default_factory=dict)  # the statement that follows
    tables: dict[tuple[str, Scope], tuple[str, ...]] = field(default_factory=dict)  # .branchtargets


SIZES = {f"{letter}{bits}": bits // 8 for letter in "busf" for bits in (8, 16, 32, 64) if f"{letter}{bits}" != "f8"}
_DEBUGGING = re.compile(r"\.(file|loc|pragma|section)\b")
_IGNORED_DIRECTIVES = re.compile(r"\.(version|target|address_size|global)\b")
_TUNING = ("maxntid", "minnctapersm")  # what only ptxas looks at
_FLOAT = re.compile(r"0[fF]([0-9a-fA-F]{8})$|0[dD]([0-9a-fA-F]{16})$")
_INTEGER = re.compile(r"(-?)(0[xX][0-9a-fA-F]+|0|[1-9]\d*)U?$")
_NAME = re.compile(r"[%$\w]+(\.[xyz])?$")
_POINTER = r"(?: \.ptr(?: \.\w+)?(?: \.align \d+)?)?"  # what a parameter points to
_PARAMETER = re.compile(rf"\.param(?: \.align (\d+))? \.(\w+){_POINTER} ([$\w]+)(?:\[(\d+)\])?$")
_LABEL = re.compile(r"([$\w]+):(?!:)\s*(?!\.branchtargets|\s)")
_TABLE = re.compile(r"([$\w]+):\s*\.branchtargets\s+(.*)$")
_INSTRUCTION = re.compile(r"(?:@(!?)([%$\w]+)\s+)?([a-z]\w*(?:(?:\.|::)\w+)*)(?:\s+(.*))?$")
_VARIABLE = re.compile(r"(?:\.extern )?\.(shared|local)\s+(?:\.align (\d+)\s+)?\.(\w+)\s+([$\w]+)(?:\[(\d*)\])?$")


def parse(text: str) -> Kernel:
    """The only kernel of a text."""
    kernel = Kernel()
    lines = text.split("\n")
    entries = [k for k, line in enumerate(lines) if re.match(r"\s*(\.visible\s+|\.weak\s+)?\.entry\b", line)]
    if len(entries) != 1 or re.search(r"^\s*(\.\w+\s+)*\.func\b", text, re.M):
        raise PtxError(f"one kernel and no functions expected, found {len(entries)} kernels")
    _parse_module(kernel, lines[: entries[0]])
    body = _parse_header(kernel, lines, entries[0])
    _Body(kernel).parse(lines, body)
    return kernel


def _parse_module(kernel: Kernel, lines: list[str]) -> None:
    for number, line in enumerate(lines, 1):
        line = line.split("//")[0].strip()
        if match := _VARIABLE.match(line.rstrip(";")):
            _declare(kernel, match)
        elif line and not _IGNORED_DIRECTIVES.match(line):
            raise PtxError(f"line {number}: {line}")


def _declare(kernel: Kernel, variable: re.Match[str]) -> None:
    space, align, kind, name, count = variable.groups()
    size = SIZES[kind]
    if space == "shared":
        kernel.shared.append(Shared(name, int(align or size), None if count == "" else size * int(count or 1)))
    else:
        kernel.local[name] = (int(align or size), size * int(count or 1))


def _parse_header(kernel: Kernel, lines: list[str], start: int) -> int:
    """Parameters and directives of the kernel; the line where its body opens."""
    body = next(k for k in range(start, len(lines)) if lines[k].lstrip().startswith("{"))
    head = " ".join(" ".join(line.split("//")[0] for line in lines[start:body]).split())
    match = re.match(r"(?:\.visible |\.weak )?\.entry ([$\w]+) ?(?:\((.*?)\))?(.*)$", head)
    if not match:
        raise PtxError(f"line {start + 1}: {head}")
    kernel.entry, parameters, rest = match.groups()
    for declaration in filter(None, (parameters or "").split(",")):
        _parse_parameter(kernel, declaration.strip())
    for directive in filter(None, (given.strip() for given in rest.split("."))):
        name, _, value = directive.partition(" ")
        if name == "reqntid":
            kernel.threads = int(value.split(",")[0])
        elif name == "maxnreg":
            kernel.registers = int(value)
        elif name not in _TUNING:
            raise PtxError(f"line {start + 1}: .{directive}")
    return body


def _parse_parameter(kernel: Kernel, declaration: str) -> None:
    match = _PARAMETER.match(declaration)
    if not match:
        raise PtxError(f"parameter {declaration}")
    align, kind, name, count = match.groups()
    size = SIZES[kind] * int(count or 1)
    step = int(align or SIZES[kind])
    offset = -(-kernel.parameter_bytes // step) * step
    kernel.parameters[name] = Parameter(kind, offset, size)
    kernel.parameter_bytes = offset + size


class _Body:
    """Statements up to the brace that closes the kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.scope: Scope = ()
        self.scopes = 0
        self.location = ""

    def parse(self, lines: list[str], start: int) -> None:
        waiting, first = "", 0  # a statement that goes on in the next line, and the line where it began
        for number in range(start, len(lines)):
            line = lines[number]
            stripped = line.lstrip()
            if stripped.startswith(".") and _DEBUGGING.match(stripped):
                if stripped.startswith(".loc") and "//" in line:
                    self.location = line.split("//", 1)[1].strip()
                continue
            rest = line.split("//", 1)[0].strip()
            while rest:
                if not waiting:
                    first = number + 1
                    rest, closed = self._opening(rest)
                    if closed:
                        return
                    if not rest:
                        break
                piece, ended, rest = rest.partition(";")
                waiting = f"{waiting} {piece}".strip()
                if ended:
                    self._statement(waiting, first)
                    waiting = ""
                rest = rest.strip()
        raise PtxError("the kernel is not closed")

    def _opening(self, rest: str) -> tuple[str, bool]:
        """What follows the braces and labels that a line begins with, and whether they close the kernel."""
        while rest:
            if rest[0] == "{":  # no instruction begins with a vector
                self.scopes += 1
                self.scope = (*self.scope, self.scopes)
                rest = rest[1:].strip()
            elif rest[0] == "}":
                self.scope = self.scope[:-1]
                rest = rest[1:].strip()
                if not self.scope:
                    return rest, True
            elif match := _LABEL.match(rest):
                self.kernel.labels[match[1], self.scope] = len(self.kernel.statements)
                rest = rest[match.end() :]
            else:
                break
        return rest, False

    def _statement(self, text: str, line: int) -> None:
        try:
            if match := _INSTRUCTION.match(text):
                negated, register, opcode, operands = match.groups()
                guard = Guard(register, bool(negated)) if register else None
                found = tuple(map(parse_operand, split(operands or "")))
                statement = Statement(line, self.location, guard, opcode, found, text, self.scope)
                self.kernel.statements.append(statement)
            elif text.startswith(".reg"):
                self._registers(text)
            elif match := _TABLE.match(text):
                self.kernel.tables[match[1], self.scope] = tuple(name.strip() for name in match[2].split(","))
            elif match := _VARIABLE.match(text):
                _declare(self.kernel, match)
            elif text:
                raise PtxError("neither a directive nor an instruction")
        except (PtxError, KeyError) as error:
            raise PtxError(f"line {line}: {text[:160]}: {error}") from error

    def _registers(self, text: str) -> None:
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text)
        if not match:
            raise PtxError("registers")
        kind = match[1]
        if kind != "pred" and SIZES[kind] < 2:
            raise PtxError(f"registers of type {kind}")
        for name in (given.strip() for given in match[2].split(",")):
            if found := re.match(r"(%\w+?)<(\d+)>$", name):
                self.kernel.ranges[found[1]] = (kind, int(found[2]))
            else:
                self.kernel.kinds[name, self.scope] = kind


def split(text: str) -> list[str]:
    """The parts between commas that stand outside braces and brackets."""
    if "{" not in text and "[" not in text:
        return [part.strip() for part in text.split(",")] if text.strip() else []
    parts, depth, start = [], 0, 0
    for k, letter in enumerate(text):
        if letter in "{[":
            depth += 1
        elif letter in "}]":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:k].strip())
            start = k + 1
    return [*parts, text[start:].strip()]


@lru_cache(1 << 16)  # the same registers come again and again
def parse_operand(text: str) -> Operand:
    """One operand of an instruction."""
    if text.startswith("{") and text.endswith("}"):
        return Vector(tuple(map(parse_operand, split(text[1:-1]))))
    if text.startswith("[") and text.endswith("]"):
        return _parse_address(text[1:-1].strip())
    if "|" in text:
        first, second = text.split("|")
        return Pair(parse_operand(first.strip()), parse_operand(second.strip()))
    if text.startswith("!") and _NAME.match(text[1:]):
        return Negated(Name(text[1:]))
    if (number := _parse_number(text)) is not None:
        return number
    if _NAME.match(text):
        return Name(text)
    if (match := re.match(r"([$\w]+)\s*\+\s*(\d+)$", text)) and not text[0].isdigit():
        return Name(match[1], int(match[2]))
    raise PtxError(f"operand {text}")


def _parse_number(text: str) -> Number | None:
    if match := _INTEGER.match(text):
        return Number(int(match[1] + match[2], 0))
    if match := _FLOAT.match(text):
        return Number(int(match[1] or match[2], 16), 32 if match[1] else 64)
    return None


def _parse_address(text: str) -> Address:
    parts = split(text)
    coordinates = parse_operand(parts[1]) if len(parts) == 2 else None
    match = re.match(r"([%$\w]+)\s*(?:\+\s*(-?\w+))?$", parts[0])
    if not match or len(parts) > 2 or not (coordinates is None or isinstance(coordinates, Vector)):
        raise PtxError(f"address [{text}]")
    base = parse_operand(match[1])
    if not isinstance(base, Name | Number):
        raise PtxError(f"address [{text}]")
    return Address(base, int(match[2] or "0", 0), coordinates)
