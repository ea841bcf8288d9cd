"""The search for launch sizes: `python -m benchmarks.tune` in a checkout, on a machine with an NVIDIA GPU.

Prints rows for the table in triton_kernels/config.py. A time is that of whole calls, forward or backward, in which one
kernel's sizes differ.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from datetime import date
from multiprocessing import get_context

import torch
from rich.console import Console
from rich.progress import Progress

from . import command, environment
from .suite import in_one_line

SECONDS = 500.0
PROCESSES = 12
# Of a row's share of the time; the rest is for inputs, the definition and the clock.
_TRYING = 0.6


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when every row was sought, 1 when one could not be or time ran out, 2 when there is no GPU."""
    start = time.monotonic()
    parser = command.parser("tune", (__doc__ or "").partition("\n")[0], SECONDS)
    parser.add_argument("--kernel", action="append", choices=("forward", "dq", "dkdv", "decode"),
                        help="only this one; may be given several times")  # fmt: skip
    parser.add_argument("--head-dim", action="append", type=int, choices=(64, 128, 256),
                        help="only this one; may be given several times")  # fmt: skip
    parser.add_argument("--bits", type=int, choices=(16, 32), default=16, help="per element (default: %(default)s)")
    options = parser.parse_args(arguments)
    if command.lacks_gpu("tune"):
        return 2
    end = start + options.seconds
    if not command.is_installed():
        return command.run_installed("tune", options.checkout, end, sys.argv[1:] if arguments is None else arguments)
    return tune(options.bits, options.kernel, options.head_dim, end)


def tune(bits: int, kernels: Sequence[str] | None, head_dims: Sequence[int] | None, end: float) -> int:
    """Searches until `end` by time.monotonic() and prints the rows; None is all."""
    from pyattn.triton_kernels import config

    from . import search
    from .trial import GpuTrial

    architecture = config.architecture_of(torch.device("cuda"))
    wanted = search.cells(architecture, bits, kernels or tuple(search.KERNELS), head_dims or search.HEAD_DIMS)
    processes = min(PROCESSES, os.cpu_count() or 1)
    console = Console(width=170, highlight=False, markup=False)
    found = []
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    with bar, get_context("spawn").Pool(processes) as pool:
        task = bar.add_task("searching", total=sum(len(search.candidates(cell)) for cell in wanted))
        for place, cell in enumerate(wanted):
            left = end - time.monotonic()
            if left <= 0:
                console.print(f"{cell}: no time was left")
                continue
            until = time.monotonic() + _TRYING * left / (len(wanted) - place)
            try:
                trial = GpuTrial(cell, pool)
                found.append(search.search(cell, trial, until, processes, lambda count: bar.advance(task, count)))
            except Exception as error:  # of the other kernels in the call; the rows that were found still count
                console.print(f"{cell}: {in_one_line(error)}", soft_wrap=True)
                continue
            console.print(str(found[-1]), soft_wrap=True)
    measured = f"{environment.device_name('cuda')}, {date.today()}"
    console.print(search.rows_text(found, measured), soft_wrap=True)
    return 0 if len(found) == len(wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
