"""GRIT, referring expressions (ablation): the box of what an expression names, on images of many sources."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vocojax.data.boxes import Box, from_padded_square
from vocojax.data.sources.shikra import REC_QUESTION
from vocojax.errors import InputError
from vocojax.evaluation.benchmarks.base import Benchmark, Item, Missing
from vocojax.evaluation.benchmarks.files import find, listed, need_all, read_json
from vocojax.evaluation.metrics.boxes import first_shikra_box, grit_iou
from vocojax.files import parse_json

THRESHOLD = 0.5


class GritRefexp(Benchmark):
    """`grit/samples/ablation/refexp.json` and `grit/images/`.

    The first box of an answer counts, turned from the padded square into pixels; a hit is IoU > 0.5 there. The official
    prediction file holds boxes (`bboxes`) in pixels in place of texts; it is accepted too.
    """

    name = "grit_refexp"
    missing = Missing(True, "stops at the first one")
    id_fields = ("question_id", "id", "example_id")
    text_fields = ("text", "answer", "bboxes")
    notes = (f"question: {REC_QUESTION}",)

    def __init__(self, root: Path):
        self._path = find(root, "grit", "samples/ablation/refexp.json", "refexp.json")
        self._samples = listed(self._path, read_json(self._path))
        need_all(self._samples, self._path, input=dict)

    @functools.cached_property
    def items(self) -> list[Item]:
        """The expressions; the gold box is in pixels."""
        folder = next((each for each in self._path.parents if (each / "images").is_dir()), self._path.parent) / "images"
        return [self._item(each, folder) for each in self._samples]

    def _item(self, sample: Mapping[str, Any], folder: Path) -> Item:
        asked, meta = sample["input"], sample.get("meta", {})
        boxes = (sample.get("output") or sample.get("gt") or {}).get("bboxes")
        source = "new source" if meta.get("is_new_source") else "same source"
        path = asked.get("image_path") or asked.get("image_id") or ""
        return Item(str(asked.get("example_id", path)), REC_QUESTION.format(expression=asked["task_query"]),
                    (folder / path,), tuple(boxes[0]) if boxes else None,
                    "distorted" if meta.get("is_distorted") else source, sample)

    def answer_of(self, value: object) -> object:
        """Returns an answer's text; boxes in pixels become a text that `mark` reads."""
        return json.dumps({"bboxes": value}) if _are_boxes(value) else value

    def mark(self, item: Item, text: str, convention: str) -> float | None:
        """Returns 1 for a hit."""
        box = _pixel_box(text)
        if box is None:
            square = first_shikra_box(text)
            if square is None:
                return None
            box = from_padded_square(square, *self._size(item))
        return float(grit_iou(box, item.gold) > THRESHOLD)

    def _size(self, item: Item) -> tuple[int, int]:
        path = item.visuals[0]
        assert isinstance(path, Path)
        try:
            with Image.open(path) as image:
                return image.size
        except OSError as error:
            raise InputError(f"{path}: its size is needed to score boxes, and it can't be read: {error}") from error

    def metrics(
        self, items: Sequence[Item], texts: Sequence[str | None], marks: Sequence[float], convention: str
    ) -> dict[str, float]:
        """Returns the mean of the accuracies on known and on new sources, as GRIT aggregates, then each."""
        kinds = self.by_kind(items, marks)
        sources = [kinds[kind] for kind in ("same source", "new source") if kind in kinds] or list(kinds.values())
        return {"accuracy": sum(sources) / len(sources)} | {f"accuracy, {kind}": each for kind, each in kinds.items()}


def _pixel_box(text: str) -> Box | None:
    """Returns the first box of an answer that holds boxes in pixels."""
    if not text.startswith('{"bboxes"'):
        return None
    try:
        boxes = parse_json(text)["bboxes"]
    except (ValueError, KeyError):  # torn, or not an object of boxes
        return None
    if not _are_boxes(boxes):
        return None
    return tuple(map(float, boxes[0])) if boxes else (0.0, 0.0, 0.0, 0.0)  # type: ignore[return-value]


def _are_boxes(value: object) -> bool:
    """Returns whether a value is a list of lists of four numbers."""
    return isinstance(value, list) and all(
        isinstance(box, list) and len(box) == 4 and all(type(edge) in (int, float) for edge in box) for box in value)
