"""Statements to the bytecode of core/: registers get places, operands are held to their types, opcodes to the registry.

Every instruction that the machine knows is registered under its full opcode, modifiers and all, by the modules of one
family each (`families`). An opcode that is not there is an error, and so is an operand of another kind, type or number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ptx.text import Address, Kernel, Name, Number, Operand, Pair, PtxError, Scope, Statement, Vector

# Special registers (PTX ISA, chapter 10), in the order of the core. A CTA has one dimension.
SPECIAL = (
    *("%tid.x", "%tid.y", "%tid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z"),
    *("%nctaid.x", "%nctaid.y", "%nctaid.z", "%ntid.x", "%laneid", "%warpid"),
)
SHARED_BASE = 1024  # where the shared memory of a CTA begins, as on the chips: address 0 is nobody's
PREDICATE = 1  # bits
_TARGET = 5  # its column in an instruction
_COUNTED = 31  # operands beyond these are not among those that the masks of registers tell of


class Argument(NamedTuple):
    """One operand as the core takes it: a place in the register file, or a number."""

    value: int
    register: bool = False  # a register of the text; a constant has a place, too, and a predicate another file
    written: bool = False


class Place(NamedTuple):
    """Where a register lies."""

    bits: int
    offset: int  # in words of the register file; of a predicate, in the file of predicates


@dataclass
class Code:
    """What the core runs."""

    kernel: Kernel
    instructions: list[list[int]] = field(default_factory=list)
    arguments: list[int] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)  # of each instruction
    words: int = 0  # of the register file
    predicates: int = 0
    constants: dict[tuple[int, int], int] = field(default_factory=dict)  # (value, bits): place
    parameter_addresses: dict[int, int] = field(default_factory=dict)  # offset in parameter space: place
    special: dict[str, int] = field(default_factory=dict)  # special registers that are read: place
    shared_bytes: int = 0  # of variables whose size the text says
    local_bytes: int = 0


Handler = Callable[["Instruction"], None]
HANDLERS: dict[str, Handler] = {}


def expand(pattern: str) -> set[str]:
    """The opcodes that a pattern stands for: (a|b) is one of them, [a] is a or nothing."""
    match = re.search(r"\(([^()\[\]]*)\)|\[([^()\[\]]*)\]", pattern)
    if not match:
        return {pattern}
    choices = ["", match[2]] if match[1] is None else match[1].split("|")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return {opcode for choice in choices for opcode in expand(before + choice + after)}


def instruction(*patterns: str) -> Callable[[Handler], Handler]:
    """Registers what assembles the opcodes of these patterns."""

    def register(handler: Handler) -> Handler:
        for opcode in (opcode for pattern in patterns for opcode in expand(pattern)):
            if opcode in HANDLERS:
                raise PtxError(f"{opcode} is registered twice")
            HANDLERS[opcode] = handler
        return handler

    return register


def rule(pattern: str, op: str, signature: str, sub: int = 0) -> None:
    """Registers opcodes that are one instruction of the core, with operands as they stand.

    signature: what each operand is: the bits of its register, or "p" of a predicate; "=" before those that are written;
    "f" before those whose constants are floats.
    """

    def handler(x: Instruction) -> None:
        kinds = signature.split()
        operands = x.take(len(kinds))
        x.emit(op, [x.resolve(operand, kind) for operand, kind in zip(operands, kinds, strict=True)], sub)

    instruction(pattern)(handler)


def assemble(kernel: Kernel, ops: Mapping[str, int]) -> Code:
    """ops: the core's instructions, by name."""
    assembler = Assembler(kernel, ops)
    for statement in kernel.statements:
        assembler.starts.append(len(assembler.code.instructions))
        try:
            handler = HANDLERS.get(statement.opcode)
            if handler is None:
                raise PtxError("unknown instruction or modifier")
            handler(Instruction(assembler, statement))
        except PtxError as error:
            raise PtxError(f"line {statement.line}: {statement.text[:160]}: {error}") from error
    last = kernel.statements[-1] if kernel.statements else None
    if last is None or last.guard or not last.opcode.startswith(("ret", "exit", "trap", "bra", "brx")):
        raise PtxError(f"{kernel.entry} runs past its end")
    for row, k in assembler.branches:
        row[k] = assembler.starts[row[k]]
    return assembler.code


