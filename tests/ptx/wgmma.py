"""Products of a warpgroup's matrices on Hopper.

PTX ISA 9.7.15 "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".
"""

from __future__ import annotations

from ptx.assembler import PREDICATE, Instruction, instruction, rule
from ptx.text import Operand, PtxError, Vector

rule("wgmma.fence.sync.aligned", "WGMMA_FENCE", "")
rule("wgmma.commit_group.sync.aligned", "WGMMA_COMMIT", "")

_COLUMNS = "|".join(str(n) for n in range(8, 257, 8))


@instruction("wgmma.wait_group.sync.aligned")
def _wait(x: Instruction) -> None:
    (pending,) = x.take(1)
    x.emit("WGMMA_WAIT", [], x.immediate(pending))


@instruction(f"wgmma.mma_async.sync.aligned.m64n({_COLUMNS})k16.f32.(bf16.bf16|f16.f16)")
def _multiply(x: Instruction) -> None:
    """d = a · b + d, or a · b where scale-d is false. A is in registers or, by a descriptor, in shared memory."""
    columns = int(x.modifiers[3].removeprefix("m64n").removesuffix("k16"))
    in_registers = isinstance(x.operands[1], Vector) if len(x.operands) > 1 else False
    d, a, b, scale_d, *rest = x.take(7 if in_registers else 8)
    negate_a, negate_b = (_is(x, operand, 1, -1) for operand in rest[:2])
    transposed = [_is(x, operand, 0, 1) for operand in rest[2:]]
    transposed_a, transposed_b = transposed if not in_registers else (False, *transposed)
    accumulators = [x.destination(register, 32) for register in x.vector(d, columns // 2)]
    of_a = [x.source(register, 32) for register in x.vector(a, 4)] if in_registers else [x.source(a, 64)]
    sub = columns | (x.modifiers[-1] == "f16") << 9 | in_registers << 10 | transposed_a << 11 | transposed_b << 12
    sub |= negate_a << 13 | negate_b << 14
    # What it writes is told of by the core itself, when the product lands.
    arguments = [*(register._replace(written=False) for register in accumulators), *of_a, x.source(b, 64)]
    x.emit("WGMMA", [*arguments, x.source(scale_d, PREDICATE)], sub, exempt=True)


def _is(x: Instruction, operand: Operand, no: int, yes: int) -> bool:
    value = x.immediate(operand)
    if value not in (no, yes):
        raise PtxError(f"{value} where {no} or {yes} is meant")
    return value == yes
