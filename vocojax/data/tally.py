"""What was read and what was skipped, counted, and the limit to it."""

import collections
import logging
from collections.abc import Mapping
from typing import Any

from vocojax.errors import VocojaxError

LOG = logging.getLogger(__name__)


class SkippedTooMany(VocojaxError, RuntimeError):
    """More records were skipped than the data config allows."""


class Tally:
    """Counts records, skipped ones by reason, and dropped text tokens, each under the lane that read them."""

    SHOWN = 20  # skipped records that are logged one by one
    TOLERANCE_FROM = 1000  # the share of skipped records is judged as if at least this many had been read

    def __init__(self, max_skipped_share: float):
        self.max_skipped_share = max_skipped_share
        self._records: collections.Counter[int] = collections.Counter()
        self._dropped_tokens: collections.Counter[int] = collections.Counter()
        self._skipped: dict[int, collections.Counter[str]] = collections.defaultdict(collections.Counter)

    def read(self, lane: int, records: int, dropped_tokens: int) -> None:
        """Counts records that were read, skipped ones included."""
        self._records[lane] += records
        self._dropped_tokens[lane] += dropped_tokens

    def skip(self, lane: int, reason: str, message: str) -> None:
        """Counts and logs a record that can't be used; `SkippedTooMany` once their share is over the limit."""
        self._skipped[lane][reason] += 1
        skipped, records = self.skipped(), self.records
        total = skipped.total()
        if total <= self.SHOWN:
            LOG.warning("skipped: %s%s", message, " (further ones are only counted)" if total == self.SHOWN else "")
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
        """Skipped records by reason."""
        total: collections.Counter[str] = collections.Counter()
        for counts in self._skipped.values():
            total.update(counts)
        return total

    def scalars(self) -> dict[str, int]:
        """The counts, as metrics."""
        skipped = {f"data/skipped/{reason}": count for reason, count in self.skipped().items()}
        return {"data/records": self.records, "data/dropped_tokens": self._dropped_tokens.total(), **skipped}

    def get_state(self, lane: int) -> dict[str, Any]:
        """The counts of a lane, as JSON-able values."""
        return {"records": self._records[lane], "dropped_tokens": self._dropped_tokens[lane],
                "skipped": dict(self._skipped[lane])}

    def set_state(self, lane: int, counts: Mapping[str, Any]) -> None:
        """Sets a lane's counts to what `get_state` gave."""
        self._records[lane], self._dropped_tokens[lane] = counts["records"], counts["dropped_tokens"]
        self._skipped[lane] = collections.Counter(counts["skipped"])
