"""Recurrent sequence to sequence beside the same on torch's attention: `python -m benchmarks.seq2seq`.

Training steps of Luong's and Bahdanau's models, and translations by beam search. torch computes scores, softmax and sum
one after the other. Its translator also prepares keys at each step, for each beam, as a decoder does that knows of no
memory. Both start from the same weights, and their results are compared before the clock runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from pyattn.decoding import beam_search
from pyattn.models import Seq2Seq, Seq2SeqConfig
from pyattn.nn import Score

from . import environment
from .chart import Panel, draw_panels
from .memory import weighed
from .report import table
from .timing import Timing, interleaved

OURS, BASELINE = "pyattn", "torch"
_SIZES: dict[str, Any] = {"vocab": 8000, "layers": 2, "width": 512, "hidden": 512, "context": 256}
_MODELS: dict[str, dict[str, Any]] = {
    "general": {"score": "general", "feed": False},
    "additive": {"score": "additive", "feed": False},
    "general, fed": {"score": "general", "feed": True},
    "additive, fed": {"score": "additive", "feed": True},
    "Bahdanau": {"score": "additive", "order": "bahdanau", "readout": "maxout", "cell": "gru", "feed": False},
}
_ROUNDS = 5
_BATCH = 64  # sentences, in a training step and in a translation
_LENGTHS = range(8, 33)  # tokens of a sentence
_BEAMS = 4


class Case(NamedTuple):
    work: str  # training, or translation
    model: str
    sentences: int

    @property
    def label(self) -> str:
        return f"{self.work}, {self.model}, {self.sentences:,} sentences"


CASES = tuple(Case("training", model, _BATCH) for model in _MODELS) + tuple(
    Case("translation", model, 1000) for model in ("general", "additive", "additive, fed")
)


class Row(NamedTuple):
    case: Case
    peer: str
    timing: Timing
    tokens_per_second: float
    peak_bytes: int | None


class Forgetful(Seq2Seq):
    """A model without memory of keys: each row has its source's states, and prepares keys and values in each step."""

    def _attend(self, states: Tensor, reading: Any) -> Tensor:
        sources = torch.tensor(reading.memory.sources, device=states.device)
        memory = reading.memory.layers[0][1][sources]
        lengths = None if reading.memory.lengths is None else reading.memory.lengths[sources]
        score = cast(Score, self.score)
        return cast(Tensor, score.attend_unfused(states, score.keys(memory), memory, lengths))


def sentences(count: int, device: str) -> tuple[Tensor, Tensor]:
    """Random sentences [count, longest], and their lengths in falling order."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(_LENGTHS.start, _LENGTHS.stop, (count,), generator=generator).sort(descending=True).values
    tokens = torch.randint(3, _SIZES["vocab"], (count, int(lengths[0])), generator=generator)
    tokens[torch.arange(tokens.shape[1]) >= lengths[:, None]] = 0
    return tokens.to(device), lengths.to(device)


def models(case: Case, device: str) -> dict[str, Seq2Seq]:
    """pyattn's and torch's, with the same weights."""
    torch.manual_seed(0)
    ours = Seq2Seq(Seq2SeqConfig(**_SIZES, **_MODELS[case.model])).to(device)
    kind = Seq2Seq if case.work == "training" else Forgetful
    theirs = kind(Seq2SeqConfig(**_SIZES, **_MODELS[case.model], attention="torch")).to(device)
    theirs.load_state_dict(ours.state_dict())
    return {OURS: ours, BASELINE: theirs}


def training_step(model: Seq2Seq, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of sentences that translate each other in reverse order, and a gradient."""
    model.zero_grad(set_to_none=True)
    target = source.flip(0)
    logits = model(source, F.pad(target[:, :-1], (1, 0), value=1), lengths)
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=0)
    loss.backward()
    return loss.detach(), cast(Tensor, model.source_embedding.weight.grad)


def translations(model: Seq2Seq, source: Tensor, lengths: Tensor) -> list[list[int]]:
    """The best translation of each sentence, as long as the sentence is."""
    found = []
    for rows, held in zip(source.split(_BATCH), lengths.split(_BATCH), strict=True):
        for best in beam_search(model, rows[:, : int(held[0])], held.tolist(), beams=_BEAMS, lengths=held, end=2):
            found.append(best[0].tokens)
    return found


