"""The CPU benchmark: `pyattn bench`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from . import chart, decode, environment, fallback, report, small, threads, window
from .cases import CPU_CASES, CPU_QUICK_CASES, Case
from .limit import Limit
from .peers import CPU_PEERS, Flex
from .report import Chapter
from .subject import Subject
from .suite import Effort, Row, measure

BASELINES = ("SDPA fused",)
SUBJECTS = (fallback.SUBJECT, decode.CPU_SUBJECT, small.SUBJECT, window.SUBJECT, threads.SUBJECT)
# FlexAttention takes longer to compile than all else that is done with a shape.
PEERS = tuple(peer for peer in CPU_PEERS if not isinstance(peer, Flex))
_NOT_RUN = (
    "FlexAttention is not in this run, because it compiles for 20 s or so per shape: "
    "`pytest benchmarks --benchmark-only -k FlexAttention` in a checkout times it."
)
# What the plain cases may take.
SECONDS, QUICK_SECONDS = 110.0, 10.0
# A round of the longest shapes takes seconds.
_EFFORT = Effort(min_rounds=3)


def run(out_dir: Path, *, quick: bool = False, console: Console | None = None) -> list[Row]:
    """Measures, prints the tables, and writes cpu.jsonl, cpu.png and cpu-more.png into `out_dir`.

    Args:
        out_dir: made where missing; results of an earlier run there are replaced.
        quick: a little of everything, on small shapes.
        console: where the tables go; standard output by default.

    Returns:
        One row per case, direction and peer. A row with status "failed" is a wrong result.
    """
    console = console or Console()
    cases, seconds = (CPU_QUICK_CASES, QUICK_SECONDS) if quick else (CPU_CASES, SECONDS)
    limit = Limit(dict.fromkeys(case.dtype_name for case in cases))
    rows: list[Row] = []
    answers: dict[Subject, list[Row]] = {subject.quick() if quick else subject: [] for subject in SUBJECTS}

    def steps() -> Iterator[None]:
        for found in measure([(case,) for case in cases], PEERS, "cpu", seconds, _EFFORT):
            rows.extend(found)
            limit.measure()
            yield
        for subject, answer in answers.items():
            for found in subject.measure("cpu"):
                answer += found
                limit.measure()
                yield

    total = len(cases) + sum(len(subject.groups) for subject in answers)
    for _ in track(steps(), "measuring", total=total, console=console, transient=True, disable=not console.is_terminal):
        pass
    _publish(out_dir, rows, answers, limit, console)
    return rows + [row for answer in answers.values() for row in answer]


def _publish(
    out_dir: Path, rows: Sequence[Row], answers: dict[Subject, list[Row]], limit: Limit, console: Console
) -> None:
    about = environment.describe("cpu", Path(__file__).parent)
    chapters = [Chapter("attention", BASELINES, rows), *(subject.chapter(found) for subject, found in answers.items())]
    report.write_lines(out_dir / "cpu.jsonl", chapters, about, limit.gflops)
    title = environment.title(about)
    pictures = out_dir / "cpu.png", out_dir / "cpu-more.png"
    chart.draw(pictures[0], rows, title, lambda case: case.dtype_name, _label, limit.gflops)
    panels = [panel for subject, found in answers.items() for panel in subject.panels(found)]
    chart.draw_panels(pictures[1], panels, title)
    console.print(f"[bold]{title}[/bold]\n{limit}", highlight=False)
    report.print_tables(rows, BASELINES, console, limit.gflops)
    report.print_dim(_NOT_RUN, console)
    report.print_summary(rows, BASELINES, console)
    for subject, found in answers.items():
        subject.print(found, console)
    for path in (*pictures, out_dir / "cpu.jsonl"):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def _label(case: Case) -> str:
    return case.label.replace(" causal", "\ncausal").replace(f" {case.m}", f"\n{case.m}", 1)
