"""Additive attention beside the same in torch, eager and compiled: `python -m benchmarks.additive`.

Attention by the scores weight . tanh(q_i + k_j): whole sentences, forward and with gradients, and a decoder's step.
pyattn is held against float64 before the clock runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import pyattn
from pyattn.testing import assert_as_accurate

from . import environment
from .chart import Panel, draw_panels
from .limit import Limit
from .memory import weighed
from .report import print_dim, table
from .subject import shown
from .timing import Timing, interleaved

OURS, BASELINE = "pyattn", "torch"
_ROUNDS = 5
_CHECKED_ROWS = 96  # of queries and of keys of one batch element: so many a float64 tensor of all sums has room for
# Multiply-adds that a pair's column takes, as the CPU's kernels compute it: 2 for a fraction, 9/4 to join four of them
# to one division, 1/4 to add it up. For gradients 2 again, 3 for a division that two share, and 5 for the slope and
# three sums. Divisions run beside them.
_FORWARD, _BACKWARD = 4.5, 4.5 + 10


class Case(NamedTuple):
    b: int
    m: int
    n: int
    a: int  # columns of q and k, and of v
    dtype: torch.dtype
    backward: bool

    @property
    def label(self) -> str:
        return f"b{self.b} {self.m} x {self.n} a{self.a}"

    @property
    def kind(self) -> str:
        what = "forward + backward" if self.backward else "decoder's step" if self.m == 1 else "forward"
        return f"{what}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def operations(self) -> float:
        """Of scores and of values, a multiply-add counted as two."""
        columns = (_FORWARD + 1 + (_BACKWARD + 3 if self.backward else 0)) * self.a
        return 2.0 * self.b * self.m * self.n * columns


CASES = tuple(
    Case(4, length, length, 256, dtype, backward)
    for dtype in (torch.float32, torch.bfloat16)
    for backward in (False, True)
    for length in (256, 512)
) + tuple(Case(32, 1, 64, 512, dtype, False) for dtype in (torch.float32, torch.bfloat16))
# Peak memory of these says how it grows; nobody else has room for the last.
GROWTH = tuple(Case(1, length, length, 64, torch.float32, True) for length in (512, 1024, 2048, 4096))


class Row(NamedTuple):
    case: Case
    peer: str
    timing: Timing
    peak_bytes: int | None

    def of_limit(self, limit: Limit | None) -> float | None:
        """The share of the machine's multiply-adds, on a CPU."""
        rate = None if limit is None else limit.gflops.get("float32")
        return self.case.operations / self.timing.p50_ms / 1e6 / rate if rate else None


