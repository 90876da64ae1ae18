"""GQA, testdev balanced: exact match, with the official script's breakdowns."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vocojax.errors import InputError
from vocojax.evaluation.benchmarks.base import LMMS_EVAL, OFFICIAL, SHORT_ANSWER, Benchmark, Item, Missing
from vocojax.evaluation.benchmarks.files import find, need, read_json
from vocojax.evaluation.metrics.exact import accuracy_by_kind, gqa_answer, gqa_distribution, without_punctuation

FINAL_STEPS = ("exist", "query: name", "choose name")  # operations that are no step of reasoning


class Gqa(Benchmark):
    """`gqa/testdev_balanced_questions.json` and `gqa/images/`.

    Consistency, validity and plausibility need files that testdev does not have.
    """

    name = "gqa"
    conventions = (OFFICIAL, LMMS_EVAL)
    missing = Missing(True, "stops at the first question without a prediction")
    id_fields = ("question_id", "id", "questionId")
    text_fields = ("prediction", "text", "answer")

    def __init__(self, root: Path):
        self._path = find(root, "gqa", "testdev_balanced_questions.json")
        self._questions = read_json(self._path)
        if not isinstance(self._questions, dict):
            raise InputError(f"{self._path}: must hold an object of questions by their ids")
        for number, record in enumerate(self._questions.values()):
            need(record, self._path, number, question=str, imageId=str, types=dict)
        self.unscored_ids = frozenset(key for key, each in self._questions.items() if not each.get("isBalanced", True))

    @functools.cached_property
    def items(self) -> list[Item]:
        """The balanced questions."""
        folder = self._path.parent / "images"
        return [Item(key, record["question"] + SHORT_ANSWER, (folder / f"{record['imageId']}.jpg",),
                     record.get("answer"), "open" if record["types"]["structural"] == "query" else "binary", record)
                for key, record in self._questions.items() if key not in self.unscored_ids]

    def mark(self, item: Item, text: str, convention: str) -> float:
        """Returns 1 if the answer is the gold answer."""
        if convention == LMMS_EVAL:
            return float(without_punctuation(text) == without_punctuation(item.gold))
        return float(gqa_answer(text) == item.gold)

    def metrics(
        self, items: Sequence[Item], texts: Sequence[str | None], marks: Sequence[float], convention: str
    ) -> dict[str, float]:
        """Returns accuracy and the distribution score (lower is better)."""
        found = {"accuracy": 100 * sum(marks) / len(marks)}
        distribution = gqa_distribution([item.gold for item in items], [gqa_answer(text or "") for text in texts],
                                        [item.record.get("groups", {}).get("global") for item in items])
        return found if distribution is None else found | {"distribution": distribution}

    def by_kind(self, items: Sequence[Item], marks: Sequence[float]) -> dict[str, float]:
        """Returns accuracy by answer type, structural and semantic type, steps of reasoning and number of words."""
        groups: dict[str, list[Any]] = {
            "": [item.kind for item in items],
            "structural type ": [item.record["types"]["structural"] for item in items],
            "semantic type ": [item.record["types"].get("semantic") or "none" for item in items],
            "steps ": [_steps(item.record.get("semantic", ())) for item in items],
            "words ": [len(item.record["question"].split()) for item in items],
        }
        return {f"{title}{kind}": 100 * mean for title, kinds in groups.items()
                for kind, mean in accuracy_by_kind(marks, kinds).items()}

    def submission(self, texts: Mapping[str, str]) -> dict[str, str]:
        """Returns the official script's file of predictions."""
        return {"testdev_balanced_predictions.json": json.dumps(
            [{"questionId": key, "prediction": gqa_answer(text)} for key, text in texts.items()])}


def _steps(operations: Sequence[Mapping[str, Any]]) -> int:
    written = [f"{each['operation']}: {each['argument']}" for each in operations]
    return sum(not any(final in each for final in FINAL_STEPS) for each in written)
