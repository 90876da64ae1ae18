"""Typical rows: what a LLaVA stage packs, laid out by `layout.py` and packed as the pipeline packs.

Every figure of this package that needs rows of samples takes them from here: the fill of rows (`data`), a step's
images, targets and visible pairs (`steps`), and the kernels' table (`kernels`). One distribution stands for LLaVA's
instructions: text of 20 to 900 tokens, all lengths alike; 6 % of the samples are text alone, the others have one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from vocojax.data.config import DataConfig
from vocojax.data.packers import Packer
from vocojax.data.packing import Item, RowShape, Size, pack_row
from vocojax.data.prepared import Prepared, PreparedSource
from vocojax.layout import Encoded, SampleLayout, Span, UnitShape, Visibility, lay_out_sample

TEXT = (20, 900)  # tokens of a sample's text, the smallest and the largest number
TEXT_ALONE = 0.06  # share of samples without an image
SEED = 0
UNIT = UnitShape(576, 1)  # of the 7B at 336 px with one VoCo token: 579 tokens


class LetterTokenizer:
    """A tokenizer of one token per character: text of any number of tokens without a vocabulary."""

    bos_id = 1
    voco_token = "<voco>"

    def __init__(self, voco_id: int = 3):
        self.voco_id = voco_id

    def encode(self, text: str) -> Encoded:
        """Returns id 2 for every character, and the VoCo token's own id where it is written out."""
        ids: list[int] = []
        ends: list[int] = []
        at = 0
        while at < len(text):
            is_voco = text.startswith(self.voco_token, at)
            at += len(self.voco_token) if is_voco else 1
            ids.append(self.voco_id if is_voco else 2)
            ends.append(at)
        return Encoded(ids, ends)


@dataclass(frozen=True)
class Rows:
    """Packed rows, as their mask and the means of what they hold.

    Attributes:
      start: int32 [R, S], see `IntervalMask`.
      stop: int32 [R, S].
      tokens: of a row, padding left out.
      images: of a row.
      text: tokens of text of a row, the newline after its units included.
    """

    start: np.ndarray
    stop: np.ndarray
    tokens: float
    images: float
    text: float


def typical_rows(
    count: int, length: int = 2048, images: int = 3, unit: UnitShape = UNIT, visibility: Visibility = "voco",
    window: int = DataConfig.pack_window,
) -> Rows:
    """Returns rows that a packer makes of typical samples.

    The first rows of a packer are fuller than later ones, while its window still has every length to choose from. So as
    many rows as the window has samples are made and dropped before.

    Args:
      count: how many rows.
      length: tokens of a row; longer samples are cut, as the pipeline does.
      images: of a row at most.
      unit: the shape of a unit.
      visibility: who sees whom.
      window: samples among which the packer seeks those that fill a row.
    """
    shape = RowShape(length, images, 0, 0, unit.tokens, (("", visibility),))
    packer = Packer(0, 1, SEED, cast(PreparedSource, _TypicalSource(unit, length)), shape, window, False)
    plans = [packer.next_row() for _ in range(window + count)][window:]
    samples = [[prepared.layout for _, prepared in plan.members] for plan in plans]
    return _pack(samples, shape)


def rows_of(samples: Sequence[SampleLayout], visibility: Visibility) -> Rows:
    """Returns one row of exactly these samples."""
    units, tokens = sum(sample.num_units for sample in samples), sum(map(len, samples))
    return _pack([samples], RowShape(tokens, units, 0, 0, samples[0].unit.tokens, (("", visibility),)))


def lay_out(num_units: int, text: int, unit: UnitShape = UNIT, most: int | None = None) -> SampleLayout:
    """Lays out a sample with these numbers of units and tokens of text, at most `most` tokens in all.

    The newline after the units, in a sample without units the BOS, is one of the tokens of text.
    """
    return lay_out_sample("typical", num_units, [[Span("a" * (text - 1))]], LetterTokenizer(), unit, most or 10**6)


class _TypicalSource:
    """An endless source of typical samples, in place of a `PreparedSource`. A record is the same in every run."""

    def __init__(self, unit: UnitShape, length: int):
        self._unit, self._length = unit, length

    def __len__(self) -> int:
        return 2**20

    def lay_out(self, record: int, position: int = 0) -> Prepared:
        random = np.random.default_rng((SEED, record))
        images = int(random.random() >= TEXT_ALONE)
        layout = lay_out(images, int(random.integers(TEXT[0], TEXT[1] + 1)), self._unit, self._length)
        return Prepared(record, layout, (), (), Size(len(layout), images, 0))


def _pack(samples: Sequence[Sequence[SampleLayout]], shape: RowShape) -> Rows:
    """Packs lists of samples into rows, with images of no pixels."""
    pixels = np.zeros((0, 0, 3), np.uint8)
    packed = [pack_row([Item(layout, (pixels,) * layout.num_units) for layout in row], shape) for row in samples]
    mean = lambda count: sum(count(layout) for row in samples for layout in row) / len(samples)
    return Rows(
        start=np.stack([row["start"] for row in packed]),
        stop=np.stack([row["stop"] for row in packed]),
        tokens=mean(len),
        images=mean(lambda layout: layout.num_units),
        text=mean(lambda layout: len(layout) - layout.text_start),
    )
