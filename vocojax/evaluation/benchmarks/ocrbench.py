"""OCRBench: a thousand questions about text in images; a point for each answer that contains a gold answer."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from vocojax.evaluation.benchmarks.base import LMMS_EVAL, OFFICIAL, SHORT_ANSWER, Benchmark, Item, Missing
from vocojax.evaluation.benchmarks.files import find, listed, need_all, read_json
from vocojax.evaluation.metrics.ocr import contains_gold, contains_gold_lmms_eval

GROUPS = {  # type of question -> its group in the table
    "Regular Text Recognition": "recognition",
    "Irregular Text Recognition": "recognition",
    "Artistic Text Recognition": "recognition",
    "Handwriting Recognition": "recognition",
    "Digit String Recognition": "recognition",
    "Non-Semantic Text Recognition": "recognition",
    "Scene Text-centric VQA": "scene text VQA",
    "Doc-oriented VQA": "document VQA",
    "Key Information Extraction": "key information",
    "Handwritten Mathematical Expression Recognition": "mathematical expressions",
}


class OcrBench(Benchmark):
    """`ocrbench/OCRBench.json` and `ocrbench/OCRBench_Images/`. Figures are points, not percentages."""

    name = "ocrbench"
    conventions = (OFFICIAL, LMMS_EVAL)
    missing = Missing(True, "gives a missing answer no point")
    text_fields = ("predict", "text", "answer")

    def __init__(self, root: Path):
        self._path = find(root, "ocrbench", "OCRBench.json")
        self._questions = listed(self._path, read_json(self._path))
        need_all(self._questions, self._path, id=(int, str), image_path=str, question=str, answers=(str, list),
                 type=str, dataset_name=str)

    @functools.cached_property
    def items(self) -> list[Item]:
        """The questions."""
        folder = self._path.parent / "OCRBench_Images"
        return [Item(str(each["id"]), each["question"] + SHORT_ANSWER, (folder / each["image_path"],), each["answers"],
                     each["type"], each) for each in self._questions]

    def mark(self, item: Item, text: str, convention: str) -> float:
        """Returns 1 if the answer contains a gold answer."""
        contains = contains_gold_lmms_eval if convention == LMMS_EVAL else contains_gold
        return float(contains(text, item.gold, item.record["dataset_name"]))

    def metrics(
        self, items: Sequence[Item], texts: Sequence[str | None], marks: Sequence[float], convention: str
    ) -> dict[str, float]:
        """Returns the points, and those of each group of the table."""
        groups = dict.fromkeys(GROUPS.values(), 0.0)
        for item, mark in zip(items, marks, strict=True):
            if item.kind in GROUPS:
                groups[GROUPS[item.kind]] += mark
        return {"points": sum(marks)} | groups

    def by_kind(self, items: Sequence[Item], marks: Sequence[float]) -> dict[str, float]:
        """Returns the points of each type of question."""
        points: dict[str, float] = {}
        for item, mark in zip(items, marks, strict=True):
            points[item.kind] = points.get(item.kind, 0.0) + mark
        return points

    def submission(self, texts: Mapping[str, str]) -> dict[str, str]:
        """Returns the official script's file: the annotation with each answer under `predict`."""
        return {"ocrbench.json": json.dumps([{**item.record, "predict": texts[item.id]} for item in self.items
                                             if item.id in texts], indent=4)}
