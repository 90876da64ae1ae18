"""VQAv2: soft accuracy against ten annotators; the labels of the test splits are hidden."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vocojax.evaluation.benchmarks.base import LMMS_EVAL, OFFICIAL, SHORT_ANSWER, Benchmark, Item, Missing
from vocojax.evaluation.benchmarks.files import find, listed, need_all, read_json
from vocojax.evaluation.metrics import accuracy_by_kind
from vocojax.evaluation.metrics.vqa import textvqa_answer, vqa_accuracy, vqa_accuracy_lmms_eval

LLAVA = "llava"  # the official rule on answers that went through TextVQA's cleaning first, as LLaVA submits them


class VqaV2(Benchmark):
    """`vqav2/v2_OpenEnded_mscoco_<split>_questions.json`, the annotations where they are public, and COCO's images.

    Args:
      root: of all data.
      split: `val2014`, `test-dev2015` or `test2015`.
    """

    conventions = (OFFICIAL, LLAVA, LMMS_EVAL)
    missing = Missing(True, "refuses a file that does not hold exactly the split's questions")

    def __init__(self, root: Path, split: str):
        self.name = {"val2014": "vqav2_val", "test-dev2015": "vqav2_test_dev", "test2015": "vqav2_test"}[split]
        path = find(root, "vqav2", f"v2_OpenEnded_mscoco_{split}_questions.json")
        self._questions = listed(path, read_json(path), "questions")
        need_all(self._questions, path, question_id=int, image_id=int, question=str)
        self._golds: dict[int, Mapping[str, Any]] = {}
        if split == "val2014":
            path = find(root, "vqav2", "v2_mscoco_val2014_annotations.json")
            annotations = listed(path, read_json(path), "annotations")
            need_all(annotations, path, question_id=int, answers=list, question_type=str, answer_type=str)
            self._golds = {each["question_id"]: each for each in annotations}
        images = "val2014" if split == "val2014" else "test2015"
        self._image = lambda number: path.parent / images / f"COCO_{images}_{number:012d}.jpg"

    @functools.cached_property
    def items(self) -> list[Item]:
        """The questions."""
        return [Item(str(each["question_id"]), each["question"] + SHORT_ANSWER, (self._image(each["image_id"]),),
                     self._golds.get(each["question_id"]), record=each) for each in self._questions]

    def mark(self, item: Item, text: str, convention: str) -> float:
        """Returns the soft accuracy."""
        if convention == LMMS_EVAL:
            return vqa_accuracy_lmms_eval(text, item.gold["answers"])
        return vqa_accuracy(textvqa_answer(text) if convention == LLAVA else text, item.gold["answers"])

    def by_kind(self, items: Sequence[Item], marks: Sequence[float]) -> dict[str, float]:
        """Returns accuracy by type of answer and by type of question."""
        return {f"{title}: {kind}": 100 * mean for title, field in (("answer", "answer_type"),
                                                                    ("question", "question_type"))
                for kind, mean in accuracy_by_kind(marks, [item.gold[field] for item in items]).items()}

    def official_id(self, item: Item) -> int:
        """Returns the id as a number."""
        return int(item.id)

    def submission(self, texts: Mapping[str, str]) -> dict[str, str]:
        """Returns the server's file, with answers cleaned as LLaVA submits them."""
        return {f"{self.name}_results.json": json.dumps(
            [{"question_id": int(key), "answer": textvqa_answer(text)} for key, text in texts.items()])}
