"""Models on pyattn beside transformers': `python -m benchmarks.models`.

Training steps of GPT-2 124M, BERT-base and XLNet-base, and generation with GPT-2 124M, from the same weights on the
same batches.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track

from . import environment
from .chart import Panel, draw_panels
from .limit import peak
from .memory import weighed
from .model_peers import BASELINE, OURS, THEIRS, Generation, Training, generations, step_operations, training_steps
from .report import table
from .timing import Timing, interleaved

_PYATTN = OURS["pyattn"]
_DTYPES = ("float32", "bfloat16")
# As the first two are published, with dropout; and the longest without, as many train.
_CPU_TRAINING = (
    *(
        Training(model, max(1, 512 // m), m, dtype, dropout)
        for model in ("GPT-2 124M", "BERT-base")
        for m, dropout in ((128, 0.1), (512, 0.1), (1024, 0.1), (1024, 0.0))
        for dtype in _DTYPES
    ),
    Training("XLNet-base", 2, 512, "float32", 0.0),
)
_CPU_GENERATION = tuple(Generation(b, beams, "float32") for b in (1, 8) for beams in (1, 4))
_GPU_TRAINING = (Training("GPT-2 124M", 16, 1024, "bfloat16", 0.0, compiled=True),)
_GPU_GENERATION = tuple(Generation(b, beams, "bfloat16") for b in (1, 8) for beams in (1, 4))
# By device.
TRAINING = {"cpu": _CPU_TRAINING, "cuda": _GPU_TRAINING}
GENERATION = {"cpu": _CPU_GENERATION, "cuda": _GPU_GENERATION}
KINDS = ("training", "generation")
_ROUNDS = 3


class Row(NamedTuple):
    """One peer's figures.

    `mfu` is the share of the device's peak that a training step's operations come to, `same` whether a generation's
    texts are pyattn's.
    """

    case: Training | Generation
    peer: str
    timing: Timing
    tokens_per_second: float
    peak_bytes: int | None
    same: bool | None = None
    mfu: float | None = None


def measure_training(case: Training, device: str, rounds: int = _ROUNDS) -> list[Row]:
    """The second step of each peer is weighed, and not timed: the first one's memory is also what stays loaded."""
    steps = training_steps(case, device)
    for step in steps.values():
        step()
    peaks = {name: weighed(step, device)[1] for name, step in steps.items()}
    timings = interleaved(steps, device, 0.0, min_rounds=rounds)
    tokens, operations, limit = case.b * case.m, step_operations(case), peak(device, case.dtype)
    return [
        Row(
            case, name, t, tokens / t.p50_ms * 1e3, peaks[name],
            mfu=None if limit is None else operations / t.p50_ms * 1e3 / limit,
        )
        for name, t in timings.items()
    ]  # fmt: skip


