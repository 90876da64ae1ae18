"""Counts of what was read and skipped, and the limit on what may be skipped."""

import collections
import logging
from collections.abc import Mapping
from typing import Any

from vocojax.errors import VocojaxError

LOG = logging.getLogger(__name__)


class SkippedTooMany(VocojaxError, RuntimeError):
    """More records were skipped than the data config allows (`data.max_skipped_share`)."""


class Tally:
    """Counts of records, of skipped ones by reason, and of dropped text tokens, for each packer.

    Args:
      max_skipped_share: the share of records that may be skipped, from 0 to 1.
    """

    SHOWN = 20  # skipped records that are logged one by one
    TOLERANCE_FROM = 1000  # the share is taken of at least this many records, so that a few early ones don't stop a run

    def __init__(self, max_skipped_share: float):
        self.max_skipped_share = max_skipped_share
        self._records: collections.Counter[int] = collections.Counter()
        self._dropped_tokens: collections.Counter[int] = collections.Counter()
        self._skipped: dict[int, collections.Counter[str]] = collections.defaultdict(collections.Counter)

    def read(self, packer: int, records: int, dropped_tokens: int) -> None:
        """Adds records that were read, skipped ones included, and the text tokens cut off them."""
        self._records[packer] += records
        self._dropped_tokens[packer] += dropped_tokens

    def skip(self, packer: int, reason: str, message: str) -> None:
        """Counts and logs a record that can't be used.

        Raises:
          SkippedTooMany: the share of skipped records is above the limit.
        """
        self._skipped[packer][reason] += 1
        skipped, records = self.skipped(), self.records
        total = skipped.total()
        if total <= self.SHOWN:
            LOG.warning("skipped: %s%s", message, " (later ones are only counted)" if total == self.SHOWN else "")
        if total > self.max_skipped_share * max(records, self.TOLERANCE_FROM):
            counts = ", ".join(f"{reason}: {count}" for reason, count in skipped.most_common())
            raise SkippedTooMany(
                f"{total} of {records} records were skipped ({counts}), more than data.max_skipped_share "
                f"{self.max_skipped_share:g} allows; the last one: {message}"
            )

    @property
    def records(self) -> int:
        """Records read, skipped ones included."""
        return self._records.total()

    def skipped(self) -> collections.Counter[str]:
        """Returns the number of skipped records by reason."""
        total: collections.Counter[str] = collections.Counter()
        for counts in self._skipped.values():
            total.update(counts)
        return total

    def scalars(self) -> dict[str, int]:
        """Returns the counts as metrics."""
        skipped = {f"data/skipped/{reason}": count for reason, count in self.skipped().items()}
        return {"data/records": self.records, "data/dropped_tokens": self._dropped_tokens.total(), **skipped}

    def get_state(self, packer: int) -> dict[str, Any]:
        """Returns the counts of a packer as values for JSON."""
        return {"records": self._records[packer], "dropped_tokens": self._dropped_tokens[packer],
                "skipped": dict(self._skipped[packer])}

    def set_state(self, packer: int, counts: Mapping[str, Any]) -> None:
        """Sets a packer's counts to what `get_state` returned."""
        self._records[packer], self._dropped_tokens[packer] = counts["records"], counts["dropped_tokens"]
        self._skipped[packer] = collections.Counter(counts["skipped"])