def unfused(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    """As everybody writes it: a tensor [b, h, m, n, a] of sums."""
    scores = torch.tanh(q[:, :, :, None] + k[:, :, None]) @ weight[:, None, :, None]
    return torch.softmax(scores.squeeze(-1), -1) @ v


def peers(case: Case, k: Tensor) -> dict[str, Callable[..., Tensor]]:
    torch._dynamo.reset()
    ours: Callable[..., Tensor] = pyattn.additive_attention
    if case.m == 1:  # of a sentence's keys, once for all steps
        ours = partial(ours, exp_keys=torch.exp(2 * k.to(torch.float32)))
    return {OURS: ours, BASELINE: unfused, "torch.compile": torch.compile(unfused, dynamic=False)}


def make_inputs(case: Case, device: str) -> list[Tensor]:
    """q, k, v, weight and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    sizes = (
        *((case.b, 1, rows, case.a) for rows in (case.m, case.n, case.n)), (1, case.a), (case.b, 1, case.m, case.a),
    )  # fmt: skip
    tensors = [torch.randn(size, generator=generator) for size in sizes]
    tensors[3] /= case.a**0.5
    return [t.to(device, case.dtype) for t in tensors]


def run(attention: Callable[..., Tensor], tensors: Sequence[Tensor], backward: bool) -> tuple[Tensor, ...]:
    """out, and the gradients of q, k, v and weight where they are wanted."""
    *given, d_out = tensors
    if not backward:
        with torch.no_grad():
            return (attention(*given),)
    leaves = [t.detach().requires_grad_() for t in given]
    out = attention(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, d_out)


def check(case: Case, device: str) -> None:
    """Raises AssertionError unless the results of a part of the case are as exact as the contract asks."""
    q, k, v, weight, d_out = make_inputs(case, device)
    part = [t[:1, :, :_CHECKED_ROWS].contiguous() for t in (q, k, v)] + [weight, d_out[:1, :, :_CHECKED_ROWS]]
    attention = peers(case, part[1])[OURS]
    expected = run(unfused, [t.double() for t in part], case.backward)
    baseline, found = run(unfused, part, case.backward), run(attention, part, case.backward)
    eps = torch.finfo(torch.float32).eps
    names = ("out", "d_q", "d_k", "d_v", "d_weight")
    for name, mine, exact, theirs in zip(names, found, expected, baseline, strict=False):
        assert_as_accurate(mine, exact, theirs, eps * exact.abs().amax(), f"{case.label}: {name}")


def measure(case: Case, device: str, rounds: int) -> list[Row]:
    """A row per peer: pyattn checked, all weighed, and then timed in turns."""
    check(case, device)
    tensors = make_inputs(case, device)
    functions = peers(case, tensors[1])
    calls = {name: partial(run, function, tensors, case.backward) for name, function in functions.items()}
    for call in calls.values():
        call()
    peaks = {name: weighed(call, device)[1] for name, call in calls.items()}
    timings = interleaved(calls, device, 0.0, repeats=20 if case.m == 1 else 1, min_rounds=rounds)
    return [Row(case, name, t, peaks[name]) for name, t in timings.items()]


def ratio(rows: Sequence[Row], baseline: str = BASELINE) -> float:
    """How many times as fast pyattn is as the baseline, in one case."""
    times = {row.peer: row.timing.p50_ms for row in rows}
    return times[baseline] / times[OURS]


def publish(
    groups: Sequence[Sequence[Row]],
    growth: dict[str, int | None],
    limit: Limit | None,
    out: Path,
    device: str,
    console: Console,
) -> None:
    """Prints the tables, and writes additive.jsonl and additive.png into `out`."""
    about = environment.describe(device, Path(__file__).parent)
    out.mkdir(parents=True, exist_ok=True)
    figures, picture = out / "additive.jsonl", out / "additive.png"
    lines = [_record(row, limit) for rows in groups for row in rows] + [{"growth_bytes": growth}]
    figures.write_text("".join(f"{json.dumps(about | line)}\n" for line in lines))
    panels = [_panel(kind, found) for kind, found in _by_kind(groups).items()]
    sizes = [None if size is None else size / 1e6 for size in growth.values()]
    panels.append(Panel("Peak memory, forward + backward, a 64", "MB", list(growth), {OURS: sizes}, digits=1))
    draw_panels(picture, panels, environment.title(about, "Additive attention"))
    console.print(_table(groups, limit))
    if limit is not None:
        print_dim(str(limit), console)
    print_dim("of limit: the share of the machine's multiply-adds, as this form of the score takes them", console)
    peaks = ", ".join(f"{label} {shown(size, '.1f')} MB" for label, size in zip(growth, sizes, strict=True))
    console.print(f"peak memory of {OURS}, forward + backward, a 64: {peaks}", highlight=False)
    console.print(f"wrote {figures} and {picture}", highlight=False, soft_wrap=True)


def _by_kind(groups: Sequence[Sequence[Row]]) -> dict[str, list[Sequence[Row]]]:
    kinds: dict[str, list[Sequence[Row]]] = {}
    for rows in groups:
        kinds.setdefault(rows[0].case.kind, []).append(rows)
    return kinds


def _panel(kind: str, groups: Sequence[Sequence[Row]]) -> Panel:
    labels = [f"{rows[0].case.label}\n{ratio(rows):.1f} x {BASELINE}" for rows in groups]
    series: dict[str, list[float | None]] = {
        row.peer: [r.timing.p50_ms for rows in groups for r in rows if r.peer == row.peer] for row in groups[0]
    }
    return Panel(kind, "ms", labels, series, digits=1)


def _table(groups: Sequence[Sequence[Row]], limit: Limit | None) -> Table:
    others = [row.peer for row in groups[0] if row.peer != OURS]
    lines = []
    for rows in groups:
        cells = [
            f"{row.timing.p50_ms:.2f} {shown(None if row.peak_bytes is None else row.peak_bytes / 1e6, '6,.0f')}"
            for row in rows
        ]
        line = [f"{rows[0].case.label} {rows[0].case.kind}", *cells, *(f"{ratio(rows, name):.1f}" for name in others)]
        lines.append([*line, shown(rows[0].of_limit(limit), ".0%")])
    columns = ["case", *(row.peer for row in groups[0]), *(f"ratio to {name}" for name in others), "of limit"]
    return table("additive attention: ms, MB", columns, lines)


def _record(row: Row, limit: Limit | None) -> dict[str, object]:
    case = row.case._asdict() | {"dtype": str(row.case.dtype).removeprefix("torch."), "peer": row.peer}
    share = row.of_limit(limit) if row.peer == OURS else None
    return case | row.timing._asdict() | {"peak_bytes": row.peak_bytes, "of_limit": share}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m benchmarks.additive`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.additive", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/additive"), help="folder (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help="timed rounds of each case (default: %(default)s)")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    groups, limit = [], Limit(["float32"]) if device == "cpu" else None
    for case in track(CASES, "additive", console=console, transient=True, disable=not console.is_terminal):
        groups.append(measure(case, device, options.rounds))
        console.print(f"{case.label} {case.kind}: {ratio(groups[-1]):.1f} times {BASELINE}", highlight=False)
        if limit is not None:
            limit.measure()
        gc.collect()
    growth: dict[str, int | None] = {}
    for case in GROWTH:
        call = partial(run, pyattn.additive_attention, make_inputs(case, device), case.backward)
        call()
        growth[f"{case.m} x {case.n}"] = weighed(call, device)[1]
    publish(groups, growth, limit, options.out, device, console)


if __name__ == "__main__":
    main()
