"""Mosaics: canvases of easy-VQA's images in a square grid, with questions that need to know which tile is where.

A canvas is made of tiles. A tile is an image of easy-VQA, cut to a square around its shape. The colour and shape of
every tile are drawn evenly from all 24 combinations. So the tiles of a canvas have T * log2(24) bits of information,
41.3 bits for 3 x 3 tiles, and a description that answers every question has as many.

Splits never share an image of easy-VQA. Everything follows from the split and the canvas's number.
"""

import functools
import io
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vocojax.data.conversation import Turn
from vocojax.data.sources.base import Sample
from vocojax.data.sources.easy_vqa import COLOURS, SHAPES, EasyVqaSource, Question, Split

CANVASES = {"train": 4000, "validation": 250, "test": 250}
_SEEDS = {"train": 5, "validation": 10, "test": 4}
TILE = 32  # side in pixels
MARGIN = 1.5  # side of a tile's cut-out, as a multiple of its shape's longer side
ROWS = {2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
COLUMNS = {2: ("left", "right"), 3: ("left", "center", "right")}
CAPTION = "describe ?"


class Tile(NamedTuple):
    """What a tile shows.

    Attributes:
      colour: one of easy-VQA's.
      shape: likewise.
    """

    colour: str
    shape: str


TILES = tuple(Tile(colour, shape) for colour in COLOURS for shape in SHAPES)


def bits_per_image(grid: int) -> float:
    """Returns the entropy of a canvas's tiles, in bits."""
    return grid * grid * math.log2(len(TILES))


class MosaicSource:
    """The canvases of a split, with the questions about each.

    Attributes:
      split: the split.
      grid: tiles on a side.
      tiles: of each canvas, row after row.

    Args:
      split: `train`, `validation` or `test`.
      threads_per_sample: the most questions in one sample; None for no limit.
      captions: whether each sample's first thread is its canvas's caption, which names all tiles in reading order.
      grid: tiles on a side, 2 or 3.

    Raises:
      MissingPackage: the package `easy-vqa` is not installed.
      InputError: an unknown split.
    """

    def __init__(self, split: Split, threads_per_sample: int | None = None, captions: bool = False, grid: int = 2):
        self.split, self.grid, self._captions = split, grid, captions
        self._pixels, kinds = _cut_outs(split)
        self._images_of = [np.flatnonzero(kinds == kind) for kind in range(len(TILES))]
        random = np.random.default_rng((grid, _SEEDS[split]))
        self._kinds = random.integers(len(TILES), size=(CANVASES[split], grid * grid))
        self.tiles = [tuple(TILES[kind] for kind in row) for row in self._kinds]
        self._groups = -(-QUESTIONS // (threads_per_sample or QUESTIONS))

    def __len__(self) -> int:
        return len(self.tiles) * self._groups

    def __getitem__(self, index: int) -> Sample:
        canvas, group = divmod(index, self._groups)
        questions = self.questions(canvas)[group :: self._groups]
        threads = [(Turn("user", q.text), Turn("assistant", q.answer)) for q in questions]
        if self._captions:
            threads.insert(0, (Turn("user", CAPTION), Turn("assistant", self.caption(canvas))))
        return Sample(f"mosaic/{self.split}/{canvas}", (self.image(canvas),), tuple(threads))

    def caption(self, canvas: int) -> str:
        """Returns the colours and shapes of a canvas's tiles in reading order."""
        return " ".join(f"{tile.colour} {tile.shape}" for tile in self.tiles[canvas])

    def pixels(self, canvas: int) -> np.ndarray:
        """Returns a canvas, uint8 [grid * TILE, grid * TILE, 3]."""
        random = np.random.default_rng((self.grid, _SEEDS[self.split], canvas, 0))
        chosen = [random.choice(self._images_of[kind]) for kind in self._kinds[canvas]]
        rows = self._pixels[chosen].reshape(self.grid, self.grid, TILE, TILE, 3)
        return rows.swapaxes(1, 2).reshape(self.grid * TILE, self.grid * TILE, 3)

    def image(self, canvas: int) -> bytes:
        """Returns a canvas as the content of a BMP file, which is written and read fastest."""
        buffer = io.BytesIO()
        Image.fromarray(self.pixels(canvas)).save(buffer, "BMP")
        return buffer.getvalue()

    def questions(self, canvas: int) -> list[Question]:
        """Returns the questions about a canvas. Each kind comes at fixed places in the order."""
        return ask(self.tiles[canvas], np.random.default_rng((self.grid, _SEEDS[self.split], canvas, 1)))


def ask(tiles: Sequence[Tile], random: np.random.Generator) -> list[Question]:
    """Draws questions about a canvas.

    Args:
      tiles: of the canvas, row after row.
      random: of the draws.
    """
    return [maker(tiles, random) for maker in _MAKERS]


def place_names(grid: int) -> list[str]:
    """Returns the names of a canvas's places, row after row."""
    return [f"{row} {column}" for row, column in itertools.product(ROWS[grid], COLUMNS[grid])]


def _pick(random: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(random.integers(len(choices)))]


def _colour_at(tiles: Sequence[Tile], random: np.random.Generator) -> Question:
    place = int(random.integers(len(tiles)))
    return Question(f"{place_names(math.isqrt(len(tiles)))[place]} color ?", tiles[place].colour, "binding")


def _shape_at(tiles: Sequence[Tile], random: np.random.Generator) -> Question:
    place = int(random.integers(len(tiles)))
    return Question(f"{place_names(math.isqrt(len(tiles)))[place]} shape ?", tiles[place].shape, "binding")


def _position(tiles: Sequence[Tile], random: np.random.Generator) -> Question:
    """Asks for a tile that is there once; without one, for the colour at a place."""
    single = [place for place, tile in enumerate(tiles) if tiles.count(tile) == 1]
    if not single:
        return _colour_at(tiles, random)
    place = single[int(random.integers(len(single)))]
    name = place_names(math.isqrt(len(tiles)))[place]
    return Question(f"{tiles[place].colour} {tiles[place].shape} where ?", name, "position")


def _existence(tiles: Sequence[Tile], random: np.random.Generator) -> Question:
    there = random.random() < 0.5
    wanted = [tile for tile in TILES if (tile in tiles) == there]
    tile = wanted[int(random.integers(len(wanted)))]
    return Question(f"any {tile.colour} {tile.shape} ?", "yes" if there else "no", "existence")


def _count(tiles: Sequence[Tile], random: np.random.Generator) -> Question:
    """Asks for the number of a shape, or of a colour that is there more often than not."""
    if random.random() < 0.5:
        word = _pick(random, SHAPES)
    else:
        word = _pick(random, [tile.colour for tile in tiles] if random.random() < 0.75 else COLOURS)
    return Question(f"how many {word} ?", str(sum(word in tile for tile in tiles)), "counting")


def _more(tiles: Sequence[Tile], random: np.random.Generator) -> Question:
    """Compares the numbers of two shapes or two colours, which differ if any do."""
    words = SHAPES if random.random() < 0.5 else COLOURS
    count = {word: sum(word in tile for tile in tiles) for word in words}
    pairs = [(one, other) for one in words for other in words if count[one] != count[other]]
    first, second = pairs[int(random.integers(len(pairs)))] if pairs else words[:2]
    return Question(f"more {first} than {second} ?", "yes" if count[first] > count[second] else "no", "comparison")


_MAKERS: tuple[Callable[[Sequence[Tile], np.random.Generator], Question], ...] = (
    _colour_at, _shape_at, _position, _position, _existence, _count, _count, _more,
) * 2
QUESTIONS = len(_MAKERS)  # about each canvas


@functools.lru_cache(maxsize=3)
def _cut_outs(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tiles' pixels, uint8 [images, TILE, TILE, 3], and what each shows, int [images], of `TILES`."""
    source = EasyVqaSource(split)
    pixels, kinds = [], []
    for index, path in enumerate(source.images):
        words = source.caption(index).split()
        if len(words) == 2:  # its questions name both
            pixels.append(_cut_out(path))
            kinds.append(TILES.index(Tile(*words)))
    return np.stack(pixels), np.array(kinds)


def _cut_out(path: Path) -> np.ndarray:
    """Returns an image cut to a square around its shape, uint8 [TILE, TILE, 3]."""
    image = Image.open(path).convert("RGB")
    array = np.asarray(image).astype(int)
    differs = np.abs(array - np.median(array.reshape(-1, 3), axis=0)).sum(-1) > 60
    rows, columns = np.flatnonzero(differs.any(1)), np.flatnonzero(differs.any(0))
    longer = max(np.ptp(rows), np.ptp(columns)) + 1
    side = min(int(MARGIN * longer), *image.size)
    start = lambda found: int(np.clip((found[0] + found[-1] + 1 - side) // 2, 0, image.width - side))
    left, top = start(columns), start(rows)
    return np.asarray(image.crop((left, top, left + side, top + side)).resize((TILE, TILE), Image.Resampling.BICUBIC))
