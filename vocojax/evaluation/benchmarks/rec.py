"""Referring expression comprehension on RefCOCO, RefCOCO+ and RefCOCOg: the box of what an expression names."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vocojax.data.boxes import Box, box_text, to_padded_square
from vocojax.data.sources.shikra import REC_QUESTION
from vocojax.evaluation.benchmarks.base import LMMS_EVAL, OFFICIAL, Item
from vocojax.evaluation.benchmarks.shikra import ShikraBenchmark
from vocojax.evaluation.metrics.boxes import NO_BOX, first_box_lmms_eval, iou, shikra_box, shikra_ious

IMAGES = ("coco/train2014", "train2014", "images/train2014")
THRESHOLD = 0.5


class Rec(ShikraBenchmark):
    """`shikra/REC_<data set>_<split>.jsonl`, with COCO's images of 2014.

    Official is Shikra's rule: boxes on the image padded to a square, a hit where IoU > 0.5. lmms-eval's: boxes as
    shares of the image itself, a hit where IoU >= 0.5.
    """

    conventions = (OFFICIAL, LMMS_EVAL)

    def __init__(self, name: str, root: Path, file: str):
        super().__init__(name, root, file, IMAGES, img_path=str, expression=str, bbox=list)
        self.notes = (f"question: {REC_QUESTION}",)

    @functools.cached_property
    def items(self) -> list[Item]:
        """The expressions; an item's gold box is in pixels (left, top, right, bottom)."""
        return [Item(self._id(number, each), REC_QUESTION.format(expression=each["expression"]),
                     (self._images / each["img_path"],), tuple(each["bbox"]), record=each)
                for number, each in enumerate(self._records)]

    def target(self, number: int) -> str:
        """Returns the box as Shikra writes it."""
        return box_text([self._gold(self.items[number], OFFICIAL)])

    def mark(self, item: Item, text: str, convention: str) -> float | None:
        """Returns 1 for a hit."""
        box = _read(text, convention)
        if box is None:
            return None
        overlap = self._overlap(box, item, convention)
        return float(overlap >= THRESHOLD if convention == LMMS_EVAL else overlap > THRESHOLD)

    def metrics(
        self, items: Sequence[Item], texts: Sequence[str | None], marks: Sequence[float], convention: str
    ) -> dict[str, float]:
        """Returns the share of hits and the mean IoU, in which an answer without a box counts as 0."""
        overlaps = [self._overlap(_read(text or "", convention) or NO_BOX, item, convention)
                    for item, text in zip(items, texts, strict=True)]
        kind = np.float64 if convention == LMMS_EVAL else np.float32
        return {"accuracy": 100 * sum(marks) / len(marks), "mean IoU": 100 * float(np.mean(overlaps, dtype=kind))}

    def _overlap(self, box: Box, item: Item, convention: str) -> float:
        gold = self._gold(item, convention)
        return iou(box, gold) if convention == LMMS_EVAL else float(shikra_ious([box], [gold])[0])

    def _gold(self, item: Item, convention: str) -> Box:
        width, height = self._size(item.record, self._images / item.record["img_path"])
        left, top, right, bottom = item.gold
        if convention == LMMS_EVAL:
            return left / width, top / height, right / width, bottom / height
        return to_padded_square((left, top, right, bottom), width, height)  # type: ignore[return-value]


def _read(text: str, convention: str) -> Box | None:
    return first_box_lmms_eval(text) if convention == LMMS_EVAL else shikra_box(text)