def measure_generation(case: Generation, device: str, rounds: int = _ROUNDS) -> list[Row]:
    """The first whole call of each peer is weighed and its texts are compared; it is not timed."""
    for warm_up in generations(replace(case, new=1), device).values():
        warm_up()
    calls = generations(case, device)
    first = {name: weighed(call, device) for name, call in calls.items()}
    timings = interleaved(calls, device, 0.0, min_rounds=max(1, rounds // 2))  # each is as long as several steps
    tokens, texts = case.b * case.new, first[_PYATTN][0]
    return [
        Row(case, name, t, tokens / t.p50_ms * 1e3, first[name][1], first[name][0] == texts)
        for name, t in timings.items()
    ]


def baseline_of(rows: Sequence[Row]) -> str:
    """The peer that a case's ratio is to: eager where transformers has no other."""
    return BASELINE if any(row.peer == BASELINE for row in rows) else THEIRS["eager"]


def ratio(rows: Sequence[Row]) -> float:
    """How many times as fast pyattn is as the baseline, in one case."""
    times = {row.peer: row.timing.p50_ms for row in rows}
    return times[baseline_of(rows)] / times[_PYATTN]


def _table(title: str, groups: Sequence[Sequence[Row]]) -> object:
    peers = list(dict.fromkeys(row.peer for rows in groups for row in rows))
    lines = []
    for rows in groups:
        by_peer = {row.peer: row for row in rows}
        cells = [_cell(by_peer.get(peer)) for peer in peers]
        lines.append([rows[0].case.label, *cells, f"{ratio(rows):.2f} {_short_name(baseline_of(rows))}"])
    return table(
        f"{title}: tokens/s, MB{', MFU' if title == 'training' else ''}", ["case", *peers, "/ transformers"], lines
    )


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    memory = "" if row.peak_bytes is None else f" {row.peak_bytes / 1e6:6,.0f}"
    mfu = "" if row.mfu is None else f" {row.mfu:.0%}"
    return f"{row.tokens_per_second:,.0f}{memory}{mfu}{'' if row.same is not False else ' other text'}"


def _panels(groups: Sequence[Sequence[Row]]) -> list[Panel]:
    """A panel per kind of work, model and dtype."""
    kinds: dict[str, list[Sequence[Row]]] = {}
    for rows in groups:
        case = rows[0].case
        name = f"Training, {case.model}, {case.dtype}" if isinstance(case, Training) else f"Generation, {case.dtype}"
        kinds.setdefault(name, []).append(rows)
    return [_panel(name, found) for name, found in kinds.items()]


def _panel(name: str, groups: Sequence[Sequence[Row]]) -> Panel:
    labels = [f"{_short(rows[0].case)}\n{ratio(rows):.2f} x {_short_name(baseline_of(rows))}" for rows in groups]
    peers = dict.fromkeys(row.peer for rows in groups for row in rows)
    series = {
        peer: [next((row.tokens_per_second for row in rows if row.peer == peer), None) for rows in groups]
        for peer in peers
    }
    return Panel(name, "tokens/s", labels, series)


def _short_name(peer: str) -> str:
    return peer.removeprefix("transformers ")


def _short(case: Training | Generation) -> str:
    if isinstance(case, Generation):
        return f"b{case.b} {'greedy' if case.beams == 1 else f'beam {case.beams}'}"
    return f"{case.b} x {case.m}" + ("" if case.dropout else "\nno dropout")


def run(
    out: Path, device: str, console: Console, rounds: int = _ROUNDS, kinds: Sequence[str] = KINDS
) -> list[list[Row]]:
    """Measures the kinds of work one after the other, and leaves each one's files. One list of rows per case."""
    work: dict[str, tuple[Sequence[Any], Callable[..., list[Row]]]] = {
        "training": (TRAINING[device], measure_training),
        "generation": (GENERATION[device], measure_generation),
    }
    groups: list[list[Row]] = []
    for kind in kinds:
        cases, measure = work[kind]
        found: list[list[Row]] = []
        for case in track(cases, kind, console=console, transient=True, disable=not console.is_terminal):
            found.append(measure(case, device, rounds))
            console.print(f"{case.label}: {ratio(found[-1]):.2f} times {baseline_of(found[-1])}", highlight=False)
            gc.collect()
        publish(kind, found, out, device, console)
        groups += found
    return groups


def publish(kind: str, groups: Sequence[Sequence[Row]], out: Path, device: str, console: Console) -> None:
    """Prints the table, and writes models-KIND.jsonl and models-KIND.png into `out`."""
    about = environment.describe(device, Path(__file__).parent)
    about["versions"] |= {"transformers": metadata.version("transformers")}
    lines = [json.dumps(about | {"kind": kind} | _record(row)) for rows in groups for row in rows]
    out.mkdir(parents=True, exist_ok=True)
    figures, picture = (out / f"models-{kind}.{suffix}" for suffix in ("jsonl", "png"))
    figures.write_text("".join(f"{line}\n" for line in lines))
    draw_panels(picture, _panels(groups), environment.title(about, "Models"))
    console.print(_table(kind, groups))
    console.print(f"wrote {figures} and {picture}", highlight=False, soft_wrap=True)


def _record(row: Row) -> dict[str, object]:
    case = {name: getattr(row.case, name) for name in row.case.__slots__}
    return case | {
        "peer": row.peer, "p20_ms": row.timing.p20_ms, "p50_ms": row.timing.p50_ms, "p80_ms": row.timing.p80_ms,
        "rounds": row.timing.rounds, "tokens_per_second": row.tokens_per_second, "peak_bytes": row.peak_bytes,
        "same_texts": row.same, "mfu": row.mfu,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m benchmarks.models`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/models"), help="folder (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help="timed rounds of each case (default: %(default)s)")
    parser.add_argument("--only", choices=KINDS, help="one kind of work (default: both)")
    options = parser.parse_args(arguments)
    kinds = KINDS if options.only is None else (options.only,)
    run(
        options.out,
        options.device,
        Console(width=None if sys.stdout.isatty() else 150, highlight=False),
        options.rounds,
        kinds,
    )


if __name__ == "__main__":
    main()
