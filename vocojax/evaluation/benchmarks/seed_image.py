"""SEED-Bench, the image part: multiple choice over nine kinds of questions."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vocojax.evaluation.benchmarks.base import LETTER_ANSWER, LMMS_EVAL, OFFICIAL, Benchmark, Item, Missing
from vocojax.evaluation.benchmarks.files import find, listed, need_all, read_json
from vocojax.evaluation.metrics.choices import first_letter


class SeedImage(Benchmark):
    """`seed_bench/SEED-Bench.json` and `seed_bench/SEED-Bench-image/`; the official rule is LLaVA's.

    SEED-Bench's own script ranks the options by likelihood and reads no generated answers.
    """

    name = "seed_image"
    conventions = (OFFICIAL, LMMS_EVAL)
    missing = Missing(True, "counts a missing answer as wrong")
    text_fields = ("prediction", "text", "answer")

    def __init__(self, root: Path):
        self._path = find(root, "seed_bench", "SEED-Bench.json")
        self._content = read_json(self._path)
        self._questions = listed(self._path, self._content, "questions")
        need_all(self._questions, self._path, question_id=(str, int), data_type=str, question=str, choice_a=str)
        self.unscored_ids = frozenset(str(each["question_id"]) for each in self._questions if not _is_image(each))

    @functools.cached_property
    def items(self) -> list[Item]:
        """The questions about images."""
        names = {number: name for name, number in self._content.get("question_type", {}).items()}
        return [Item(str(each["question_id"]), _prompt(each),
                     (self._path.parent / "SEED-Bench-image" / str(each["data_id"]),), each.get("answer"),
                     str(names.get(each.get("question_type_id"), each.get("question_type_id", ""))), each)
                for each in self._questions if _is_image(each)]

    def mark(self, item: Item, text: str, convention: str) -> float | None:
        """Returns 1 if the answer is the letter; for lmms-eval, if it begins with it in any case."""
        if convention == LMMS_EVAL:
            letter = first_letter(text)
            return None if letter is None else float(letter == item.gold)
        return float(text == item.gold)

    def official_id(self, item: Item) -> str | int:
        """Returns the id as LLaVA reads it: a number where it is one."""
        return int(item.id) if item.id.isdecimal() else item.id

    def submission(self, texts: Mapping[str, str]) -> dict[str, str]:
        """Returns the leaderboard's file."""
        return {"seed_image.jsonl": "".join(json.dumps({"question_id": key, "prediction": text}) + "\n"
                                            for key, text in texts.items())}


def _is_image(record: Mapping[str, Any]) -> bool:
    return record["data_type"] == "image"


def _prompt(record: Mapping[str, Any]) -> str:
    options = "".join(f"\n{letter}. {record[f'choice_{letter.lower()}']}" for letter in "ABCD")
    return record["question"] + options + LETTER_ANSWER