class Assembler:
    """Places of registers, constants and variables."""

    def __init__(self, kernel: Kernel, ops: Mapping[str, int]) -> None:
        self.kernel, self.ops, self.code = kernel, ops, Code(kernel)
        self.places: dict[tuple[str, Scope], Place] = {}
        self.starts: list[int] = []  # the first instruction of each statement
        self.branches: list[tuple[list[int], int]] = []  # where a statement's number stands for its first instruction
        self.shared, self.code.shared_bytes = _laid_out(
            [(v.name, v.align, v.size) for v in sorted(kernel.shared, key=lambda v: v.size is None)], SHARED_BASE
        )
        local, self.code.local_bytes = _laid_out([(n, align, size) for n, (align, size) in kernel.local.items()], 0)
        parameters = {name: parameter.offset for name, parameter in kernel.parameters.items()}
        # By state space.
        self.variables = {"param": parameters, "shared": self.shared, "local": local, "global": {}}

    def register(self, name: str, scope: Scope) -> Place:
        """The place of a register, which is declared in the innermost scope that has its name."""
        declared, kind = self._declaration(name, scope)
        found = self.places.get((name, declared))
        if found is None:
            bits = PREDICATE if kind == "pred" else int(kind[1:])
            found = self.places[name, declared] = Place(bits, self.new_place(bits))
            if name in SPECIAL:
                self.code.special[name] = found.offset
        return found

    def _declaration(self, name: str, scope: Scope) -> tuple[Scope, str]:
        for depth in range(len(scope), -1, -1):
            if kind := self.kernel.kinds.get((name, scope[:depth])):
                return scope[:depth], kind
        if name in SPECIAL:
            return (), "u32"
        match = re.match(r"(%[a-zA-Z_]+)(\d+)$", name)
        if match and match[1] in self.kernel.ranges:
            kind, count = self.kernel.ranges[match[1]]
            if int(match[2]) < count:
                return (), kind
        raise PtxError(f"{name} is no register")

    def new_place(self, bits: int) -> int:
        """A place that nobody has: 32 lanes of it, of a word or two; of a predicate a word of bits."""
        if bits == PREDICATE:
            self.code.predicates += 1
            return self.code.predicates - 1
        lanes = 64 if bits == 64 else 32
        self.code.words += lanes
        return self.code.words - lanes

    def constant(self, value: int, bits: int) -> int:
        """The place of a constant, which every lane holds; integers wrap around to their type (4.5 "Constants")."""
        key = value & (1 << bits) - 1, bits
        if key not in self.code.constants:
            self.code.constants[key] = self.new_place(bits)
        return self.code.constants[key]

    def parameter_address(self, offset: int) -> int:
        """The place of a parameter's generic address, which a launch knows."""
        if offset not in self.code.parameter_addresses:
            self.code.parameter_addresses[offset] = self.new_place(64)
        return self.code.parameter_addresses[offset]

    def label(self, name: str, scope: Scope) -> int:
        """The number of the statement that a label stands before."""
        for depth in range(len(scope), -1, -1):
            found = self.kernel.labels.get((name, scope[:depth]), len(self.kernel.statements))
            if found < len(self.kernel.statements):
                return found
        raise PtxError(f"{name} is no label of a statement")


