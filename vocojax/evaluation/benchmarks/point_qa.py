"""PointQA: questions about a box or a point of an image, answered by "The answer is ... ."."""

import functools
from pathlib import Path

from vocojax.data.boxes import box_text, to_padded_square
from vocojax.data.sources.shikra import POINT_QUESTION
from vocojax.evaluation.benchmarks.base import Item
from vocojax.evaluation.benchmarks.shikra import ShikraBenchmark
from vocojax.evaluation.metrics.point_qa import point_qa_answer

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
        self.notes = (f"prompt: {POINT_QUESTION}",)

    @functools.cached_property
    def items(self) -> list[Item]:
        """The questions."""
        return [Item(self._id(number, each), each[self._question], (self._images / each["file_path"],), each["answer"],
                     record=each) for number, each in enumerate(self._records)]

    def target(self, number: int) -> str:
        """Returns the answer's sentence as Shikra writes it."""
        return f"The answer is {self.items[number].gold} ."

    def prompt(self, item: Item) -> str:
        """Returns the question with its place, for which the image's size is read."""
        width, height = self._size(item.record, self._images / item.record["file_path"])
        place = to_padded_square(item.record[self._place], width, height)
        return POINT_QUESTION.format(question=item.prompt, place=box_text([place]))

    def mark(self, item: Item, text: str, convention: str) -> float | None:
        """Returns 1 if answer and target state the same, case kept.

        The target is read like an answer, so that a gold answer with a period is cut there.
        """
        said = point_qa_answer(text)
        return None if said is None else float(said == point_qa_answer(f"The answer is {item.gold} ."))
