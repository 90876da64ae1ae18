"""Packers: the shuffled records dealt to a fixed number of them, each of which fills rows by itself.

Position i of the endless shuffled order belongs to packer i % count. A packer lays its records out, keeps a window of
them and fills one row after another from the window. What a row holds depends on its packer and on nothing else, so any
number of threads, worker processes and hosts may share the packers. A packer's state is the positions in its window and
the next one to read: when a run resumes, records are laid out again, but images of earlier rows are not decoded again.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import grain

from vocojax.data.images import ImageError
from vocojax.data.packing import RowShape, Size, best_fit
from vocojax.data.prepared import Prepared, PreparedSource
from vocojax.data.text_rows import TextRowShape
from vocojax.errors import VocojaxError
from vocojax.layout import LayoutError

AHEAD = 16  # records with videos that a packer lays out at once, to have them when it needs them
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
      pool: lays records with videos out, whose files must be read for that; None lays all out in the caller's thread.
    """

    def __init__(self, number: int, count: int, seed: int, source: PreparedSource,
                 shape: RowShape | TextRowShape, window: int, count_once: bool, pool: Executor | None = None):
        self._number, self._count, self._source, self._shape, self._size = number, count, source, shape, window
        self._order = grain.MapDataset.range(len(source)).shuffle(seed).repeat()
        self._counted = len(source) if count_once else None
        self._position = number
        self._window: list[tuple[int, Prepared]] = []
        self._pool = pool
        self._ahead: deque[Callable[[], Prepared]] = deque()  # of the positions from `_position` on

    def counts(self, position: int) -> bool:
        """Returns whether the record at a position is reported."""
        return self._counted is None or position < self._counted

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues after the row whose report had this `position` and `window`.

        Raises:
          StreamStateError: a record of the window could be used when the state was saved, and can't be any more.
        """
        self._position, self._window = state["position"], []
        self._ahead.clear()
        for position, laid_out in zip(state["window"], self._laying_out_all(state["window"]), strict=True):
            record = self._order[position]
            try:
                self._window.append((position, laid_out()))
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
            counts = self.counts(position)
            report.records += counts
            try:
                prepared = self._lay_out_next()
            except (LayoutError, ImageError) as error:
                failed += 1
                if counts:
                    report.skipped.append((error.reason, str(error)))
                continue
            failed = 0
            report.dropped_tokens += prepared.layout.dropped * counts
            self._window.append((position, prepared))

    def _lay_out_next(self) -> Prepared:
        """Lays out the record at the next position, and moves on by one; with videos, the following ones are begun."""
        position = self._position
        self._position += self._count
        laid_out = self._ahead.popleft() if self._ahead else self._laying_out(position)
        if self._pool is not None and self._source.reads_videos:
            for further in range(len(self._ahead), AHEAD):
                self._ahead.append(self._laying_out(self._position + further * self._count))
        return laid_out()

    def _laying_out(self, position: int) -> Callable[[], Prepared]:
        """Returns a function that returns the laid-out record; if records have videos, the pool begins with it now."""
        if self._pool is not None and self._source.reads_videos:
            return self._pool.submit(self._source.lay_out, self._order[position], position).result
        return functools.partial(self._source.lay_out, self._order[position], position)

    def _laying_out_all(self, positions: Sequence[int]) -> Iterator[Callable[[], Prepared]]:
        """Yields such a function for each position. The first record tells whether the others have videos."""
        yield from map(self._laying_out, positions[:1])
        yield from [self._laying_out(position) for position in positions[1:]]
