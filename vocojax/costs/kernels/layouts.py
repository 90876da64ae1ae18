"""The four layouts that kernels are compared on, as mask vectors made by `layout.py`."""

from __future__ import annotations

import dataclasses

import numpy as np

from vocojax.costs.rows import TEXT, Rows, lay_out, rows_of, typical_rows
from vocojax.layout import UnitShape

ROWS = 8  # typical rows of the first layout


@dataclasses.dataclass(frozen=True)
class Layout:
    """Rows to attend over.

    Attributes:
      title: what they hold.
      start: int32 `[rows, length]`, see `IntervalMask`.
      stop: int32 `[rows, length]`.
    """

    title: str
    start: np.ndarray
    stop: np.ndarray

    @classmethod
    def of(cls, title: str, rows: Rows) -> Layout:
        """Returns the mask of packed rows as a layout."""
        return cls(title, rows.start, rows.stop)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.start.shape[0]

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.start.shape[1]

    def tiles_with_a_visible_pair(self, block_q: int, block_k: int) -> int:
        """Counts tiles by looking at every pair, a band of queries at a time: the check on the kernels' lists."""
        count = 0
        edges = np.arange(0, self.length, block_k)
        j = np.arange(self.length)
        for start, stop in zip(self.start, self.stop, strict=True):
            for low in range(0, self.length, block_q):
                i = np.arange(low, min(low + block_q, self.length))[:, None]
                seen = ((start[i] <= j) & (j <= i) & (i < stop)).any(axis=0)
                count += int(np.logical_or.reduceat(seen, edges).sum())
        return count


def layouts() -> dict[str, Layout]:
    """Returns the layouts by their letter."""
    low, high = TEXT
    unit, frame = UnitShape(573, 1), UnitShape(255, 1)  # with BOS and newline units of 576 and 258 tokens
    return {
        "a": Layout.of(f"{ROWS} rows of 2,048: typical samples (unit of 579, text {low}-{high})", typical_rows(ROWS)),
        "b": Layout.of("one unit of 576 and 128 text tokens", rows_of([lay_out(1, 128, unit)], "voco")),
        "c": Layout.of("video: 64 frames of 258 and 128 text tokens", rows_of([lay_out(64, 128, frame)], "voco")),
        "d": Layout.of("causal 8,192", rows_of([lay_out(0, 8192)], "causal")),
    }
