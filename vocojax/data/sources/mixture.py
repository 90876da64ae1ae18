"""Several sources as one, each with a weight."""

import bisect
import itertools
from collections.abc import Sequence

import grain

from vocojax.data.sources.base import Sample, Source
from vocojax.errors import InputError

CHOICE = 0  # seed that chooses which records a weight's fraction takes once more


class MixtureSource:
    """One epoch of several sources, in which each record of a source is `weight` times.

    A weight of 2 takes every record twice; one of 0.25 takes a quarter of the records, always the same ones. The stream
    shuffles the epoch as a whole, so a source's share of the rows is that of its length times its weight.

    Args:
      sources: sources and their weights.

    Raises:
      InputError: a weight is not above 0.
    """

    def __init__(self, sources: Sequence[tuple[Source, float]]):
        self._parts: list[tuple[Source, grain.MapDataset]] = []
        for source, weight in sources:
            if not weight > 0:
                raise InputError(f"the weight of a source must be > 0, got {weight}")
            length = max(1, round(weight * len(source))) if len(source) else 0
            order = grain.MapDataset.range(max(len(source), 1)).shuffle(CHOICE).repeat()
            self._parts.append((source, order[:length] if length else order[:0]))
        self._ends = list(itertools.accumulate(len(order) for _, order in self._parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Sample:
        part = bisect.bisect_right(self._ends, index)
        source, order = self._parts[part]
        return source[order[index - (self._ends[part - 1] if part else 0)]]
