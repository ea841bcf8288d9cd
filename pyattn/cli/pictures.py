"""`pyattn caption`: pictures in, captions out, with pictures of where each word was seen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from pyattn.check import RangeError
from pyattn.cli.console import chosen_device
from pyattn.cli.models import load
from pyattn.cli.options import configurable
from pyattn.cli.text import Attention, Beams, Device, Model, one_line, tokenizer_beside


@configurable
def caption(
    model: Model,
    images: Annotated[list[Path], typer.Argument(help="Pictures: JPEG, PNG, WebP, GIF, BMP, TIFF or PPM.")],
    pictures: Annotated[
        Path | None, typer.Option(help="Folder for a picture of each: every word beside where the model looked.")
    ] = None,
    beams: Beams = 4,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a caption.", show_default="the model's context")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures described at once.")] = 64,
    attention: Attention = "pyattn",
    device: Device = None,
) -> None:
    """Describe pictures with Show, Attend and Tell: a line for each, its file and behind a tab its caption.

    A picture is cut to its middle square and scaled. With --pictures, that of the first is 1.png, and so on. Nothing is
    written before all are read.

    [bold]A whole example[/bold]

    pyattn train caption --images flickr8k --out runs/caption\n
    pyattn caption --model runs/caption/model --pictures runs/looks one.jpg two.jpg
    """
    from pyattn.decoding.captions import tell
    from pyattn.models.caption import OWN_TYPE, ShowAttendTell
    from pyattn.training.images import read_image

    network = load(model, {OWN_TYPE: ShowAttendTell}, attention=attention).to(chosen_device(device))
    tokenizer = tokenizer_beside(model, network.config.vocab)
    if (size := network.config.image_size) is None:
        raise RangeError(f"images: expected a model with an encoder, {model} has one of grids alone")
    given = torch.stack([read_image(path, size) for path in images])
    found = tell(network, tokenizer, given, beams=beams, batch=batch, most=tokens)
    for number, (path, image, told) in enumerate(zip(images, given, found, strict=True), 1):
        if pictures is not None:
            from pyattn.decoding.pictures import draw_looks

            pictures.mkdir(parents=True, exist_ok=True)
            draw_looks(pictures / f"{number}.png", image, told.words, told.weights)
        typer.echo(f"{one_line(str(path))}\t{one_line(told.text)}")
