"""The CPU benchmark: `pyattn bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from . import chart, environment, report
from .cases import CPU_CASES, CPU_QUICK_CASES, Case
from .peers import CPU_PEERS
from .suite import Row, measure

BASELINE = "SDPA fused"


def run(out_dir: Path, *, quick: bool = False, console: Console | None = None) -> list[Row]:
    """Measures, prints the tables, and writes cpu.jsonl and cpu.png into `out_dir`.

    Args:
        out_dir: made where missing; results of an earlier run there are replaced.
        quick: two small shapes in a quarter of the time.
        console: where the tables go; standard output by default.

    Returns:
        One row per case, direction and peer. A row with status "failed" is a wrong result.
    """
    console = console or Console()
    cases, seconds = (CPU_QUICK_CASES, 20.0) if quick else (CPU_CASES, 100.0)
    rows: list[Row] = []
    steps = measure(cases, CPU_PEERS, "cpu", seconds)
    for step in track(
        steps, "measuring", total=len(cases), console=console, transient=True, disable=not console.is_terminal
    ):
        rows += step
    _publish(out_dir, rows, console)
    return rows


def _publish(out_dir: Path, rows: Sequence[Row], console: Console) -> None:
    about = environment.describe("cpu", Path(__file__).parent)
    report.write_lines(out_dir / "cpu.jsonl", rows, about, BASELINE)
    title = environment.title(about)
    chart.draw(out_dir / "cpu.png", rows, title, panel=lambda case: case.dtype_name, label=_label)
    console.print(f"[bold]{title}[/bold]", highlight=False)
    report.print_tables(rows, BASELINE, console)
    report.print_summary(rows, BASELINE, console)
    console.print(f"chart: {out_dir / 'cpu.png'}\nfigures: {out_dir / 'cpu.jsonl'}", highlight=False, soft_wrap=True)


def _label(case: Case) -> str:
    return case.label.replace(" causal", "\ncausal").replace(f" {case.m}", f"\n{case.m}", 1)
