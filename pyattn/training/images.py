"""Image files as pixels of one size, by Pillow; or an error that names the file."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pyattn.check import PyattnError

MOST_PIXELS = 2**26  # of a picture; a file of a few bytes may claim to have more than memory does
MOST_BYTES = 2**30  # which MOST_PIXELS do not need, whatever they are
# Of Pillow's formats those that pictures come in. Others would start programs (EPS), or are no pictures.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


class ImageError(PyattnError, ValueError):
    """A file is no picture, a damaged one, or one of too many pixels."""


def read_image(path: Path, size: int) -> Tensor:
    """A picture as uint8 [3, size, size]: its middle square, scaled.

    Greyscale and CMYK become RGB, what is transparent white. Of an animation it is the first frame. A camera's note
    which side is up is followed. The number of pixels is checked before any is decoded.

    Raises:
        ImageError: the file cannot be read, is no picture of a known format, is damaged or cut off, or has more than
            MOST_PIXELS pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, of many pixels and of odd metadata
            with Image.open(path, formats=_FORMATS) as file:
                _check_size(path, *file.size)
                pixels = _scaled(_as_rgb(ImageOps.exif_transpose(file)), size)
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(f"image: {path} has more than {MOST_PIXELS:,} pixels") from None
    except OSError as error:
        raise ImageError(f"image: cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        raise ImageError(f"image: {path} is damaged ({str(error)[:200]})") from error
    return torch.from_numpy(pixels).movedim(-1, 0).contiguous()


def read_bytes(path: Path) -> bytes:
    """All of a picture's file.

    Raises:
        ImageError: it has more than MOST_BYTES.
        OSError: it cannot be read.
    """
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ImageError(f"image: {path} has {size:,} bytes, more than {MOST_BYTES:,}")
    return path.read_bytes()


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise ImageError(f"image: {path} has {width:,} x {height:,} pixels, more than {MOST_PIXELS:,}")


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its numbers are floating, of which none is known to be white")
    if image.mode.startswith("I"):  # 16 bits, of which Pillow would keep the lower ones
        return Image.fromarray((numpy.asarray(image).clip(0, 65535) // 257).astype(numpy.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _scaled(image: Image.Image, size: int) -> numpy.ndarray:
    """The middle square as [size, size, 3]."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return numpy.array(square.resize((size, size), Image.Resampling.BICUBIC))
