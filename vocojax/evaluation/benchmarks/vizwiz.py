"""VizWiz: soft accuracy against ten annotators; the labels of the test split are hidden."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vocojax.evaluation.benchmarks.base import LMMS_EVAL, OFFICIAL, SHORT_ANSWER, Benchmark, Item, Missing
from vocojax.evaluation.benchmarks.files import find, listed, need_all, read_json
from vocojax.evaluation.benchmarks.vqav2 import LLAVA
from vocojax.evaluation.metrics.vqa import textvqa_accuracy, textvqa_answer, vizwiz_accuracy

UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


class VizWiz(Benchmark):
    """`vizwiz/<split>.json` and `vizwiz/<split>/` with the images. A question's id is its image's file name.

    LLaVA's ids are the numbers in those names.

    Args:
      root: of all data.
      split: `val` or `test`.
    """

    conventions = (OFFICIAL, LLAVA, LMMS_EVAL)
    missing = Missing(True, "refuses a file that does not hold exactly the split's images")
    id_fields = ("question_id", "id", "image")

    def __init__(self, root: Path, split: str):
        self.name = f"vizwiz_{split}"
        self._path = find(root, "vizwiz", f"{split}.json", f"Annotations/{split}.json")
        self._questions = listed(self._path, read_json(self._path))
        need_all(self._questions, self._path, image=str, question=str)

    @functools.cached_property
    def items(self) -> list[Item]:
        """The questions."""
        folder = self._path.parent / self.name.removeprefix("vizwiz_")
        return [Item(each["image"], each["question"] + UNANSWERABLE + SHORT_ANSWER, (folder / each["image"],),
                     [one["answer"] for one in each["answers"]] if "answers" in each else None,
                     each.get("answer_type") or "", each) for each in self._questions]

    def identify(self, record: Mapping[str, Any]) -> str | None:
        """Returns the image's file name, for LLaVA's numbers too."""
        key = super().identify(record)
        return f"VizWiz_{self.name.removeprefix('vizwiz_')}_{int(key):08d}.jpg" if key and key.isdecimal() else key

    def mark(self, item: Item, text: str, convention: str) -> float:
        """Returns the soft accuracy."""
        if convention == LMMS_EVAL:
            return textvqa_accuracy(text, item.gold)
        return vizwiz_accuracy(textvqa_answer(text) if convention == LLAVA else text, item.gold)

    def submission(self, texts: Mapping[str, str]) -> dict[str, str]:
        """Returns the server's file, with answers cleaned as LLaVA submits them."""
        return {f"{self.name}_results.json": json.dumps(
            [{"image": key, "answer": textvqa_answer(text)} for key, text in texts.items()])}
