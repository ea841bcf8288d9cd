"""`pyattn info`, `verify` and `bench`: what runs here, whether it is right, how fast it is."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import track
from rich.table import Table
from rich.text import Text

from pyattn.cli.console import console, make_console
from pyattn.spec import FEATURES, dtype_name

if TYPE_CHECKING:
    from pyattn.verification import Verdict


def info(
    clear_cache: Annotated[
        bool, typer.Option("--clear-cache", help="Remove the compiled CUDA kernels from the disk, and show no more.")
    ] = False,
) -> None:
    """Show this machine as pyattn sees it, and which backends can run on it."""
    from pyattn import machine, registry
    from pyattn.backends import kernel_cache

    if clear_cache:
        console.print(f"removed {kernel_cache.clear()} from {kernel_cache.folder()}", soft_wrap=True)
        return
    facts = machine.describe()
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        console.print(Text.assemble((f"{name:{width}}", "bold"), value), soft_wrap=True)  # a path stays whole
    console.print()
    states = Table("backend", "state", *(words.replace("`", "") for words in registry.PROOFS.values()))
    for name, state in machine.backends().items():
        states.add_row(name, Text(state, "green" if state == "ready" else ""), *registry.BACKENDS[name].proof)
    console.print(states)


def verify(
    backend: Annotated[list[str] | None, typer.Option(help="Only this one; may be given several times.")] = None,
) -> None:
    """Hold every ready backend against the float64 definition, forward and backward. Exit code 1 if a case fails.

    A case passes when its error is at most twice that of plain PyTorch in the same dtype, plus rounding.
    """
    from pyattn import verification

    jobs = verification.jobs(verification.ready(backend))
    bar = track(jobs, "verifying", console=console, transient=True, disable=not console.is_terminal)
    verdicts = []
    for (name, dtype), group in groupby(bar, key=lambda job: (job[0], job[2])):
        verdicts += [verification.verify(*job) for job in group]
        if not console.is_terminal:
            console.print(f"{name} {dtype_name(dtype)}: done, {len(verdicts)} of {len(jobs)} cases")
    console.print(_verification_table(verdicts))
    failed = [verdict for verdict in verdicts if verdict.failures]
    refused = [verdict for verdict in verdicts if verdict.refusal is not None]
    for verdict in failed:
        for failure in verdict.failures:
            name = f"{verdict.backend} {verdict.case} {dtype_name(verdict.dtype)}"
            console.print(f"{name} {failure}", style="red")
    passed = len(verdicts) - len(failed) - len(refused)
    console.print(f"{passed} cases passed, {len(failed)} failed, {len(refused)} are refused by declaration")
    if failed:
        raise typer.Exit(1)


def bench(
    out: Annotated[Path, typer.Option(help="Folder for the chart and the figures.")] = Path("runs/bench"),
    quick: Annotated[bool, typer.Option("--quick", help="A little of everything, on small shapes.")] = False,
) -> None:
    """Time pyattn side by side with torch's own attention on this CPU. Exit code 1 if a result is wrong.

    A case is checked for correctness before it is timed, or it is not timed.
    """
    from pyattn.benchmarks import cpu

    rows = cpu.run(out, quick=quick, console=make_console(markup=True))
    if any(row.status == "failed" for row in rows):
        raise typer.Exit(1)


def _verification_table(verdicts: list[Verdict]) -> Table:
    """backend x feature x dtype: the error of the case that is nearest to what is allowed."""
    from pyattn import verification

    dtypes = list(dict.fromkeys(verdict.dtype for verdict in verdicts))
    caption = (
        "error against float64, forward and backward, over the largest number of the result; in brackets as a part of "
        "what is allowed; of the case that comes nearest to that"
    )
    table = Table("backend", "feature", *map(dtype_name, dtypes), caption=caption)
    for (backend, feature), cells in verification.by_feature(verdicts).items():
        row = [_verification_cell(cells.get(dtype, [])) for dtype in dtypes]
        table.add_row(backend, FEATURES.get(feature, feature), *row)
    return table


def _verification_cell(verdicts: list[Verdict]) -> Text:
    from pyattn import verification

    worst = verification.worst(verdicts)
    numbers = "" if worst is None else f"{worst.relative:.1e} ({worst.excess:.2f})"
    if any(verdict.failures for verdict in verdicts):
        return Text(f"{numbers} FAILED".strip(), "red")
    return Text(numbers) if numbers else Text("refused", "dim")
