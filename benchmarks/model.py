"""How fast the GPU kernels could be at best, without a GPU: `python -m benchmarks.model`.

Kernels are compiled for a chip and run instruction by instruction in the tests' machine (tests/ptx), which counts them.
A unit of a multiprocessor cannot do its share faster than so many a clock: the slowest unit bounds the kernel, as in
the roofline model (Williams, Waterman and Patterson 2009), with several roofs. These are BOUNDS, no measurements: they
know nothing of waiting, of what ptxas makes of the code, or of clocks that fall under load.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pyattn import testing
from pyattn.testing import Case

from .chart import Panel, draw_panels

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the machine is part of the tests, not of the package
from ptx.launch import Launch, pyattn_on
from ptx.program import Schedule
from ptx.text import Name, Number, Statement, Vector


class Chip(NamedTuple):
    """A GPU, and what one of its multiprocessors does in a clock.

    NVIDIA's whitepapers of A100, H100 and Blackwell, and the CUDA programming guide's table "Throughput of Native
    Arithmetic Instructions".
    """

    name: str
    target: str
    backend: str
    multiprocessors: int
    ghz: float  # at which the dense bfloat16 rate of the data sheet is reached
    tensor: int  # multiply-adds of 16-bit floats
    float32: int  # lanes
    bandwidth: float  # GB/s of memory
    special: int = 16  # lanes
    issued: int = 4  # instructions of warps
    transactions: int = 1  # of shared memory, 128 bytes each


CHIPS = (
    Chip("A100", "sm_80", "triton", 108, 1.41, 1024, 64, 2039),
    Chip("H100 SXM", "sm_90", "hopper", 132, 1.83, 2048, 128, 3350),
    Chip("B200", "sm_100", "triton", 148, 1.85, 4096, 128, 8000),
)
# The highest TFLOP/s that papers give in their abstracts for others' forward kernels.
PUBLISHED = {
    "A100": ("FlashAttention-2, arXiv:2307.08691", 0.73 * 312),  # 73 % of the peak
    "H100 SXM": ("FlashAttention-3, arXiv:2407.08608", 740.0),
}
LENGTH = 2048  # queries and keys that are counted; of longer ones a smaller part is prologues and masked blocks
# Products of [m, n, d] that a kernel cannot do without: scores, and what is made of them.
_PRODUCTS = {"fwd": 2, "dq": 3, "dkdv": 4}
_NOT_ISSUED = re.compile(r"mov|ld\.param|cvta|ret|nop")  # what ptxas folds into others, for the most part


class Bound(NamedTuple):
    """One kernel on one chip: the cycles that each unit takes, of one multiprocessor that does everything."""

    chip: Chip
    kernel: str  # a key of _PRODUCTS
    case: Case
    cycles: dict[str, float]
    spent: float  # multiply-adds of the tensor cores that were of use, as a part of all

    @property
    def slowest(self) -> str:
        return max(self.cycles, key=self.cycles.__getitem__)

    @property
    def busy(self) -> float:
        """The part of the time that the tensor cores can be busy at most."""
        return self.cycles["tensor cores"] / max(self.cycles.values())

    @property
    def seconds(self) -> float:
        return max(self.cycles.values()) / self.chip.multiprocessors / self.chip.ghz / 1e9


def scores(case: Case) -> int:
    """Those that are looked at."""
    pairs = case.m * (case.m + 1) // 2 if case.causal else case.m * case.n
    return case.b * case.h * pairs


def bounds(chip: Chip, case: Case) -> list[Bound]:
    """Of the kernels that a forward and a backward of the case launch."""
    call = testing.make_inputs(case, torch.bfloat16)
    with pyattn_on(chip.target, schedule=Schedule(count=True)) as device:
        testing.evaluate_backend(call, chip.backend)
    return [bound for launch in device.launches for bound in _bound(chip, case, launch)]


def _bound(chip: Chip, case: Case, launch: Launch) -> Iterator[Bound]:
    name = next((name for name in _PRODUCTS if re.search(rf"_{name}_|_{name}\b", launch.kernel)), None)
    if name is None or launch.counts is None:
        return
    counted: dict[str, float] = defaultdict(float)
    constants = _constants(launch.program.code.statements)
    for statement, executed, transactions in zip(
        launch.program.code.statements, launch.counts.executed, launch.counts.transactions, strict=True
    ):
        for unit, amount in _work(statement, int(executed), int(transactions), constants).items():
            counted[unit] += amount
    rates = {
        "tensor cores": chip.tensor, "instructions": chip.issued, "float32": chip.float32 / 32,
        "special functions": chip.special / 32, "shared memory": chip.transactions,
    }  # fmt: skip
    cycles = {unit: counted[unit] / rate for unit, rate in rates.items()}
    moved = 2.0 * case.b * case.h * (case.m + case.n) * case.d * {"fwd": 2, "dq": 3, "dkdv": 3}[name]
    cycles["memory"] = moved / chip.bandwidth * chip.ghz * chip.multiprocessors
    useful = _PRODUCTS[name] * scores(case) * case.d
    yield Bound(chip, name, case, cycles, useful / max(counted["tensor cores"], 1))


def _work(statement: Statement, executed: int, transactions: int, constants: dict[str, int]) -> dict[str, float]:
    """What the warps that ran an instruction ask of each unit."""
    opcode = statement.opcode
    found: dict[str, float] = {"instructions": 0 if _NOT_ISSUED.match(opcode) else executed}
    if shape := re.match(r"mma\.sync\.aligned\.m(\d+)n(\d+)k(\d+)", opcode):
        found["tensor cores"] = executed * int(shape[1]) * int(shape[2]) * int(shape[3])
    elif shape := re.match(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)", opcode):
        found["tensor cores"] = executed * 16 * int(shape[1]) * int(shape[2])  # a warp's quarter of the rows
        # B's 16 x n numbers, and A's 64 x 16 unless they are in registers, are read once by four warps.
        read = int(shape[1]) * 16 + (0 if isinstance(statement.operands[1], Vector) else 64 * 16)
        found["shared memory"] = executed / 4 * read * 2 / 128
    elif opcode.startswith("tcgen05.mma"):
        columns, rows = _tcgen05_shape(statement, constants)
        found["tensor cores"] = executed * rows * columns * 16
    elif re.match(r"(ex2|lg2|rcp|rsqrt|sqrt|tanh)\.", opcode):
        found["special functions"] = executed
    elif re.match(r"(add|sub|mul|fma|min|max|neg|abs)\.(\w+\.)*f32", opcode):
        found["float32"] = executed * (2 if opcode.endswith("f32x2") else 1)
    elif re.match(r"(ld|st)(matrix)?\.(\w+\.)*(shared|m8n8)", opcode) or "ldmatrix" in opcode:
        found["shared memory"] = transactions
    return found


def _constants(statements: Sequence[Statement]) -> dict[str, int]:
    """Registers that hold a constant."""
    found = {}
    for statement in statements:
        if statement.opcode.startswith("mov.") and isinstance(statement.operands[1], Number):
            to = statement.operands[0]
            if isinstance(to, Name):
                found[to.name] = statement.operands[1].value
    return found


def _tcgen05_shape(statement: Statement, constants: dict[str, int]) -> tuple[int, int]:
    """(columns, rows) by the instruction descriptor (PTX ISA, "Instruction descriptor" of tcgen05)."""
    given: Any = statement.operands[3]
    descriptor = given.value if isinstance(given, Number) else constants[given.name]
    return (descriptor >> 17 & 63) * 8, (descriptor >> 24 & 31) * 16


def speeds(found: Sequence[Bound]) -> dict[str, float]:
    """TFLOP/s that the bounds of one case allow, by direction: 4 m n d forward, 2.5 times that backward."""
    time = {bound.kernel: bound.seconds for bound in found}
    work = 4.0 * scores(found[0].case) * found[0].case.d
    return {"forward": work / time["fwd"] / 1e12, "backward": 2.5 * work / (time["dq"] + time["dkdv"]) / 1e12}


def publish(groups: Sequence[Sequence[Bound]], out: Path, console: Console) -> None:
    """Prints the table, and draws the speeds beside published ones."""
    table = Table(
        "chip", "head size", "kernel", "slowest unit", "tensor cores busy", "of use", title="bounds, bfloat16"
    )
    units = list(groups[0][0].cycles)
    for unit in units:
        table.add_column(unit, justify="right")
    for group in groups:
        for b in group:
            most = max(b.cycles.values())
            size = f"{b.case.d}{' causal' if b.case.causal else ''}"
            shares = [f"{b.cycles[unit] / most:.0%}" for unit in units]
            table.add_row(b.chip.name, size, b.kernel, b.slowest, f"{b.busy:.0%}", f"{b.spent:.0%}", *shares)
    console.print(table)
    panels = []
    for chip in dict.fromkeys(group[0].chip for group in groups):
        own = [group for group in groups if group[0].chip == chip]
        for direction in ("forward", "backward"):
            labels = [f"d {group[0].case.d}{' causal' if group[0].case.causal else ''}" for group in own]
            heights: list[float | None] = [speeds(group)[direction] for group in own]
            line = PUBLISHED.get(chip.name) if direction == "forward" else None
            panels.append(Panel(f"{chip.name}, {direction}", "TFLOP/s", labels, {"pyattn, bound": heights}, line))
    out.mkdir(parents=True, exist_ok=True)
    draw_panels(out / "model.png", panels, "Bounds by counted instructions, no measurements")
    console.print(f"wrote {out / 'model.png'}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/model"), help="folder (default: %(default)s)")
    parser.add_argument("--chips", nargs="+", default=[chip.name for chip in CHIPS], help="names (default: all)")
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 128], help="head sizes (default: 64 128)")
    options = parser.parse_args(arguments)
    chosen = [
        (chip, Case("model", b=1, h=1, hk=1, m=LENGTH, n=LENGTH, d=d, dv=d, causal=causal, layout="bmhd"))
        for chip in CHIPS
        if chip.name in options.chips
        for d in options.sizes
        for causal in (False, True)
    ]
    console = Console(width=None if sys.stdout.isatty() else 160)
    groups = [bounds(*given) for given in track(chosen, "counting", console=console, transient=True)]
    publish(groups, options.out, console)


if __name__ == "__main__":
    main()
