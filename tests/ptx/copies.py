"""Asynchronous copies and the barriers in memory that tell of them.

PTX ISA 9.7.9.25 "Data Movement and Conversion Instructions: Asynchronous copy" (cp.async, cp.async.bulk.tensor) and
9.7.13.15 "Parallel Synchronization and Communication Instructions: mbarrier".
"""

from __future__ import annotations

from ptx.assembler import PREDICATE, Argument, Instruction, instruction, rule
from ptx.text import Address, Name, Operand, PtxError, Vector

_SIZES = {"ca": (4, 8, 16), "cg": (16,)}
_HAS_SOURCE_SIZE = 256
_COUNT_GIVEN, _NO_ARRIVAL = 1, 2

rule("cp.async.commit_group", "CPASYNC_COMMIT", "")
rule("cp.async.bulk.commit_group", "BULK_COMMIT", "")
rule("cp.async.wait_all", "CPASYNC_WAIT", "", sub=-1)


@instruction("cp.async.(ca|cg).shared[::cta].global")
def _copy(x: Instruction) -> None:
    """With a fourth operand, bytes from the source on, and zeros for the rest."""
    to, source, size, *rest = x.take(3, 4)
    count = x.immediate(size)
    if count not in _SIZES[x.modifiers[1]]:
        raise PtxError(f"a copy of {count} bytes")
    arguments = [*x.shared(to), *x.address(source, "global", wide=True)[0], *(x.source(given, 32) for given in rest)]
    x.emit("CPASYNC", arguments, count | (_HAS_SOURCE_SIZE if rest else 0))


@instruction("cp.async.wait_group", "cp.async.bulk.wait_group[.read]")
def _wait(x: Instruction) -> None:
    (pending,) = x.take(1)
    x.emit("BULK_WAIT" if "bulk" in x.modifiers else "CPASYNC_WAIT", [], x.immediate(pending))


@instruction("cp.async.bulk.tensor.(1|2|3|4|5)d.shared::(cta|cluster).global[.tile].mbarrier::complete_tx::bytes")
def _tensor_load(x: Instruction) -> None:
    to, source, barrier = x.take(3)
    tensor, coordinates = _tensor(x, source)
    x.emit("TMA_LD", [*x.shared(to), tensor, *coordinates, *x.shared(barrier)], len(coordinates))


@instruction("cp.async.bulk.tensor.(1|2|3|4|5)d.global.shared::cta[.tile].bulk_group")
def _tensor_store(x: Instruction) -> None:
    to, source = x.take(2)
    tensor, coordinates = _tensor(x, to)
    x.emit("TMA_ST", [tensor, *coordinates, *x.shared(source)], len(coordinates))


def _tensor(x: Instruction, operand: Operand) -> tuple[Argument, list[Argument]]:
    """The generic address of the map, and the coordinates, of the innermost dimension first."""
    if not isinstance(operand, Address) or not isinstance(operand.coordinates, Vector) or operand.offset:
        raise PtxError(f"{operand} is no place in a tensor")
    rank = int(x.modifiers[3][0])
    if not isinstance(operand.base, Name):
        raise PtxError(f"{operand.base} is no map")
    return x.source(operand.base, 64), [x.source(c, 32) for c in x.vector(operand.coordinates, rank)]


# mbarrier


@instruction("mbarrier.init.shared[::cta].b64")
def _init(x: Instruction) -> None:
    place, count = x.take(2)
    x.emit("MBAR_INIT", [*x.shared(place), x.source(count, 32)])


@instruction("mbarrier.inval.shared[::cta].b64")
def _inval(x: Instruction) -> None:
    (place,) = x.take(1)
    x.emit("MBAR_INVAL", x.shared(place))


@instruction("mbarrier.arrive[.release.cta].shared[::cta].b64")
def _arrive(x: Instruction) -> None:
    state, place, *count = x.take(2, 3)
    _no_state(state)
    x.emit("MBAR_ARRIVE", [*x.shared(place), *(x.source(n, 32) for n in count)], _COUNT_GIVEN if count else 0)


@instruction("mbarrier.arrive.expect_tx[.release.cta].shared[::cta].b64")
def _arrive_and_expect(x: Instruction) -> None:
    state, place, size = x.take(3)
    _no_state(state)
    x.emit("MBAR_EXPECT", [*x.shared(place), x.source(size, 32)], _COUNT_GIVEN)


@instruction("mbarrier.expect_tx[.relaxed.cta].shared[::cta].b64")
def _expect(x: Instruction) -> None:
    place, size = x.take(2)
    x.emit("MBAR_EXPECT", [*x.shared(place), x.source(size, 32)], _COUNT_GIVEN | _NO_ARRIVAL)


@instruction("mbarrier.try_wait.parity[.acquire.cta].shared[::cta].b64")
def _wait_for_phase(x: Instruction) -> None:
    """The machine waits until the phase is over: that the instruction may give up before is a matter of time."""
    done, place, parity = x.take(3)
    x.emit("MBAR_WAIT", [x.destination(done, PREDICATE), *x.shared(place), x.source(parity, 32)])


def _no_state(operand: Operand) -> None:
    if operand != Name("_"):
        raise PtxError(f"{operand}: the state that an arrival gives")
