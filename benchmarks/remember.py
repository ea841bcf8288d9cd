"""What a Transformer-XL gains by memory: `python -m benchmarks.remember --model FOLDER --text FILE`.

One model reads the same text with memories of rising length: its loss falls as long as it makes something of what it
remembers (Dai et al. 2019, arXiv:1901.02860, section 4.3).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from pyattn.files import replacing
from pyattn.models import TransformerXL
from pyattn.tokens import encode_document, read_tokenizer

_STREAMS = 8  # parts of the text that are read side by side


@torch.no_grad()
def loss(model: TransformerXL, tokens: Tensor, memory: int, segment: int) -> float:
    """Nats per token of tokens [streams, length], in segments, each with as much memory."""
    shorter = TransformerXL(replace(model.config, memory=memory)).eval()
    shorter.load_state_dict(model.state_dict())
    total, state = 0.0, None
    last = tokens.shape[1] - 1
    for start in range(0, last, segment):
        end = min(start + segment, last)
        logits, state = shorter(tokens[:, start:end], state)
        total += float(F.cross_entropy(logits.flatten(0, 1), tokens[:, start + 1 : end + 1].flatten(), reduction="sum"))
    return total / (len(tokens) * last)


def draw(picture: Path, losses: dict[int, float], trained: int) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    places = range(len(losses))
    axes.plot(places, list(losses.values()), marker="o")
    for place, value in zip(places, losses.values(), strict=True):
        axes.annotate(f"{value:.3f}", (place, value), (0, 6), textcoords="offset points", ha="center")
    axes.set_xticks(places, [f"{memory}\n(trained)" if memory == trained else str(memory) for memory in losses])
    axes.margins(y=0.15)  # room for the numbers
    axes.set(xlabel="memory, tokens", ylabel="loss (nats per token)", title="Transformer-XL: loss by memory")
    axes.grid(alpha=0.3)
    with replacing(picture) as path:
        figure.savefig(path, format="png", dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.remember", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a model and its tokenizer.json")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 file that the model was not trained on")
    parser.add_argument(
        "--memory", type=int, nargs="+", default=[0, 16, 64, 128, 256, 512], help="(default: %(default)s)"
    )
    parser.add_argument("--segment", type=int, default=64, help="tokens read at a time (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/memory.png"), help="the picture (default: %(default)s)")
    options = parser.parse_args(arguments)
    model = TransformerXL.from_pretrained(options.model).eval()
    file = options.model / "tokenizer.json"
    ids = encode_document(read_tokenizer(file.read_text("utf-8"), file), options.text.read_text("utf-8"))
    length = len(ids) // _STREAMS
    tokens = torch.tensor(ids[: _STREAMS * length], dtype=torch.long).view(_STREAMS, length)
    losses = {memory: loss(model, tokens, memory, options.segment) for memory in options.memory}
    table = Table("memory, tokens", "loss, nats per token", title=f"{_STREAMS} streams of {length:,} tokens")
    for memory, value in losses.items():
        table.add_row(str(memory), f"{value:.4f}")
    draw(options.out, losses, model.config.memory)
    console = Console()
    console.print(table)
    console.print(f"picture {options.out}", soft_wrap=True)


if __name__ == "__main__":
    main()
