"""Models on pyattn beside transformers': `python -m benchmarks.models`.

Training steps of GPT-2 124M and BERT-base, and generation with GPT-2 124M, from the same weights on the same batches.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.progress import track

from . import environment
from .chart import Panel, draw_panels
from .memory import weighed
from .model_peers import BASELINE, OURS, Generation, Training, generations, training_steps
from .report import table
from .timing import Timing, interleaved

Case = TypeVar("Case", Training, Generation)

_PYATTN = OURS["pyattn"]
_DTYPES = ("float32", "bfloat16")
# As both models are published, with dropout; and the longest without, as many train.
TRAINING = tuple(
    Training(model, max(1, 512 // m), m, dtype, dropout)
    for model in ("GPT-2 124M", "BERT-base")
    for m, dropout in ((128, 0.1), (512, 0.1), (1024, 0.1), (1024, 0.0))
    for dtype in _DTYPES
)
GENERATION = tuple(Generation(b, beams, "float32") for b in (1, 8) for beams in (1, 4))
GPU_TRAINING = (Training("GPT-2 124M", 16, 1024, "bfloat16", 0.0, compiled=True),)
GPU_GENERATION = tuple(Generation(b, beams, "bfloat16") for b in (1, 8) for beams in (1, 4))
_ROUNDS = 3


class Row(NamedTuple):
    """One peer's figures. `same` says whether a generation's texts are pyattn's."""

    case: Training | Generation
    peer: str
    timing: Timing
    tokens_per_second: float
    peak_bytes: int | None
    same: bool | None = None


def measure_training(case: Training, device: str, rounds: int = _ROUNDS) -> list[Row]:
    """The first step of each peer is weighed, gradients and optimizer state included, and not timed."""
    steps = training_steps(case, device)
    peaks = {name: weighed(step, device)[1] for name, step in steps.items()}
    timings = interleaved(steps, device, 0.0, min_rounds=rounds)
    tokens = case.b * case.m
    return [Row(case, name, t, tokens / t.p50_ms * 1e3, peaks[name]) for name, t in timings.items()]


def measure_generation(case: Generation, device: str, rounds: int = _ROUNDS) -> list[Row]:
    """The first call of each peer is weighed and its texts are compared; it is not timed."""
    calls = generations(case, device)
    first = {name: weighed(call, device) for name, call in calls.items()}
    timings = interleaved(calls, device, 0.0, min_rounds=max(1, rounds // 2))  # each is as long as several steps
    tokens, texts = case.b * case.new, first[_PYATTN][0]
    return [
        Row(case, name, t, tokens / t.p50_ms * 1e3, first[name][1], first[name][0] == texts)
        for name, t in timings.items()
    ]


def ratio(rows: Sequence[Row], baseline: str = BASELINE) -> float:
    """How many times as fast pyattn is as the baseline, in one case."""
    times = {row.peer: row.timing.p50_ms for row in rows}
    return times[baseline] / times[_PYATTN]


def _table(title: str, groups: Sequence[Sequence[Row]]) -> object:
    peers = list(dict.fromkeys(row.peer for rows in groups for row in rows))
    lines = []
    for rows in groups:
        by_peer = {row.peer: row for row in rows}
        cells = [_cell(by_peer.get(peer)) for peer in peers]
        lines.append([rows[0].case.label, *cells, f"{ratio(rows):.2f}"])
    return table(f"{title}: tokens/s, MB", ["case", *peers, f"/ {BASELINE}"], lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    peak = "" if row.peak_bytes is None else f" {row.peak_bytes / 1e6:6,.0f}"
    return f"{row.tokens_per_second:,.0f}{peak}{'' if row.same is not False else ' other text'}"


def _panels(groups: Sequence[Sequence[Row]]) -> list[Panel]:
    """A panel per kind of work, model and dtype."""
    kinds: dict[str, list[Sequence[Row]]] = {}
    for rows in groups:
        case = rows[0].case
        name = f"Training, {case.model}, {case.dtype}" if isinstance(case, Training) else f"Generation, {case.dtype}"
        kinds.setdefault(name, []).append(rows)
    return [_panel(name, found) for name, found in kinds.items()]


def _panel(name: str, groups: Sequence[Sequence[Row]]) -> Panel:
    labels = [f"{_short(rows[0].case)}\n{ratio(rows):.2f} x sdpa" for rows in groups]
    peers = dict.fromkeys(row.peer for rows in groups for row in rows)
    series = {
        peer: [next((row.tokens_per_second for row in rows if row.peer == peer), None) for rows in groups]
        for peer in peers
    }
    return Panel(name, "tokens/s", labels, series)


def _short(case: Training | Generation) -> str:
    if isinstance(case, Generation):
        return f"b{case.b} {'greedy' if case.beams == 1 else f'beam {case.beams}'}"
    return f"{case.b} x {case.m}" + ("" if case.dropout else "\nno dropout")


def run(out: Path, device: str, console: Console, rounds: int = _ROUNDS) -> list[list[Row]]:
    """Measures, prints the tables, and writes models.jsonl and models.png into `out`. One list of rows per case."""
    training, generation = (TRAINING, GENERATION) if device == "cpu" else (GPU_TRAINING, GPU_GENERATION)
    work: list[tuple[Callable[..., list[Row]], Training | Generation]] = [
        *((measure_training, case) for case in training),
        *((measure_generation, case) for case in generation),
    ]
    groups = []
    for measure, case in track(work, "measuring", console=console, transient=True, disable=not console.is_terminal):
        groups.append(measure(case, device, rounds))
        console.print(f"{case.label}: {ratio(groups[-1]):.2f} times {BASELINE}", highlight=False)
        gc.collect()
    about = environment.describe(device, Path(__file__).parent)
    out.mkdir(parents=True, exist_ok=True)
    (out / "models.jsonl").write_text(
        "".join(json.dumps(about | _record(row)) + "\n" for rows in groups for row in rows)
    )
    draw_panels(out / "models.png", _panels(groups), environment.title(about))
    for title, kind in (("training step", Training), ("generation, 512 + 128 tokens", Generation)):
        if chosen := [rows for rows in groups if isinstance(rows[0].case, kind)]:
            console.print(_table(title, chosen))
    console.print(f"wrote {out / 'models.jsonl'} and {out / 'models.png'}", highlight=False, soft_wrap=True)
    return groups


def _record(row: Row) -> dict[str, object]:
    case = {name: getattr(row.case, name) for name in row.case.__slots__}
    kind = "training" if isinstance(row.case, Training) else "generation"
    return {"kind": kind} | case | {
        "peer": row.peer, "p20_ms": row.timing.p20_ms, "p50_ms": row.timing.p50_ms, "p80_ms": row.timing.p80_ms,
        "rounds": row.timing.rounds, "tokens_per_second": row.tokens_per_second, "peak_bytes": row.peak_bytes,
        "same_texts": row.same,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m benchmarks.models`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/models"), help="folder (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help="timed rounds of each case (default: %(default)s)")
    options = parser.parse_args(arguments)
    run(options.out, options.device, Console(width=None, highlight=False), options.rounds)


if __name__ == "__main__":
    main()
