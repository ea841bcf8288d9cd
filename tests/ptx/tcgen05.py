"""Blackwell's tensor cores and their memory (PTX ISA 9.7.16 "TensorCore 5th Generation Family Instructions")."""

from __future__ import annotations

from ptx.assembler import PREDICATE, Argument, Instruction, instruction, rule
from ptx.text import Address, Operand

rule("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned", "NOP", "")  # one CTA runs at a time
rule("tcgen05.dealloc.cta_group::1.sync.aligned.b32", "T5_DEALLOC", "32 32")
rule("tcgen05.fence::before_thread_sync", "T5_FENCE_BEFORE", "")
rule("tcgen05.fence::after_thread_sync", "T5_FENCE_AFTER", "")
rule("tcgen05.wait::ld.sync.aligned", "T5_WAIT_LD", "")
rule("tcgen05.wait::st.sync.aligned", "T5_WAIT_ST", "")

_SHAPES = "(32x32b|16x32bx2).(x1|x2|x4|x8|x16|x32|x64|x128).b32"
_A_IN_TENSOR_MEMORY = 1


@instruction("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32")
def _allocate(x: Instruction) -> None:
    place, columns = x.take(2)
    x.emit("T5_ALLOC", [*x.shared(place), x.source(columns, 32)])


@instruction(f"tcgen05.ld.sync.aligned.{_SHAPES}")
def _load(x: Instruction) -> None:
    to, place, *split = x.take(2 + _is_split(x))
    registers = [x.destination(register, 32) for register in _registers(x, to)]
    _emit(x, "T5_LD", place, split, registers)


@instruction(f"tcgen05.st.sync.aligned.{_SHAPES}")
def _store(x: Instruction) -> None:
    place, *split, source = x.take(2 + _is_split(x))
    _emit(x, "T5_ST", place, split, [x.source(register, 32) for register in _registers(x, source)])


def _is_split(x: Instruction) -> bool:
    """Whether the warp's upper half takes other columns than its lower half, which one more operand names."""
    return "16x32bx2" in x.modifiers


def _registers(x: Instruction, operand: Operand) -> tuple[Operand, ...]:
    return x.vector(operand, int(x.modifiers[-2][1:]))


def _emit(x: Instruction, op: str, place: Operand, split: list[Operand], registers: list[Argument]) -> None:
    second = x.immediate(split[0]) << 16 if split else 0
    x.emit(op, [*_tensor_memory(x, place), *registers], len(registers) | _is_split(x) << 8 | second)


@instruction("tcgen05.mma.cta_group::1.kind::f16")
def _multiply(x: Instruction) -> None:
    """d = a · b + d, or a · b where the predicate enable-input-d is false."""
    d, a, b, description, accumulates = x.take(5)
    in_memory = isinstance(a, Address)
    of_a = _tensor_memory(x, a) if in_memory else [x.source(a, 64), Argument(0)]
    rest = [x.source(b, 64), x.source(description, 32), x.source(accumulates, PREDICATE)]
    x.emit("T5_MMA", [*_tensor_memory(x, d), *of_a, *rest], _A_IN_TENSOR_MEMORY if in_memory else 0)


@instruction("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64")
def _commit(x: Instruction) -> None:
    (barrier,) = x.take(1)
    x.emit("T5_COMMIT", x.shared(barrier))


@instruction("tcgen05.commit.cta_group::1.mbarrier::arrive::one.b64")
def _commit_generic(x: Instruction) -> None:
    """By a generic address, for which Triton 3.6 gives the one in shared memory with zeros before it."""
    (barrier,) = x.take(1)
    (wide, offset), _ = x.address(barrier, "global", wide=True)
    address = Argument(x.assembler.new_place(32))
    x.emit("CVT_U32_U64", [address, wide])
    x.emit("T5_COMMIT", [address, offset])


def _tensor_memory(x: Instruction, operand: Operand) -> list[Argument]:
    """[register, offset] of an address in tensor memory: a lane in the upper half, a column in the lower one."""
    return x.shared(operand)
