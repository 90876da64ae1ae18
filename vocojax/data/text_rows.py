"""Rows of text for training in two stages: the units run alone, and a row of text reads them as a key/value prefix.

A row is a dict of numpy arrays (S = tokens of text, U = units per row, N = VoCo tokens of a unit, P = U * N keys of the
prefix, R = tokens of a unit with room for padding before it, T = target slots):

    ids, positions, start         int32 [S]     text and its interval mask
    stop                          int32 [P + S]
    images                        uint8 [U, F, 128], pixels one after the other and then zeros, in whole memory tiles
    unit_slot                     int32 [U]     the place of the unit among the prefix's U, -1 for no unit
    unit_position                 int32 [U]     rotary position of the unit's first token
    unit_ids, unit_positions, unit_vision, unit_start, unit_stop     int32 [R]   one unit alone, the same in every row
    target_index, target_ids      int32 [T]     as in `packing.py`
    num_tokens                    int32 []      tokens of text that are not padding

Two samples of a row, A with two units and B with one (N = 2), and the prefix with room for four:

    query \\ key   . .  B B  A A A A | a a | b b
      a           . .  . .  x x x x   x x   . .      the window of A's text begins at A's first key
      b           . .  x x  . . . .   . .   x x      A's keys stop where A's text ends

Units of later samples come first in the prefix. So `start` hides what belongs to later samples, `stop` hides what
belongs to earlier ones, and two vectors describe any packing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vocojax.data.config import DataConfig
from vocojax.data.packing import Item, Row, Size, row_of
from vocojax.errors import InputError
from vocojax.layout import IGNORE, LayoutError, Role, SampleLayout, UnitShape

LANES, TILE_ROWS = 128, 32  # of a tile of uint8 in a TPU's memory
NEWLINES = 4  # tokens of a unit's newline that there is room for, whatever the tokenizer
UNIT_ARRAYS = ("unit_ids", "unit_positions", "unit_vision", "unit_start", "unit_stop")


@dataclass(frozen=True)
class TextRowShape:
    """The static shape of a row of text.

    Attributes:
      length: tokens of text (S).
      images: the most units (U).
      targets: the most targets (T).
      image_size: side of an image, in pixels.
      unit: numbers of vision tokens and VoCo tokens in a unit.
      alone: a unit laid out alone; None where only shapes matter.
    """

    length: int
    images: int
    targets: int
    image_size: int
    unit: UnitShape
    alone: SampleLayout | None = None

    def __post_init__(self) -> None:
        if self.alone is not None and len(self.alone) > self.unit_room:
            raise InputError(f"the tokenizer writes a newline in more than {NEWLINES} tokens: use another tokenizer "
                             "or plan=single_pass")

    @property
    def unit_room(self) -> int:
        """Tokens of a unit with room for padding before it (R)."""
        return 1 + self.unit.tokens + NEWLINES + self.unit.vocos

    @property
    def prefix(self) -> int:
        """Keys of the prefix (P)."""
        return self.images * self.unit.vocos

    def size(self, layout: SampleLayout) -> Size:
        """Returns the room that a sample needs: its units have their own, its text takes tokens of the row."""
        return Size(len(layout) - layout.text_start, layout.num_units, layout.num_targets)

    def most_tokens(self, num_units: int) -> int:
        """Returns the most tokens that a sample with `num_units` units may have, its units included."""
        return self.length + num_units * (len(self.alone) if self.alone is not None else 0)

    def empty(self, count: int) -> Row:
        """Returns arrays for `count` rows with arbitrary values; `pack` fills one row after another."""
        array = lambda *shape: np.empty((count, *shape), np.int32)
        arrays = {name: array(self.length) for name in ("ids", "positions", "start")}
        arrays["stop"] = array(self.prefix + self.length)
        arrays["images"] = np.empty((count, self.images, *tiles(self.image_size)), np.uint8)
        arrays |= {name: array(self.images) for name in ("unit_slot", "unit_position")}
        arrays |= {name: array(self.unit_room) for name in UNIT_ARRAYS}
        arrays |= {name: array(self.targets) for name in ("target_index", "target_ids")}
        return arrays | {"num_tokens": array()}

    def pack(self, items: Sequence[Item], row: Row | None = None) -> Row:
        """Packs items into one row, in order. Padding sees nobody and is seen by nobody.

        Args:
          items: samples that fit into one row.
          row: arrays to write to, with any values in them; new ones if None.

        Raises:
          LayoutError: the items don't fit.
        """
        sizes = [self.size(item.layout) for item in items]
        used = [sum(column) for column in zip(*sizes, strict=True)]
        if any(count > room for count, room in zip(used, (self.length, self.images, self.targets), strict=False)):
            raise LayoutError(items[-1].layout.record, f"does not fit into a row of {self.length} tokens of text, "
                              f"{self.images} images and {self.targets} targets", "larger than a row")
        row = row_of(self.empty(1), 0) if row is None else row
        row["ids"][:], row["positions"][:], row["target_index"][:], row["target_ids"][:] = 0, 0, 0, IGNORE
        row["stop"][:] = np.arange(self.prefix + self.length)
        row["start"][:] = row["stop"][self.prefix :]
        row["unit_slot"][:], row["unit_position"][:] = -1, 0
        self._write_unit(row)
        token = image = target = 0
        for item, (size, units, targets) in zip(items, sizes, strict=True):
            slots = slice(self.images - image - units, self.images - image)
            self._write_text(row, item.layout, slice(token, token + size), slots)
            predicted = np.flatnonzero(item.layout.labels != IGNORE)
            row["target_index"][target : target + targets] = token + predicted - item.layout.text_start - 1
            row["target_ids"][target : target + targets] = item.layout.labels[predicted]
            own = slice(image, image + units)
            row["unit_slot"][own] = np.arange(slots.start, slots.stop)
            row["unit_position"][own] = item.layout.view("voco").positions[: item.layout.text_start][
                :: max(item.layout.unit_length, 1)]
            for at, pixels in enumerate(item.images, image):
                flat = row["images"][at].reshape(-1)
                flat[: pixels.size], flat[pixels.size :] = pixels.reshape(-1), 0
            token, image, target = token + size, own.stop, target + targets
        row["images"][image:] = 0
        row["num_tokens"][...] = token
        return row

    def _write_text(self, row: Row, layout: SampleLayout, place: slice, slots: slice) -> None:
        """Writes a sample's text to its place in the row, and shows it the units in its slots of the prefix."""
        kept = layout.num_units * self.unit.vocos
        view, key = layout.view_after_prefix("voco", kept), self.prefix + place.start
        keys = slice(slots.start * self.unit.vocos, slots.stop * self.unit.vocos)
        row["ids"][place], row["positions"][place] = layout.ids[layout.text_start :], view.positions
        row["start"][place] = keys.start if kept else key
        stop = view.stop - kept + key
        # A key that no text sees stops before the sample's first query.
        row["stop"][keys], row["stop"][key : self.prefix + place.stop] = stop[:kept], stop[kept:]

    def _write_unit(self, row: Row) -> None:
        """Writes one unit at the end of its room."""
        room = np.arange(self.unit_room, dtype=np.int32)
        row["unit_ids"][:], row["unit_positions"][:], row["unit_vision"][:] = 0, 0, -1
        row["unit_start"][:] = row["unit_stop"][:] = room
        if self.alone is None:
            return
        padding, view = self.unit_room - len(self.alone), self.alone.view("voco")
        place = slice(padding, self.unit_room)
        row["unit_ids"][place], row["unit_positions"][place] = self.alone.ids, view.positions
        row["unit_vision"][place][self.alone.roles == Role.VISION] = np.arange(self.unit.tokens)
        row["unit_start"][place] = view.start + padding
        row["unit_stop"][place] = view.stop + padding


def tiles(image_size: int) -> tuple[int, int]:
    """Returns the shape in which an image is kept on a device: rows of 128 bytes, in whole tiles of a TPU's memory.

    Any other shape of uint8 has a default layout there that XLA first copies to run chunk after chunk.
    """
    return -(-3 * image_size**2 // (TILE_ROWS * LANES)) * TILE_ROWS, LANES


def text_row_shape(
    data: DataConfig, image_size: int, unit: UnitShape, alone: SampleLayout | None = None
) -> TextRowShape:
    """Returns the shape of a stage's rows of text.

    Args:
      data: data config of the stage; `row_length` counts text.
      image_size: side of an image, in pixels.
      unit: numbers of tokens in a unit.
      alone: a unit laid out alone; None where only shapes matter.
    """
    return TextRowShape(data.row_length, data.images_per_row, data.target_slots, image_size, unit, alone)
