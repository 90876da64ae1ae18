"""The questions about the mosaics, as a benchmark."""

import functools
from typing import ClassVar

from vocojax.data.sources.easy_vqa import Split
from vocojax.data.sources.mosaic import MosaicSource
from vocojax.evaluation.benchmarks.base import Benchmark, Item
from vocojax.evaluation.metrics import exact_match
from vocojax.inference.decoding.sampling import SamplingConfig


class MosaicBenchmark(Benchmark):
    """The questions about the canvases of a split.

    Args:
      split: of `MosaicSource`.
      canvases: the first so many; None for all.
    """

    name = "mosaic"
    sampling: ClassVar[SamplingConfig] = SamplingConfig(max_new_tokens=4)

    def __init__(self, split: Split, canvases: int | None = None):
        self.source, self.split = MosaicSource(split), split
        self._canvases = range(len(self.source.tiles))[:canvases]

    @functools.cached_property
    def items(self) -> list[Item]:
        """The questions; an id is `CANVAS/NUMBER`."""
        images = {canvas: self.source.image(canvas) for canvas in self._canvases}
        return [Item(f"{canvas}/{number}", question.text, (images[canvas],), question.answer, question.kind)
                for canvas in self._canvases
                for number, question in enumerate(self.source.questions(canvas))]

    def mark(self, item: Item, text: str, convention: str) -> float:
        """Returns 1 for an exact match."""
        return float(exact_match(text, item.gold))
