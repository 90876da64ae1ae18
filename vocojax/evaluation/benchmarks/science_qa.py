"""ScienceQA, test split: multiple choice with a context, with and without an image."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vocojax.errors import InputError
from vocojax.evaluation.benchmarks.base import LETTER_ANSWER, LMMS_EVAL, OFFICIAL, Benchmark, Item, Missing
from vocojax.evaluation.benchmarks.files import find, need, read_json
from vocojax.evaluation.metrics.choices import LETTERS, science_qa_letter, science_qa_letter_lmms_eval
from vocojax.inference.decoding.sampling import SamplingConfig


class ScienceQa(Benchmark):
    """`scienceqa/problems.json`, `scienceqa/pid_splits.json` and `scienceqa/images/test/`.

    Args:
      root: of all data.
      images_only: leave out the questions without an image; their answers are passed over.
    """

    conventions = (OFFICIAL, LMMS_EVAL)
    sampling = SamplingConfig(max_new_tokens=1024)
    missing = Missing(True, "counts a missing answer as wrong, but leaves it out of the accuracy over images")

    def __init__(self, root: Path, images_only: bool = True):
        self.name = "scienceqa_image" if images_only else "scienceqa"
        self._path = find(root, "scienceqa", "problems.json")
        splits_path = find(root, "scienceqa", "pid_splits.json")
        problems, splits = read_json(self._path), read_json(splits_path)
        if not isinstance(problems, dict) or not isinstance(splits, dict) or not isinstance(splits.get("test"), list):
            raise InputError(f"{splits_path}: must hold the ids of the split 'test', and {self._path.name} the "
                             "problems")
        absent = [key for key in splits["test"] if key not in problems]
        if absent:
            raise InputError(f"{self._path}: lacks {len(absent)} problems of the test split, the first is {absent[0]}")
        self._problems: dict[str, Mapping[str, Any]] = {str(key): problems[key] for key in splits["test"]}
        for number, record in enumerate(self._problems.values()):
            need(record, self._path, number, question=str, choices=list, answer=int)
        if images_only:
            self.unscored_ids = frozenset(key for key, each in self._problems.items() if not each.get("image"))

    @functools.cached_property
    def items(self) -> list[Item]:
        """The questions."""
        return [Item(key, _prompt(each), self._image(key, each), LETTERS[each["answer"]],
                     "image" if each.get("image") else "text", each)
                for key, each in self._problems.items() if key not in self.unscored_ids]

    def _image(self, key: str, record: Mapping[str, Any]) -> tuple[Path, ...]:
        image = record.get("image")
        return (self._path.parent / "images" / "test" / key / image,) if image else ()

    def mark(self, item: Item, text: str, convention: str) -> float | None:
        """Returns 1 if the letter is right; a letter beyond the options is no answer."""
        letter = (science_qa_letter_lmms_eval if convention == LMMS_EVAL else science_qa_letter)(text)
        if letter is None or letter not in tuple(LETTERS[: min(5, len(item.record["choices"]))]):
            return None
        return float(letter == item.gold)

    def metrics(
        self, items: Sequence[Item], texts: Sequence[str | None], marks: Sequence[float], convention: str
    ) -> dict[str, float]:
        """Returns accuracy over the questions with an image and, where others are asked too, over all.

        As officially, a question without an answer does not count in the former.
        """
        imaged = [mark for item, text, mark in zip(items, texts, marks, strict=True)
                  if item.kind == "image" and text is not None]
        found = {"accuracy, image": 100 * sum(imaged) / len(imaged)} if imaged else {}
        return found if self.name == "scienceqa_image" else found | {"accuracy, all": 100 * sum(marks) / len(marks)}

    def by_kind(self, items: Sequence[Item], marks: Sequence[float]) -> Mapping[str, float]:
        """Returns nothing: the figures tell images and texts apart."""
        return {}


def _prompt(record: Mapping[str, Any]) -> str:
    context = f"Context: {record['hint']}\n" if record.get("hint") else ""
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, record["choices"], strict=False))
    return context + record["question"] + options + LETTER_ANSWER