def check(calls: Mapping[str, Callable[[], Any]], case: Case) -> None:
    """Raises AssertionError where the two differ by more than rounding."""
    ours, theirs = (calls[name]() for name in (OURS, BASELINE))
    if case.work == "training":
        assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
        return
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    assert same >= 0.95 * len(ours), f"{case.label}: {same} of {len(ours)} translations are the same"


def measure(case: Case, device: str, rounds: int) -> list[Row]:
    """A row per peer: compared, weighed, and then timed in turns."""
    source, lengths = sentences(case.sentences, device)
    work: Callable[..., Any] = training_step if case.work == "training" else translations
    peers = {name: model.train(case.work == "training") for name, model in models(case, device).items()}
    calls = {name: partial(work, model, source, lengths) for name, model in peers.items()}
    check(calls, case)
    peaks = {name: weighed(call, device)[1] for name, call in calls.items()}
    timings = interleaved(calls, device, 0.0, min_rounds=rounds)
    tokens = int(lengths.sum()) * (2 if case.work == "training" else 1)
    return [Row(case, name, t, tokens / t.p50_ms * 1e3, peaks[name]) for name, t in timings.items()]


def ratio(rows: Sequence[Row]) -> float:
    """How many times as fast pyattn is, in one case."""
    times = {row.peer: row.timing.p50_ms for row in rows}
    return times[BASELINE] / times[OURS]


def publish(groups: Sequence[Sequence[Row]], out: Path, device: str, console: Console) -> None:
    """Prints the table, and writes seq2seq.jsonl and seq2seq.png into `out`."""
    about = environment.describe(device, Path(__file__).parent)
    out.mkdir(parents=True, exist_ok=True)
    figures, picture = out / "seq2seq.jsonl", out / "seq2seq.png"
    figures.write_text("".join(f"{json.dumps(about | _record(row))}\n" for rows in groups for row in rows))
    works = dict.fromkeys(rows[0].case.work for rows in groups)
    panels = [_panel(work, [rows for rows in groups if rows[0].case.work == work]) for work in works]
    draw_panels(picture, panels, environment.title(about, "Recurrent sequence to sequence, 2 x 512"))
    lines = [
        [rows[0].case.label, *(_cell(row) for row in rows), f"{ratio(rows):.2f}"] for rows in groups
    ]  # fmt: skip
    console.print(table("tokens/s, MB", ["case", *(row.peer for row in groups[0]), f"/ {BASELINE}"], lines))
    console.print(f"wrote {figures} and {picture}", highlight=False, soft_wrap=True)


def _cell(row: Row) -> str:
    memory = "" if row.peak_bytes is None else f" {row.peak_bytes / 1e6:6,.0f}"
    return f"{row.tokens_per_second:,.0f}{memory}"


def _panel(work: str, groups: Sequence[Sequence[Row]]) -> Panel:
    labels = [f"{rows[0].case.model}\n{ratio(rows):.2f} x {BASELINE}" for rows in groups]
    series: dict[str, list[float | None]] = {
        row.peer: [r.tokens_per_second for rows in groups for r in rows if r.peer == row.peer] for row in groups[0]
    }
    return Panel(work, "tokens/s", labels, series)


def _record(row: Row) -> dict[str, object]:
    figures = {"tokens_per_second": row.tokens_per_second, "peak_bytes": row.peak_bytes}
    return row.case._asdict() | {"peer": row.peer} | row.timing._asdict() | figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m benchmarks.seq2seq`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seq2seq", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/seq2seq"), help="folder (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help="timed rounds of each case (default: %(default)s)")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    groups = []
    for case in track(CASES, "seq2seq", console=console, transient=True, disable=not console.is_terminal):
        groups.append(measure(case, device, options.rounds))
        console.print(f"{case.label}: {ratio(groups[-1]):.2f} times {BASELINE}", highlight=False)
        gc.collect()
    publish(groups, options.out, device, console)


if __name__ == "__main__":
    main()
