"""Referring expression generation on RefCOCO, RefCOCO+ and RefCOCOg: CIDEr of a description of a box."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vocojax.data.boxes import box_text, to_padded_square
from vocojax.data.sources.shikra import REG_QUESTION
from vocojax.evaluation.benchmarks.base import Item
from vocojax.evaluation.benchmarks.rec import IMAGES
from vocojax.evaluation.benchmarks.shikra import ShikraBenchmark
from vocojax.evaluation.metrics.captions import cider


class Reg(ShikraBenchmark):
    """The boxes of `shikra/REC_<data set>_<split>.jsonl`: one question per object, all its expressions as references.

    An id is the object's number in the order of the file, from 0. Needs Java and the extra `benchmarks`.
    """

    def __init__(self, name: str, root: Path, file: str):
        super().__init__(name, root, file, IMAGES, img_path=str, expression=str, bbox=list)
        self.notes = (f"question: {REG_QUESTION}",
                      "document frequencies come from the split: only whole splits compare")

    @functools.cached_property
    def items(self) -> list[Item]:
        """The objects."""
        groups: dict[tuple[str, tuple[float, ...]], list[str]] = {}
        first: dict[tuple[str, tuple[float, ...]], Mapping[str, Any]] = {}
        for record in self._records:
            key = (record["img_path"], tuple(record["bbox"]))
            groups.setdefault(key, []).append(record["expression"])
            first.setdefault(key, record)
        return [Item(str(number), REG_QUESTION, (self._images / key[0],), tuple(expressions), record=first[key])
                for number, (key, expressions) in enumerate(groups.items())]

    def prompt(self, item: Item) -> str:
        """Returns the question with its box, for which the image's size is read."""
        width, height = self._size(item.record, self._images / item.record["img_path"])
        return item.prompt.format(box=box_text([to_padded_square(item.record["bbox"], width, height)]))

    def mark(self, item: Item, text: str, convention: str) -> float:
        """Returns 0: a description has a score only among all others."""
        return 0.0

    def metrics(
        self, items: Sequence[Item], texts: Sequence[str | None], marks: Sequence[float], convention: str
    ) -> dict[str, float]:
        """Returns CIDEr times 100."""
        overall, _ = cider({item.id: text or "" for item, text in zip(items, texts, strict=True)},
                           {item.id: item.gold for item in items})
        return {"CIDEr": 100 * overall}
