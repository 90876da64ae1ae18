"""Lanes: the shuffled records dealt to a fixed number of packers.

Position i of the endless shuffled order belongs to lane i % lanes. A lane lays its records out, keeps a window of them
and fills one row after another from it, by itself: what a row holds depends on the lane and on nothing else, so that
any number of threads, worker processes and hosts may share the lanes. A lane's state is the positions in its window
and the next one it will read: laying out is repeated when a run resumes, decoding is not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grain

from vocojax.data.images import ImageError
from vocojax.data.packing import RowShape, Size, best_fit
from vocojax.data.prepared import Prepared, PreparedSource
from vocojax.errors import VocojaxError
from vocojax.layout import LayoutError

PATIENCE = 1000  # records in a row that a lane may fail to use before it goes on with what it has


class StreamStateError(VocojaxError, ValueError):
    """A saved state does not belong to this stream, or is not all of it."""


@dataclass
class RowReport:
    """What happened in a lane on the way to one row, and the lane's state behind it.

    Attributes:
      position, window: of the lane's state, see `Lane`.
      records, dropped_tokens: read for the row, unusable records included.
      skipped: (reason, message) of every record that can't be used.
      empty: nothing usable was found.
    """

    lane: int
    position: int = 0
    window: tuple[int, ...] = ()
    records: int = 0
    dropped_tokens: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    empty: bool = False


@dataclass(frozen=True)
class Plan:
    """A row that is planned: its members with their positions in the order, images still on disk."""

    members: Sequence[tuple[int, Prepared]]
    report: RowReport


class Lane:
    """One packer.

    Args:
      number, lanes: which of how many.
      seed: of the shuffling; every epoch has another order.
      source: the records.
      shape: of a row.
      window: laid-out records among which those are sought that fill a row best.
      count_once: report the records of the first epoch only, where they are kept in memory from then on.
    """

    def __init__(self, number: int, lanes: int, seed: int, source: PreparedSource, shape: RowShape, window: int,
                 count_once: bool):
        self._number, self._lanes, self._source, self._shape, self._size = number, lanes, source, shape, window
        self._order = grain.MapDataset.range(len(source)).shuffle(seed).repeat()
        self._counted = len(source) if count_once else None
        self._position = number
        self._window: list[tuple[int, Prepared]] = []

    def counts(self, position: int) -> bool:
        """Whether what happens to the record at a position is reported."""
        return self._counted is None or position < self._counted

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on behind the row whose report had this `position` and `window`.

        Raises:
          StreamStateError: a record of the window, which could be used when the state was saved, can't be any more.
        """
        self._position, self._window = state["position"], []
        for position in state["window"]:
            record = self._order[position]
            try:
                self._window.append((position, self._source.lay_out(record)))
            except (LayoutError, ImageError) as error:
                raise StreamStateError(f"record #{record} could be used when the data state was saved and now can't: "
                                       f"{error}: restore its file, or the batches would be others") from error

    def next_row(self) -> Plan:
        """Plans the lane's next row."""
        report = RowReport(self._number)
        self._fill(report)
        room = Size(self._shape.length, self._shape.images, self._shape.targets)
        chosen = best_fit([prepared.size for _, prepared in self._window], room)
        members = [self._window[i] for i in chosen]
        self._window = [entry for i, entry in enumerate(self._window) if i not in set(chosen)]
        report.position, report.window = self._position, tuple(position for position, _ in self._window)
        report.empty = not members
        return Plan(members, report)

    def _fill(self, report: RowReport) -> None:
        failed = 0
        while len(self._window) < self._size and failed < PATIENCE:
            position = self._position
            self._position += self._lanes
            counts = self.counts(position)
            report.records += counts
            try:
                prepared = self._source.lay_out(self._order[position])
            except (LayoutError, ImageError) as error:
                failed += 1
                if counts:
                    report.skipped.append((error.reason, str(error)))
                continue
            failed = 0
            report.dropped_tokens += prepared.layout.dropped * counts
            self._window.append((position, prepared))
