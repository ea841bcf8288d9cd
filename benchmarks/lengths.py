"""BLEU of translations over the length of their sources, as a picture: `python -m benchmarks.lengths --help`.

A network that passes a sentence through one vector does worse the longer it is; attention is what ended that (Bahdanau,
Cho and Bengio 2015, arXiv:1409.0473, figure 2).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from pyattn.files import replacing
from pyattn.training.text import TextError, lines

_GROUPS = 6  # of sentences, about equally many in each


def groups(sources: Sequence[str], count: int) -> list[list[int]]:
    """The places of sources in `count` groups of rising length, in words; those of one length stay together."""
    sizes = [len(source.split()) for source in sources]
    order = sorted(range(len(sources)), key=sizes.__getitem__)
    found: list[list[int]] = [[]]
    for place in order:
        full = len(found[-1]) * count >= len(order) and sizes[place] > sizes[found[-1][-1]]
        if full and len(found) < count:
            found.append([])
        found[-1].append(place)
    return found


def bleu(translations: Sequence[str], references: Sequence[str], places: Sequence[int]) -> float:
    import sacrebleu

    chosen = [translations[place] for place in places], [[references[place] for place in places]]
    return float(sacrebleu.corpus_bleu(*chosen).score)


def draw(picture: Path, spans: Sequence[tuple[int, int]], scores: dict[str, list[float]]) -> None:
    """A line for each system, over groups of sources that have so many words."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, values in scores.items():
        axes.plot(range(len(spans)), values, marker="o", label=name)
        axes.annotate(f"{values[-1]:.1f}", (len(spans) - 1, values[-1]), (6, -3), textcoords="offset points")
    labels = [f"{first}" if first == last else f"{first} to {last}" for first, last in spans]
    axes.set_xticks(range(len(spans)), labels)
    axes.margins(x=0.07)  # room for the numbers
    axes.set(xlabel="words of the source", ylabel="BLEU", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    with replacing(picture) as path:
        figure.savefig(path, format="png", dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lengths", description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="sentences, one per line, UTF-8 or .gz")
    parser.add_argument("--reference", type=Path, required=True, help="their translations by people")
    parser.add_argument("--out", type=Path, default=Path("runs/lengths.png"), help="the picture (default: %(default)s)")
    parser.add_argument("translations", nargs="+", help="NAME=FILE, a system and what it has made of the sentences")
    options = parser.parse_args(arguments)
    sources, references = lines(options.source, "source"), lines(options.reference, "reference")
    systems = {}
    for given in options.translations:
        name, _, path = given.partition("=")
        systems[name] = lines(Path(path), "translations")
        if not len(systems[name]) == len(sources) == len(references):
            counts = f"{len(sources)}, {len(references)} and {len(systems[name])}"
            raise TextError(f"translations: expected as many lines as source and reference, got {counts} in {path}")
    parts = groups(sources, _GROUPS)
    sizes = [[len(sources[place].split()) for place in places] for places in parts]
    spans = [(min(part), max(part)) for part in sizes]
    scores = {name: [bleu(found, references, places) for places in parts] for name, found in systems.items()}
    table = Table("words", "sentences", *systems)
    for number, (first, last) in enumerate(spans):
        values = [f"{scores[name][number]:.1f}" for name in systems]
        table.add_row(f"{first} to {last}", str(len(parts[number])), *values)
    whole = range(len(sources))
    table.add_row("all", str(len(sources)), *(f"{bleu(found, references, whole):.1f}" for found in systems.values()))
    draw(options.out, spans, scores)
    console = Console()
    console.print(table)
    console.print(f"picture {options.out}", soft_wrap=True)


if __name__ == "__main__":
    main()
