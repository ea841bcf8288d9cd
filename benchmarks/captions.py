"""How well captioning models describe scenes of shapes, side by side: `python -m benchmarks.captions --help`.

A caption is right if it names exactly the scene's objects and says nothing false (`pyattn.training.scene_scores`), for
scenes with the pairs of colour and shape that training had, and for scenes with pairs that it never had. BLEU has the
five templates as references. Where models look is measured while they name a colour or a shape.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sacrebleu
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pyattn.check import RangeError
from pyattn.decoding.captions import Caption, tell
from pyattn.decoding.pictures import draw_looks
from pyattn.models import ShowAttendTell
from pyattn.tokens import read_tokenizer
from pyattn.training.scene_captions import captions
from pyattn.training.scene_scores import held_back, scores_of
from pyattn.training.scenes import MOST, Scene, picture


def bleu(told: Sequence[Caption], scenes: Sequence[Scene]) -> float:
    references = [list(column) for column in zip(*map(captions, scenes), strict=True)]
    return float(sacrebleu.corpus_bleu([caption.text for caption in told], references).score)


def row(name: str, told: Sequence[Caption], scenes: Sequence[Scene]) -> list[str]:
    """A line of the table."""
    found = scores_of(scenes, told)
    parts = (found.right, found.parsed, found.inside, found.pointed, found.area)
    return [name, *(f"{100 * part:.1f}" for part in parts), f"{bleu(told, scenes):.1f}"]


def shown(scenes: Sequence[Scene]) -> int:
    """The scene for the picture: of as many objects as there can be, of two kinds of unlike colours and shapes."""
    for place, scene in enumerate(scenes):
        kinds = scene.kinds
        is_varied = len(kinds) == 2 and kinds[0].colour != kinds[1].colour and kinds[0].shape != kinds[1].shape
        if is_varied and len(scene.objects) == MOST:
            return place
    return 0


def load(given: str) -> tuple[str, Any, Any]:
    """A name, its model and tokenizer, of NAME=FOLDER."""
    name, equals, folder = given.partition("=")
    if not equals:
        raise RangeError(f"models: expected NAME=FOLDER, got {given}")
    path = Path(folder) / "tokenizer.json"
    return name, ShowAttendTell.from_pretrained(folder), read_tokenizer(path.read_text("utf-8"), path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.captions", description=__doc__)
    parser.add_argument("--scenes", type=int, default=1000, help="of either sort (default: %(default)s)")
    parser.add_argument("--beams", type=int, default=4, help="width of the beam search (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/captions"), help="pictures (default: %(default)s)")
    parser.add_argument("models", nargs="+", help="NAME=FOLDER, a model that `pyattn train caption` has left")
    options = parser.parse_args(arguments)
    console = Console()
    systems = [load(given) for given in options.models]
    for title, held_out in (("pairs of the training", False), ("held-out pairs", True)):
        scenes = held_back(options.scenes, held_out=held_out)
        images = torch.stack([torch.from_numpy(picture(each)) for each in scenes])
        table = Table("model", "right", "parsed", "inside", "pointed", "area", "BLEU", title=f"%, {title}")
        for name, model, tokenizer in track(systems, title, console=console, disable=not console.is_terminal):
            told = tell(model, tokenizer, images, beams=options.beams)
            table.add_row(*row(name, told, scenes))
            if not held_out:
                options.out.mkdir(parents=True, exist_ok=True)
                best = told[place := shown(scenes)]
                draw_looks(options.out / f"{name}.png", images[place], best.words, best.weights)
        console.print(table)
    console.print(f"pictures {options.out}", soft_wrap=True)


if __name__ == "__main__":
    main()
