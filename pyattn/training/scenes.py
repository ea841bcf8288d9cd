"""Pictures of coloured shapes with captions that can be checked: each is a function of a seed and a number alone.

    picture   64 x 64; 1 to 4 objects in the cells of a 3 x 3 grid, of one kind or two. A kind is a size, a colour and a
              shape. Where an object stands in its cell, how large it is exactly, its tint and the background are drawn.
    captions  5 templates, which name every kind with its number, and say where things are:
                  two small red circles above a large blue square
    held out  some pairs of colour and shape, which no scene for training has: each colour and each shape is in others.

`pyattn.training.scene_captions` writes the captions, and reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from pyattn.check import RangeError

SIZES = ("small", "large")
COLOURS = {
    "red": (0.9, 0.12, 0.12),
    "orange": (1.0, 0.55, 0.0),
    "yellow": (0.95, 0.9, 0.2),
    "green": (0.15, 0.7, 0.2),
    "blue": (0.15, 0.35, 0.95),
    "purple": (0.6, 0.15, 0.8),
    "pink": (1.0, 0.6, 0.8),
    "white": (0.95, 0.95, 0.95),
}
SHAPES = ("circle", "square", "triangle", "cross", "star")
HELD_OUT = (("red", "square"), ("yellow", "star"), ("blue", "circle"), ("purple", "triangle"), ("white", "cross"))

SEEDS = 2**32
SIDE = 64  # pixels of a picture
CELLS = 3  # of the grid, on either side
MOST = 4  # objects of a scene
_CELL = SIDE / CELLS
_RADII = {"small": (5.0, 5.8), "large": (8.6, 9.6)}  # in pixels
_TINT = 0.06  # how far a channel of an object may be from its colour's
_DARK = 0.25  # the brightest channel of a background
_SUBPIXELS = 4  # on either side, whose mean is a pixel's coverage
_POINTS = 5  # of a star
_INNER = 0.42  # radius of a star between its points


@dataclass(frozen=True, slots=True)
class Kind:
    """What objects of one kind have in common."""

    size: str
    colour: str
    shape: str


@dataclass(frozen=True, slots=True)
class Object:
    """An object in a cell, counted row by row from the top left."""

    kind: Kind
    cell: int

    @property
    def row(self) -> int:
        return self.cell // CELLS

    @property
    def column(self) -> int:
        return self.cell % CELLS


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects, those of one kind together, and what the picture's details are drawn from.

    The kind of the leftmost object comes first, of several in a column that of the topmost one. Captions keep that
    order: a model that asks before it reads the last word (as Xu et al.'s) can then know what is to be named next.
    """

    objects: tuple[Object, ...]
    number: tuple[int, ...]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """One or two."""
        return tuple(dict.fromkeys(each.kind for each in self.objects))

    def of(self, kind: Kind) -> tuple[Object, ...]:
        return tuple(each for each in self.objects if each.kind == kind)


def scene(seed: int, index: int, *, held_out: bool = False) -> Scene:
    """A scene without any pair of HELD_OUT, or with one at least.

    Raises:
        RangeError: the seed is not below SEEDS: numpy would draw the same for others and their numbers.
    """
    if not 0 <= seed < SEEDS:
        raise RangeError(f"seed: expected one of a scene's, in [0, 2^32), got {seed}")
    number = (seed, index, int(held_out))
    generator = numpy.random.default_rng(number)
    count = int(generator.integers(1, MOST + 1))
    kinds = [_kind(generator, held_out)]
    if count > 1 and generator.random() < 0.7:
        # The other kind may be of any pair that a scene of this sort has.
        while (other := _kind(generator, held_out and generator.random() < 0.5)) == kinds[0]:
            pass
        kinds.append(other)
    first = int(generator.integers(1, count)) if len(kinds) == 2 else count
    cells = generator.choice(CELLS * CELLS, count, replace=False).tolist()
    objects = [Object(kinds[place >= first], cell) for place, cell in enumerate(cells)]
    leftmost = min(objects, key=lambda each: (each.column, each.row)).kind
    return Scene(tuple(sorted(objects, key=lambda each: each.kind != leftmost)), number)


def picture(scene: Scene) -> numpy.ndarray:
    """The scene as uint8 [3, SIDE, SIDE]."""
    generator = numpy.random.default_rng((*scene.number, 1))  # the scene itself was drawn without the 1
    image = numpy.broadcast_to(generator.uniform(0, _DARK, (3, 1, 1)), (3, SIDE, SIDE)).copy()
    for each in scene.objects:
        radius = generator.uniform(*_RADII[each.kind.size])
        room = _CELL / 2 - radius
        x, y = (_CELL * (place + 0.5) + generator.uniform(-room, room) for place in (each.column, each.row))
        colour = numpy.clip(numpy.array(COLOURS[each.kind.colour]) + generator.uniform(-_TINT, _TINT, 3), 0, 1)
        _paint(image, each.kind.shape, colour, x, y, radius)
    return (255 * image).round().astype(numpy.uint8)


def _kind(generator: numpy.random.Generator, held_out: bool) -> Kind:
    pairs = HELD_OUT if held_out else _SEEN
    return Kind(SIZES[generator.integers(len(SIZES))], *pairs[generator.integers(len(pairs))])


_SEEN = tuple((colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT)


def _paint(image: numpy.ndarray, shape: str, colour: numpy.ndarray, x: float, y: float, radius: float) -> None:
    """Blends an object into image [3, SIDE, SIDE], as far as it covers each pixel."""
    left, top = int(x - radius), int(y - radius)
    right, bottom = min(SIDE, int(x + radius) + 1), min(SIDE, int(y + radius) + 1)
    fine = (numpy.arange(_SUBPIXELS) + 0.5) / _SUBPIXELS
    u = (numpy.arange(left, right)[:, None] + fine).ravel() - x
    v = (numpy.arange(top, bottom)[:, None] + fine).ravel() - y
    inside = _is_inside(shape, u[None, :] / radius, v[:, None] / radius)
    cover = inside.reshape(bottom - top, _SUBPIXELS, right - left, _SUBPIXELS).mean((1, 3))
    part = image[:, top:bottom, left:right]
    part += cover * (colour[:, None, None] - part)


def _is_inside(shape: str, u: numpy.ndarray, v: numpy.ndarray) -> numpy.ndarray:
    """Whether points belong to a shape of radius 1; u goes to the right and v down."""
    if shape == "circle":
        return u * u + v * v <= 1
    if shape == "square":
        return (abs(u) <= 0.85) & (abs(v) <= 0.85)
    if shape == "triangle":
        return (v <= 0.75) & (abs(u) <= 0.55 * (v + 1))
    if shape == "cross":
        return ((abs(u) <= 0.33) & (abs(v) <= 1)) | ((abs(v) <= 0.33) & (abs(u) <= 1))
    # A star is 2 * _POINTS triangles, each mirrored in the next: the angle from the nearest point's ray decides.
    half = numpy.pi / _POINTS
    angle = abs((numpy.arctan2(u, -v) + half) % (2 * half) - half)
    distance = numpy.hypot(u, v)
    edge_x, edge_y = _INNER * numpy.cos(half) - 1, _INNER * numpy.sin(half)
    return edge_x * distance * numpy.sin(angle) - edge_y * (distance * numpy.cos(angle) - 1) >= 0
