"""Relative attention beside transformers' XLNet and plain attention: `python -m benchmarks.relative`.

The attention of a layer alone, forward and backward, float32: transformers' `rel_attn_core` multiplies all queries by
all distances, shifts that matrix and adds it. pyattn is held against float64 before the clock runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import pyattn
from pyattn.testing import assert_as_accurate

from . import environment
from .chart import Panel, draw_panels
from .memory import weighed
from .report import table
from .subject import shown
from .timing import Timing, interleaved

OURS, THEIRS, PLAIN = "pyattn", "transformers", "pyattn without distances"
_ROUNDS = 5
_CHECKED = 96  # queries and keys of one batch element


class Case(NamedTuple):
    b: int
    h: int
    m: int  # queries, and keys
    d: int

    @property
    def label(self) -> str:
        return f"b{self.b} h{self.h} {self.m} d{self.d}"


CASES = (Case(4, 12, 256, 64), Case(4, 12, 512, 64), Case(4, 12, 1024, 64))


class Row(NamedTuple):
    case: Case
    peer: str
    timing: Timing
    peak_bytes: int | None


def make_inputs(case: Case, device: str) -> list[Tensor]:
    """q, k, v, relative_k of the distances -m to m - 1, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    sizes = 3 * ((case.b, case.h, case.m, case.d),) + (
        (1, case.h, 2 * case.m, case.d),
        (case.b, case.h, case.m, case.d),
    )
    return [torch.randn(size, generator=generator).to(device) for size in sizes]


def ours(q: Tensor, k: Tensor, v: Tensor, relative_k: Tensor) -> Tensor:
    return pyattn.relative_attention(q, k, v, q, relative_k, -q.shape[2])


def theirs(q: Tensor, k: Tensor, v: Tensor, relative_k: Tensor) -> Tensor:
    """transformers' own code, with its layout [length, b, h, d] and rows from the largest distance downwards."""
    from transformers.models.xlnet.modeling_xlnet import XLNetConfig, XLNetRelativeAttention

    b, h, _, d = q.shape
    layer: Any = XLNetRelativeAttention(XLNetConfig(d_model=h * d, n_head=h, dropout=0.0)).to(q.device, q.dtype)
    for bias in (layer.r_w_bias, layer.r_r_bias):
        torch.nn.init.zeros_(bias)
    rows = relative_k.flip(2).permute(2, 0, 1, 3).expand(-1, b, -1, -1)
    # Its row 0 is the distance of the number of keys, which no pair has.
    rows = torch.cat([torch.zeros_like(rows[:1]), rows[:-1]])
    out = layer.rel_attn_core(*(t.permute(2, 0, 1, 3) for t in (q, k, v)), rows)
    return (out[0] if isinstance(out, tuple) else out).permute(1, 2, 0, 3)


def plain(q: Tensor, k: Tensor, v: Tensor, relative_k: Tensor) -> Tensor:
    return pyattn.attention(q, k, v)


PEERS: dict[str, Callable[..., Tensor]] = {OURS: ours, THEIRS: theirs, PLAIN: plain}


def run(attention: Callable[..., Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """out, and the gradients of q, k, v and relative_k."""
    *given, d_out = tensors
    leaves = [t.detach().requires_grad_() for t in given]
    out = attention(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, d_out, materialize_grads=True)


def check(case: Case, device: str) -> None:
    """Raises AssertionError unless the results of a part of the case are as exact as the contract asks."""
    tensors = make_inputs(case._replace(b=1, m=min(case.m, _CHECKED)), device)
    found, baseline = run(ours, tensors), run(theirs, tensors)
    expected = run(theirs, [t.double() for t in tensors])
    eps = torch.finfo(torch.float32).eps
    for name, mine, exact, other in zip(
        ("out", "d_q", "d_k", "d_v", "d_relative_k"), found, expected, baseline, strict=True
    ):
        assert_as_accurate(mine, exact, other, eps * exact.abs().amax(), f"{case.label}: {name}")


def measure(case: Case, device: str, rounds: int) -> list[Row]:
    """A row per peer: pyattn checked, all weighed, and then timed in turns."""
    check(case, device)
    tensors = make_inputs(case, device)
    calls = {name: partial(run, function, tensors) for name, function in PEERS.items()}
    for call in calls.values():
        call()
    peaks = {name: weighed(call, device)[1] for name, call in calls.items()}
    timings = interleaved(calls, device, 0.0, min_rounds=rounds)
    return [Row(case, name, t, peaks[name]) for name, t in timings.items()]


def ratio(rows: Sequence[Row], over: str, under: str = OURS) -> float:
    times = {row.peer: row.timing.p50_ms for row in rows}
    return times[over] / times[under]


def publish(groups: Sequence[Sequence[Row]], out: Path, device: str, console: Console) -> None:
    """Prints the table, and writes relative.jsonl and relative.png into `out`."""
    about = environment.describe(device, Path(__file__).parent)
    out.mkdir(parents=True, exist_ok=True)
    figures, picture = out / "relative.jsonl", out / "relative.png"
    lines = [row.case._asdict() | {"peer": row.peer} | row.timing._asdict() | {"peak_bytes": row.peak_bytes}
             for rows in groups for row in rows]  # fmt: skip
    figures.write_text("".join(f"{json.dumps(about | line)}\n" for line in lines))
    labels = [f"{rows[0].case.label}\n{ratio(rows, THEIRS):.1f} x {THEIRS}" for rows in groups]
    times: dict[str, list[float | None]] = {
        peer: [row.timing.p50_ms for rows in groups for row in rows if row.peer == peer] for peer in PEERS
    }
    peaks = {
        peer: [None if row.peak_bytes is None else row.peak_bytes / 1e6
               for rows in groups for row in rows if row.peer == peer]
        for peer in PEERS
    }  # fmt: skip
    panels = [
        Panel("Relative attention: forward + backward, float32", "ms", labels, times, digits=0),
        Panel("Peak memory", "MB", [rows[0].case.label for rows in groups], peaks, digits=0),
    ]
    draw_panels(picture, panels, environment.title(about, "Relative attention"))
    console.print(_table(groups))
    console.print(f"wrote {figures} and {picture}", highlight=False, soft_wrap=True)


def _table(groups: Sequence[Sequence[Row]]) -> Table:
    lines = []
    for rows in groups:
        cells = [
            f"{row.timing.p50_ms:.1f} {shown(None if row.peak_bytes is None else row.peak_bytes / 1e6, '6,.0f')}"
            for row in rows
        ]
        lines.append([rows[0].case.label, *cells, f"{ratio(rows, THEIRS):.1f}", f"{ratio(rows, OURS, PLAIN):.2f}"])
    columns = ["case", *PEERS, f"times as fast as {THEIRS}", f"time over {PLAIN}"]
    return table("relative attention, forward + backward, float32: ms, MB", columns, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m benchmarks.relative`."""
    device = "cpu"  # no kernel of a GPU has a relative term yet
    parser = argparse.ArgumentParser(prog="python -m benchmarks.relative", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/relative"), help="folder (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help="timed rounds of each case (default: %(default)s)")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    groups = []
    for case in track(CASES, "relative", console=console, transient=True, disable=not console.is_terminal):
        groups.append(measure(case, device, options.rounds))
        console.print(f"{case.label}: {ratio(groups[-1], THEIRS):.1f} times {THEIRS}", highlight=False)
        gc.collect()
    publish(groups, options.out, device, console)


if __name__ == "__main__":
    main()
