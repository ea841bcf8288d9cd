"""The GPU benchmark: `python -m benchmarks.gpu` in a checkout, on a machine with an NVIDIA GPU.

Runs the contract suite on the GPU and then the benchmark, within its time, and leaves gpu.jsonl and gpu.png in
benchmarks/results/<device>/. Nothing is downloaded: where pyattn is not installed, a throw-away install is made from
the checkout with the build tools that are there.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from . import chart, environment, report
from .cases import GPU_CASES, Case
from .peers import GPU_PEERS
from .suite import Row, measure

BASELINE = "SDPA flash"
CONTRACT = Path("tests") / "test_contract.py"
# 9 minutes, less the time to start, to write and to draw.
SECONDS = 510.0
# Compiling every kernel of the contract is most of its time, and a process compiles one kernel at a time.
CONTRACT_SECONDS, CONTRACT_PROCESSES = 240.0, 12


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when all is well, 1 when something failed or is wrong, 2 when there is nothing to run on."""
    start = time.monotonic()
    options = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"benchmarks.gpu: torch {torch.__version__} finds no GPU, so nothing was run", file=sys.stderr)
        return 2
    if not (options.checkout / CONTRACT).is_file():
        print(f"benchmarks.gpu: no {CONTRACT} in {options.checkout}: give a checkout by --checkout", file=sys.stderr)
        return 2
    if importlib.util.find_spec("pyattn.triton_kernels") is None:
        return run_installed(options.checkout, options.seconds, start)
    passed = run_contract(options.checkout, min(CONTRACT_SECONDS, options.seconds / 2))
    rows = run_benchmark(options.checkout, options.seconds - (time.monotonic() - start))
    return 0 if passed and is_well(rows) else 1


def run_installed(checkout: Path, seconds: float, start: float) -> int:
    """This command again, out of a throw-away install of the checkout."""
    if __package__ != "benchmarks":
        print("benchmarks.gpu: this install of pyattn has no triton_kernels: install it anew", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="pyattn-") as site:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
        install = subprocess.run(
            [*pip, "--no-build-isolation", "--no-deps", "--target", site, str(checkout)], check=False
        )
        if install.returncode != 0:
            print("benchmarks.gpu: pyattn could not be installed from the checkout (above)", file=sys.stderr)
            return 1
        left = seconds - (time.monotonic() - start)
        again = [sys.executable, "-m", "pyattn.benchmarks.gpu", "--checkout", str(checkout), "--seconds", f"{left:.0f}"]
        # Elsewhere than in the checkout, whose own folder pyattn/ would be imported in place of the installed one.
        return subprocess.run(again, cwd=site, check=False).returncode


def run_contract(checkout: Path, seconds: float) -> bool:
    """The contract suite, which takes in the GPU when there is one; True when all of it passed in time."""
    command = [sys.executable, "-m", "pytest", str(checkout / CONTRACT), "--import-mode=importlib"]
    command += ["-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(CONTRACT_PROCESSES, os.cpu_count() or 1))]
    print("the contract suite:", flush=True)
    # From the folder that this package is imported from, so that pytest imports the same pyattn.
    process = subprocess.Popen(command, cwd=_import_root(), start_new_session=True)
    try:
        return process.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        print(f"the contract suite was stopped after {seconds:.0f} s, unfinished", flush=True)
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its workers with it: they would share the GPU with what is timed
            process.wait()


def run_benchmark(checkout: Path, seconds: float) -> list[Row]:
    """Measures, prints as it goes, and leaves the files; what was measured is on disk after every case."""
    about = environment.describe("cuda", checkout)
    folder = checkout / "benchmarks" / "results" / environment.slug(str(about["device"]))
    console = Console(width=150, highlight=False)
    rows: list[Row] = []
    for case, found in zip(
        GPU_CASES, measure([(case,) for case in GPU_CASES], GPU_PEERS, "cuda", seconds), strict=True
    ):
        rows = sorted([*rows, *found], key=_place)
        report.write_lines(folder / "gpu.jsonl", [report.Chapter("attention", BASELINE, rows)], about)
        timed = sum(row.timing is not None for row in found)
        console.print(f"{case.id}: {timed} of {len(found)} timed")
    title = environment.title(about)
    chart.draw(folder / "gpu.png", rows, title, panel=_panel, label=_label)
    console.print(f"[bold]{title}[/bold]")
    report.print_tables(rows, BASELINE, console)
    report.print_summary(rows, BASELINE, console)
    console.print(f"chart: {folder / 'gpu.png'}\nfigures: {folder / 'gpu.jsonl'}", soft_wrap=True)
    return rows


def is_well(rows: Sequence[Row]) -> bool:
    """Whether nothing failed and pyattn was measured at all."""
    measured = any(row.peer == GPU_PEERS[0].name and row.timing is not None for row in rows)
    return measured and not any(row.status == "failed" for row in rows)


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--checkout", type=Path, default=Path(__file__).resolve().parents[1],
                        help="the checkout whose tests are run and whose results folder is written")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for all of it (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
