"""Packers: the shuffled records dealt to a fixed number of them, each of which fills rows by itself.

Position i of the endless shuffled order belongs to packer i % count. A packer lays its records out, keeps a window of
them and fills one row after another from the window. What a row holds depends on its packer and on nothing else, so any
number of threads, worker processes and hosts may share the packers. A packer's state is the positions in its window and
the next one to read: when a run resumes, records are laid out again, but images of earlier rows are not decoded again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grain

from vocojax.data.images import ImageError
from vocojax.data.packing import RowShape, Size, best_fit
from vocojax.data.prepared import Prepared, PreparedSource
from vocojax.data.text_rows import TextRowShape
from vocojax.errors import VocojaxError
from vocojax.layout import LayoutError

PATIENCE = 1000  # unusable records in a row after which a packer makes do with the window that it has


class StreamStateError(VocojaxError, ValueError):
    """A saved state that does not belong to this stream, or is only a part of one."""


@dataclass
class RowReport:
    """A packer's report on one row, and its state after that row.

    Attributes:
      packer: its number.
      position: the next position of the shuffled order that it will read.
      window: positions of the records that are laid out and wait for a row.
      records: records read for the row, unusable ones included.
      dropped_tokens: tokens that were cut off these records.
      skipped: (reason, message) of every record that can't be used.
      empty: whether no usable record was found.
    """

    packer: int
    position: int = 0
    window: tuple[int, ...] = ()
    records: int = 0
    dropped_tokens: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    empty: bool = False


@dataclass(frozen=True)
class PlannedRow:
    """A planned row.

    Attributes:
      members: (position in the order, record) of what goes into the row; images are not read yet.
      report: what the packer did to plan it.
    """

    members: Sequence[tuple[int, Prepared]]
    report: RowReport


class Packer:
    """One of the packers that share the shuffled records.

    Args:
      number: which one, from 0.
      count: how many there are.
      seed: seed of the shuffling; every epoch has another order.
      source: the records.
      shape: shape of a row.
      window: number of laid-out records from which those are chosen that fill a row best.
      count_once: report records of the first epoch only, because they are kept in memory from then on.
    """

    def __init__(self, number: int, count: int, seed: int, source: PreparedSource,
                 shape: RowShape | TextRowShape, window: int, count_once: bool):
        self._number, self._count, self._source, self._shape, self._size = number, count, source, shape, window
        self._order = grain.MapDataset.range(len(source)).shuffle(seed).repeat()
        self._counted = len(source) if count_once else None
        self._position = number
        self._window: list[tuple[int, Prepared]] = []

    def counts(self, position: int) -> bool:
        """Returns whether the record at a position is reported."""
        return self._counted is None or position < self._counted

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues after the row whose report had this `position` and `window`.

        Raises:
          StreamStateError: a record of the window could be used when the state was saved, and can't be any more.
        """
        self._position, self._window = state["position"], []
        for position in state["window"]:
            record = self._order[position]
            try:
                self._window.append((position, self._source.lay_out(record, position)))
            except (LayoutError, ImageError) as error:
                raise StreamStateError(f"record #{record} could be used when the data state was saved and now can't: "
                                       f"{error}: restore its file, or the batches would be different ones") from error

    def next_row(self) -> PlannedRow:
        """Plans the next row."""
        report = RowReport(self._number)
        self._fill(report)
        room = Size(self._shape.length, self._shape.images, self._shape.targets)
        chosen = best_fit([prepared.size for _, prepared in self._window], room)
        members = [self._window[i] for i in chosen]
        self._window = [entry for i, entry in enumerate(self._window) if i not in set(chosen)]
        report.position, report.window = self._position, tuple(position for position, _ in self._window)
        report.empty = not members
        return PlannedRow(members, report)

    def _fill(self, report: RowReport) -> None:
        failed = 0
        while len(self._window) < self._size and failed < PATIENCE:
            position = self._position
            self._position += self._count
            counts = self.counts(position)
            report.records += counts
            try:
                prepared = self._source.lay_out(self._order[position], position)
            except (LayoutError, ImageError) as error:
                failed += 1
                if counts:
                    report.skipped.append((error.reason, str(error)))
                continue
            failed = 0
            report.dropped_tokens += prepared.layout.dropped * counts
            self._window.append((position, prepared))