def _laid_out(variables: Iterable[tuple[str, int, int | None]], start: int) -> tuple[dict[str, int], int]:
    """The addresses of variables, one behind the other, and the bytes that they take."""
    places, end = {}, start
    for name, align, size in variables:
        end = -(-end // align) * align
        places[name] = end
        end += size or 0
    return places, end - start


class Instruction:
    """One statement while it is assembled."""

    def __init__(self, assembler: Assembler, statement: Statement) -> None:
        self.assembler, self.statement = assembler, statement
        self.operands = statement.operands
        self.modifiers = statement.opcode.split(".")[1:]

    def one_of(self, *names: str) -> str:
        """The modifier that is one of `names`. The registry knows that one is there."""
        return next(name for name in self.modifiers if name in names)

    def take(self, *counts: int) -> tuple[Operand, ...]:
        """All operands, whose number is one of `counts`."""
        if len(self.operands) not in counts:
            raise PtxError(f"{' or '.join(map(str, counts))} operands expected, found {len(self.operands)}")
        return self.operands

    # Operands to arguments

    def resolve(self, operand: Operand, kind: str) -> Argument:
        """An operand of a kind as `rule` names it."""
        written, kind = kind.startswith("="), kind.removeprefix("=")
        if kind == "p":
            return self.destination(operand, PREDICATE) if written else self.source(operand, PREDICATE)
        if kind.startswith("f") and isinstance(operand, Number) and operand.bits is None:
            raise PtxError(f"{operand.value} is no floating-point constant")
        bits = int(kind.removeprefix("f"))
        return self.destination(operand, bits) if written else self.source(operand, bits)

    def source(self, operand: Operand, bits: int) -> Argument:
        """A register, a constant or the address of a variable."""
        if isinstance(operand, Number):
            if operand.bits not in (None, bits):
                raise PtxError(f"a float of {operand.bits} bits, expected {bits}")
            return Argument(self.assembler.constant(operand.value, bits))
        if not isinstance(operand, Name):
            raise PtxError(f"{operand} is neither a register nor a constant")
        if operand.name in self.assembler.shared and bits > 16:
            return Argument(self.assembler.constant(self.assembler.shared[operand.name] + operand.offset, bits))
        return self._register(operand, bits)

    def destination(self, operand: Operand, bits: int) -> Argument:
        """A register that is written; "_" is one that nobody reads."""
        if operand == Name("_"):
            return Argument(self.assembler.new_place(bits))
        if not isinstance(operand, Name):
            raise PtxError(f"{operand} is no register")
        if operand.name in SPECIAL:
            raise PtxError(f"{operand.name} cannot be written")
        return self._register(operand, bits)._replace(written=bits != PREDICATE)

    def _register(self, operand: Name, bits: int) -> Argument:
        found = self.assembler.register(operand.name, self.statement.scope)
        if found.bits != bits or operand.offset:
            raise PtxError(f"{operand.name} has {found.bits} bits, expected {bits}")
        return Argument(found.offset, register=bits != PREDICATE)

    def bits_of(self, operand: Operand) -> int | None:
        """The bits of a register; None of what is none."""
        if not isinstance(operand, Name) or operand.name in self.assembler.shared or operand.name == "_":
            return None
        return self.assembler.register(operand.name, self.statement.scope).bits

    def vector(self, operand: Operand, *counts: int) -> tuple[Operand, ...]:
        """The elements of a vector operand, whose number is one of `counts`."""
        if not isinstance(operand, Vector) or len(operand.items) not in counts:
            raise PtxError(f"a vector of {' or '.join(map(str, counts))} expected, found {operand}")
        return operand.items

    def immediate(self, operand: Operand) -> int:
        """An operand that is a constant, by the instruction's definition."""
        if not isinstance(operand, Number) or operand.bits is not None:
            raise PtxError(f"{operand} is no integer constant")
        return operand.value

    def address(self, operand: Operand, space: str, wide: bool | None = None) -> tuple[list[Argument], bool]:
        """([register, offset], whether the register has 64 bits), in a state space.

        wide: whether it must have 64 bits; None: either will do.
        """
        if not isinstance(operand, Address) or operand.coordinates is not None:
            raise PtxError(f"{operand} is no address")
        base, assembler = operand.base, self.assembler
        if isinstance(base, Name) and (place := assembler.variables[space].get(base.name)) is not None:
            return [Argument(assembler.constant(place + operand.offset, 32)), Argument(0)], False
        if isinstance(base, Number):
            bits = 64 if space == "global" else 32
            return [Argument(assembler.constant(base.value + operand.offset, bits)), Argument(0)], bits == 64
        bits = assembler.register(base.name, self.statement.scope).bits
        if bits not in ((32, 64) if wide is None else (64,) if wide else (32,)):
            raise PtxError(f"{base.name} has {bits} bits and is no address in {space} memory")
        return [self._register(base, bits), Argument(operand.offset)], bits == 64

    def shared(self, operand: Operand) -> list[Argument]:
        """[register, offset] of a 32-bit address in shared memory."""
        return self.address(operand, "shared", wide=False)[0]

    def pair(self, operand: Operand) -> tuple[Operand, Operand | None]:
        """Both of d|p, or d and None."""
        return (operand.first, operand.second) if isinstance(operand, Pair) else (operand, None)

    # Bytecode

    def emit(self, op: str, arguments: list[Argument], sub: int = 0, target: int = 0, exempt: bool = False) -> None:
        """One instruction of the core.

        exempt: that it may touch registers which a wgmma in flight holds, as only a wgmma may.
        """
        code, assembler = self.assembler.code, self.assembler
        guard = 0
        if self.statement.guard:
            name, negated = self.statement.guard
            found = assembler.register(name, self.statement.scope)
            if found.bits != PREDICATE:
                raise PtxError(f"{name} is no predicate")
            guard = -(found.offset + 1) if negated else found.offset + 1
        counted = arguments[:_COUNTED]
        registers = sum(1 << k for k, argument in enumerate(counted) if argument.register)
        written = sum(1 << k for k, argument in enumerate(counted) if argument.written)
        start, line = len(code.arguments), self.statement.line
        head = [assembler.ops[op], sub, guard, len(arguments), start, target, line, int(exempt), registers, written]
        code.instructions.append(head)
        code.arguments += [argument.value for argument in arguments]
        code.statements.append(self.statement)

    def branch(self, op: str, labels: list[str], index: list[Argument]) -> None:
        """A jump to one of `labels`: the only one as its target, or by the index the one among its arguments."""
        statements = [self.assembler.label(name, self.statement.scope) for name in labels]
        code = self.assembler.code
        if index:
            self.emit(op, index + [Argument(statement) for statement in statements])
            places = range(len(code.arguments) - len(labels), len(code.arguments))
            self.assembler.branches += [(code.arguments, k) for k in places]
        else:
            self.emit(op, [], target=statements[0])
            self.assembler.branches.append((code.instructions[-1], _TARGET))
