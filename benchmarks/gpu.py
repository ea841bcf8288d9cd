"""The GPU benchmark: `python -m benchmarks.gpu` in a checkout, on a machine with an NVIDIA GPU.

Runs the contract suite on the GPU and then the benchmark, within its time, and leaves gpu.jsonl, gpu.png and
gpu-more.png in benchmarks/results/<device>/. Nothing is downloaded: where pyattn is not installed, a throw-away install
is made from the checkout with the build tools that are there.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from . import chart, command, decode, environment, features, floors, growth, hopper, report
from .cases import GPU_CASES, Case
from .peers import GPU_PEERS
from .report import Chapter
from .subject import Subject
from .suite import Effort, Row, measure

BASELINES = ("SDPA flash", "SDPA cuDNN")
# In this order, as time may run out: the quick ones before the one that FlexAttention compiles every case of.
SUBJECTS = (decode.GPU_SUBJECT, growth.SUBJECT, hopper.SUBJECT, features.SUBJECT)
# What the plain cases need; whoever needs less leaves the rest to those after it.
ATTENTION_SECONDS = 130.0
_EFFORT = Effort(clock_seconds=0.5)
CONTRACT = tuple(Path("tests", f"test_{name}.py") for name in ("contract", "kvcache", "gpu"))
# 9 minutes, less the time to start, to write and to draw.
SECONDS = 510.0
# Compiling every kernel of the contract is most of its time, and a process compiles one kernel at a time.
CONTRACT_SECONDS, CONTRACT_PROCESSES = 240.0, 12


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when all is well, 1 when something failed or is wrong, 2 when there is nothing to run on."""
    start = time.monotonic()
    options = command.parser("gpu", (__doc__ or "").partition("\n")[0], SECONDS).parse_args(arguments)
    if command.lacks_gpu("gpu"):
        return 2
    if not (options.checkout / CONTRACT[0]).is_file():
        print(f"benchmarks.gpu: no {CONTRACT[0]} in {options.checkout}: give a checkout by --checkout", file=sys.stderr)
        return 2
    end = start + options.seconds
    if not command.is_installed():
        return command.run_installed("gpu", options.checkout, end)
    passed = run_contract(options.checkout, min(CONTRACT_SECONDS, options.seconds / 2))
    rows = run_benchmark(options.checkout, "cuda", end)
    return 0 if passed and is_well(rows) else 1


def run_contract(checkout: Path, seconds: float) -> bool:
    """The contract suite, which takes in the GPU when there is one; True when all of it passed in time."""
    line = [sys.executable, "-m", "pytest", *(str(checkout / tests) for tests in CONTRACT), "--import-mode=importlib"]
    line += ["-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        line += ["-n", str(min(CONTRACT_PROCESSES, os.cpu_count() or 1))]
    print("the contract suite:", flush=True)
    # From the folder that this package is imported from, so that pytest imports the same pyattn.
    process = subprocess.Popen(line, cwd=_import_root(), start_new_session=True)
    try:
        return process.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        print(f"the contract suite was stopped after {seconds:.0f} s, unfinished", flush=True)
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its workers with it: they would share the GPU with what is timed
            process.wait()


def run_benchmark(checkout: Path, device: str, end: float) -> list[Row]:
    """Measures until `end` by time.monotonic(), prints as it goes, and leaves the files.

    What was measured is on disk after every case.
    """
    about = environment.describe(device, checkout)
    folder = checkout / "benchmarks" / "results" / environment.slug(str(about["device"]))
    console = Console(width=170, highlight=False)
    title = environment.title(about)
    console.print(f"[bold]{title}[/bold]")
    chapters = {"attention": Chapter("attention", BASELINES, [])}

    def extend(chapter: Chapter, found: Sequence[Row]) -> None:
        chapters[chapter.name] = chapter._replace(rows=[*chapter.rows, *found])
        report.write_lines(folder / "gpu.jsonl", chapters.values(), about)
        for group in report.by_call(found):
            console.print(f"{chapter.name}: {report.in_a_line(group, chapter.baselines)}", markup=False, soft_wrap=True)

    seconds = _share(end, ATTENTION_SECONDS, SUBJECTS)
    for found in measure([(case,) for case in GPU_CASES], GPU_PEERS, device, seconds, _EFFORT):
        extend(chapters["attention"], found)
    rows = sorted(chapters["attention"].rows, key=_place)
    chart.draw(folder / "gpu.png", rows, title, panel=_panel, label=_label)
    report.print_tables(rows, BASELINES, console)
    report.print_summary(rows, BASELINES, console)
    for place, subject in enumerate(SUBJECTS):
        chapters[subject.name] = subject.chapter([])
        seconds = _share(end, subject.seconds, SUBJECTS[place + 1 :])
        for found in replace(subject, seconds=seconds).measure(device):
            extend(chapters[subject.name], found)
        subject.print(chapters[subject.name].rows, console)
    panels = [panel for subject in SUBJECTS for panel in subject.panels(chapters[subject.name].rows)]
    chart.draw_panels(folder / "gpu-more.png", panels, title)
    console.print(floors.floor_table(floors.floors({name: chapter.rows for name, chapter in chapters.items()})))
    console.print(f"charts and figures: {folder}", soft_wrap=True)
    return [row for chapter in chapters.values() for row in chapter.rows]


def is_well(rows: Sequence[Row]) -> bool:
    """Whether pyattn was measured at all and was never wrong; what is wrong with a peer the tables say."""
    ours = [row for row in rows if row.peer == GPU_PEERS[0].name]
    return any(row.timing is not None for row in ours) and not any(row.status == "failed" for row in ours)


def _share(end: float, own: float, later: Sequence[Subject]) -> float:
    """The seconds that one part gets of what is left, by what it and those after it need."""
    return (end - time.monotonic()) * own / (own + sum(subject.seconds for subject in later))


def _import_root() -> Path:
    """The folder that this package's topmost package is imported from."""
    return Path(__file__).parents[len((__package__ or "").split("."))]


def _panel(case: Case) -> str:
    if case.dtype is not torch.bfloat16:
        return case.dtype_name
    return f"{case.dtype_name}, d = {case.d}, {'causal' if case.causal else 'full'}"


def _label(case: Case) -> str:
    """What the panel's title does not say yet."""
    return f"{case.m}" if case.dtype is torch.bfloat16 else f"{case.m} d{case.d}{' causal' if case.causal else ''}"


def _place(row: Row) -> tuple[object, ...]:
    """By panel, then by length, for tables and picture; the cases run in another order, that of what matters most."""
    case = row.case
    return case.dtype_name, -case.d, not case.causal, case.m, row.direction != "forward"


if __name__ == "__main__":
    sys.exit(main())
