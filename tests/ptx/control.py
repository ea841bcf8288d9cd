"""Control flow, barriers, and what the lanes of a warp do together (PTX ISA 9.7.12 and 9.7.13).

Titles: 9.7.12 "Control Flow Instructions", 9.7.13 "Parallel Synchronization and Communication Instructions"; shfl.sync
is in 9.7.9, setmaxnreg in 9.7.19 "Miscellaneous Instructions".
"""

from __future__ import annotations

from ptx.assembler import PREDICATE, Argument, Instruction, instruction, rule
from ptx.text import Name, Negated, Operand, PtxError

rule("ret[.uni]", "RET", "")
rule("exit", "RET", "")
rule("trap", "TRAP", "")


@instruction("bra[.uni]")
def _branch(x: Instruction) -> None:
    (label,) = x.take(1)
    x.branch("BRA", [_name(label)], [])


@instruction("brx.idx[.uni]")
def _branch_by_index(x: Instruction) -> None:
    index, table = x.take(2)
    scope = x.statement.scope
    for depth in range(len(scope), -1, -1):
        if labels := x.assembler.kernel.tables.get((_name(table), scope[:depth])):
            return x.branch("BRX", list(labels), [x.source(index, 32)])
    raise PtxError(f"{table} is no table of labels")


def _name(operand: Operand) -> str:
    if not isinstance(operand, Name):
        raise PtxError(f"{operand} is no label")
    return operand.name


@instruction("bar[.cta].sync", "barrier[.cta].sync[.aligned]")
def _barrier(x: Instruction) -> None:
    operands = x.take(1, 2)
    x.emit("BAR_SYNC", [x.source(operand, 32) for operand in operands], sub=len(operands) - 1)


@instruction("bar[.cta].arrive", "barrier[.cta].arrive[.aligned]")
def _barrier_arrive(x: Instruction) -> None:
    x.emit("BAR_ARRIVE", [x.source(operand, 32) for operand in x.take(2)], sub=1)


@instruction("bar.warp.sync")
def _warp_barrier(x: Instruction) -> None:
    (members,) = x.take(1)
    x.emit("BAR_WARP", [x.source(members, 32)])


rule("fence.proxy.async[.shared::cta]", "FENCE_PROXY", "")


@instruction("shfl.sync.(up|down|bfly|idx).b32")
def _shuffle(x: Instruction) -> None:
    mode = ("up", "down", "bfly", "idx").index(x.modifiers[1])
    to, *rest = x.take(5)
    value, found = x.pair(to)
    arguments = [x.destination(value, 32), *(x.source(operand, 32) for operand in rest)]
    if found is not None:
        arguments.append(x.destination(found, PREDICATE))
    x.emit("SHFL", arguments, mode | (4 if found is not None else 0))


for _number, _names in enumerate(
    ("add.(s32|u32)", "min.s32", "max.s32", "min.u32", "max.u32", "and.b32", "or.b32", "xor.b32", "max.f32", "min.f32")
):
    rule(f"redux.sync.{_names}", "REDUX", "=32 32 32", _number)


@instruction("elect.sync")
def _elect(x: Instruction) -> None:
    leader, elected = x.pair(x.take(2)[0])
    if elected is None:
        raise PtxError("the elected lane's predicate is missing")
    place = Argument(-1) if leader == Name("_") else x.destination(leader, 32)
    x.emit("ELECT", [place, x.destination(elected, PREDICATE), x.source(x.operands[1], 32)])


@instruction("vote.sync.(all|any|uni).pred", "vote.sync.ballot.b32")
def _vote(x: Instruction) -> None:
    result, source, members = x.take(3)
    mode = ("all", "any", "uni", "ballot").index(x.modifiers[1])
    negated = isinstance(source, Negated)
    voted = x.source(source.name if isinstance(source, Negated) else source, PREDICATE)
    place = x.destination(result, 32 if x.modifiers[1] == "ballot" else PREDICATE)
    x.emit("VOTE", [place, voted, x.source(members, 32)], mode | negated << 2)


rule("activemask.b32", "ACTIVEMASK", "=32")


@instruction("setmaxnreg.(inc|dec).sync.aligned.u32")
def _registers(x: Instruction) -> None:
    (count,) = x.take(1)
    x.emit("SETMAXNREG", [], x.immediate(count), target=int("inc" in x.modifiers))
