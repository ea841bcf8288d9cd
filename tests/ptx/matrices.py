"""Products of a warp's matrices (PTX ISA 9.7.14 "Warp Level Matrix Multiply-Accumulate Instructions").

mma.sync, ldmatrix and stmatrix, where each lane holds a fragment.
"""

from __future__ import annotations

from ptx.assembler import Argument, Instruction, instruction
from ptx.text import Number, Operand


@instruction("mma.sync.aligned.m16n8k16.row.col.f32.(bf16.bf16|f16.f16).f32")
def _mma(x: Instruction) -> None:
    x.emit("MMA", _fragments(x), sub=int(x.modifiers[6] == "f16"))


@instruction("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32")
def _mma_of_half_depth(x: Instruction) -> None:
    """The fragments of the first 8 columns of A, and rows of B, lie as those of m16n8k16 do; the others are 0 here."""
    d, a, b, c = x.take(4)
    zero = Number(0)
    sources = [*x.vector(a, 2), zero, zero, *x.vector(b, 1), zero, *x.vector(c, 4)]
    registers = [*(x.destination(register, 32) for register in x.vector(d, 4)), *(x.source(s, 32) for s in sources)]
    x.emit("MMA", registers, sub=1)


@instruction("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
def _mma_tf32(x: Instruction) -> None:
    x.emit("MMA_TF32", _fragments(x))


def _fragments(x: Instruction) -> list[Argument]:
    """d = a · b + c; the registers of the fragments of both shapes are as many."""
    d, a, b, c = x.take(4)
    sources = [*x.vector(a, 4), *x.vector(b, 2), *x.vector(c, 4)]
    return [*(x.destination(register, 32) for register in x.vector(d, 4)), *(x.source(s, 32) for s in sources)]


_FORMS = "matrix.sync.aligned.m8n8.(x1|x2|x4)[.trans].shared[::cta].b16"


@instruction("ld" + _FORMS)
def _load(x: Instruction) -> None:
    to, place = x.take(2)
    registers = [x.destination(register, 32) for register in _registers(x, to)]
    _emit(x, "LDMATRIX", place, registers)


@instruction("st" + _FORMS)
def _store(x: Instruction) -> None:
    place, source = x.take(2)
    _emit(x, "STMATRIX", place, [x.source(register, 32) for register in _registers(x, source)])


def _registers(x: Instruction, operand: Operand) -> tuple[Operand, ...]:
    return x.vector(operand, int(x.one_of("x1", "x2", "x4")[1:]))


def _emit(x: Instruction, op: str, place: Operand, registers: list[Argument]) -> None:
    address, wide = x.address(place, "shared")
    sub = len(registers) | ("trans" in x.modifiers) << 3 | wide << 4
    x.emit(op, [*address, *registers], sub)
