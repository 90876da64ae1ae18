"""POPE: yes-or-no questions about objects, in three splits that differ in how absent objects were chosen."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vocojax.evaluation.benchmarks.base import LMMS_EVAL, OFFICIAL, SHORT_ANSWER, Benchmark, Item, Missing
from vocojax.evaluation.benchmarks.files import find, find_optional, need_all, read_json_lines
from vocojax.evaluation.metrics import yes_no

FIRST_ID = {"random": 10_000_000, "popular": 20_000_000, "adversarial": 0}  # LLaVA adds these to a split's ids
SPLITS = tuple(FIRST_ID)
LLAVA_QUESTIONS = "llava_pope_test.jsonl"


class Pope(Benchmark):
    """`pope/coco_pope_<split>.json` and `pope/val2014/`.

    With all splits, ids are LLaVA's: read from its question file `llava_pope_test.jsonl` where that is there, else the
    split's own id plus LLaVA's offset. A single split has its own ids. Answers are matched by image and question, never
    by position alone: the random split exists with 2,910 and with 3,000 rows.

    Args:
      root: of all data.
      splits: of the benchmark.
    """

    conventions = (OFFICIAL, LMMS_EVAL)
    missing = Missing(False, "pairs answers and labels by position, so that a missing one shifts all others")
    text_fields = ("text", "answer")

    def __init__(self, root: Path, splits: Sequence[str] = SPLITS):
        self.name = "pope" if len(splits) > 1 else f"pope_{splits[0]}"
        self._splits = splits
        self._rows: dict[str, list[dict[str, Any]]] = {}
        for split in splits:
            path = find(root, "pope", f"coco_pope_{split}.json", f"coco/coco_pope_{split}.json")
            self._rows[split] = read_json_lines(path)
            need_all(self._rows[split], path, question_id=(int, str), image=str, text=str, label=str)
        self._images = find_optional(root, "pope", "val2014") or Path(root) / "coco" / "val2014"
        self._llava = find_optional(root, "pope", LLAVA_QUESTIONS) if len(splits) > 1 else None

    @functools.cached_property
    def items(self) -> list[Item]:
        """The questions, by split."""
        several = len(self._splits) > 1
        names = self._llava_ids()
        return [
            Item(names.get((split, row["image"], row["text"])) or
                 (str(FIRST_ID[split] + int(row["question_id"])) if several else str(row["question_id"])),
                 row["text"] + SHORT_ANSWER, (self._images / row["image"],), row["label"], split, row)
            for split, rows in self._rows.items() for row in rows
        ]

    def _llava_ids(self) -> dict[tuple[str, str, str], str]:
        """Returns LLaVA's ids by split, image and question."""
        if self._llava is None:
            return {}
        records = read_json_lines(self._llava)
        need_all(records, self._llava, question_id=(int, str), image=str, text=str, category=str)
        return {(each["category"], each["image"], _question(each["text"])): str(each["question_id"])
                for each in records}

    def locate(self, records: Sequence[Mapping[str, Any]]) -> list[str | None]:
        """Finds answers by id; by position where none has an id (POPE's own answer files) and the questions agree."""
        if len(records) == len(self.items) and all(
            "question" in record and self.identify(record) is None for record in records
        ):
            return [item.id if item.record["text"] == record["question"] else
                    f"question {record['question']!r} where the annotation has {item.record['text']!r}"
                    for item, record in zip(self.items, records, strict=True)]
        asked = {item.id: item.record["text"] for item in self.items}
        found = []
        for record in records:
            key, prompt = self.identify(record), record.get("prompt", record.get("question"))
            if key in asked and isinstance(prompt, str) and _question(prompt) != asked[key]:
                key = f"{key} with the question {_question(prompt)!r} (the annotation has {asked[key]!r})"
            found.append(key)
        return found

    def official_id(self, item: Item) -> int:
        """Returns the id as a number."""
        return int(item.id)

    def mark(self, item: Item, text: str, convention: str) -> float | None:
        """Returns 1 if the answer reads as the label."""
        said = _reader(convention)(text)
        return None if said == "other" else float(said == item.gold)

    def metrics(
        self, items: Sequence[Item], texts: Sequence[str | None], marks: Sequence[float], convention: str
    ) -> dict[str, float]:
        """Returns the means over the splits, F1 first, then each split's figures.

        lmms-eval's are over all questions together.
        """
        said = [_reader(convention)(text or "") for text in texts]
        golds = [item.gold for item in items]
        if convention == LMMS_EVAL:
            return {name: 100 * value for name, value in yes_no.detection_scores_lmms_eval(said, golds).items()}
        found: dict[str, dict[str, float]] = {}
        for split in dict.fromkeys(item.kind for item in items):
            chosen = [place for place, item in enumerate(items) if item.kind == split]
            found[split] = yes_no.detection_scores([said[i] for i in chosen], [golds[i] for i in chosen])
        means = {name: 100 * sum(each[name] for each in found.values()) / len(found)
                 for name in next(iter(found.values()))}
        single = {f"{name}, {split}": 100 * value for split, each in found.items() for name, value in each.items()}
        return means if len(found) == 1 else means | single


def _reader(convention: str) -> Any:
    return yes_no.pope_answer_lmms_eval if convention == LMMS_EVAL else yes_no.pope_answer


def _question(prompt: str) -> str:
    return prompt.replace(SHORT_ANSWER, "").replace(SHORT_ANSWER.strip(), "").strip()
