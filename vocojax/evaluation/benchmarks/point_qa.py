"""PointQA: questions about a box or a point of an image, answered by "The answer is ... ."."""

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vocojax.evaluation.benchmarks.base import Item
from vocojax.evaluation.benchmarks.shikra import ShikraBenchmark
from vocojax.evaluation.metrics.boxes import box_text, to_padded_square
from vocojax.evaluation.metrics.point_qa import point_qa_answer
from vocojax.inference.requests import Request

PROMPT = "Please quickly answer this question: {question}{place} in a simple manner."
IMAGES = ("vg", "vg/VG_100K", "VG_100K")


class PointQa(ShikraBenchmark):
    """`shikra/pointQA_local_<split>.jsonl` or `shikra/pointQA_twice_<split>.jsonl`, with Visual Genome's images.

    Args:
      name: of the benchmark.
      root: of all data.
      file: the annotation file.
      question: field of the question: `question`, or the variant of the questions of `twice`.
      place: what the question names: `bbox` or `point`.
    """

    def __init__(self, name: str, root: Path, file: str, question: str, place: str):
        super().__init__(name, root, file, IMAGES, file_path=str, answer=str, **{question: str, place: list})
        self._question, self._place = question, place
        self.notes = (f"prompt: {PROMPT}",)

    @functools.cached_property
    def items(self) -> list[Item]:
        """The questions."""
        return [Item(self._id(number, each), each[self._question], (self._images / each["file_path"],), each["answer"],
                     record=each) for number, each in enumerate(self._records)]

    def target(self, number: int) -> str:
        """Returns the answer's sentence as Shikra writes it."""
        return f"The answer is {self.items[number].gold} ."

    def requests(self, items: Iterable[Item] | None = None) -> list[Request]:
        """Returns the questions with their places, for which the images' sizes are read."""
        chosen = self.items if items is None else items
        return super().requests(Item(item.id, self._prompt(item.record, item.prompt), item.visuals) for item in chosen)

    def _prompt(self, record: Mapping[str, Any], question: str) -> str:
        width, height = self._size(record, self._images / record["file_path"])
        place = to_padded_square(record[self._place], width, height)
        return PROMPT.format(question=question, place=box_text([place]))

    def mark(self, item: Item, text: str, convention: str) -> float | None:
        """Returns 1 if answer and target state the same, case kept.

        The target is read like an answer, so that a gold answer with a period is cut there.
        """
        said = point_qa_answer(text)
        return None if said is None else float(said == point_qa_answer(f"The answer is {item.gold} ."))
