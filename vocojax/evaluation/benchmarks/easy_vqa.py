"""easy-VQA: every question of a split, answered greedily and compared with the gold answer."""

import functools
from typing import ClassVar

from vocojax.data.sources.easy_vqa import EasyVqaSource, Split
from vocojax.evaluation.benchmarks.base import Benchmark, Item
from vocojax.evaluation.metrics import exact_match
from vocojax.inference.decoding.sampling import SamplingConfig


class EasyVqaBenchmark(Benchmark):
    """The questions of a split with their images.

    Args:
      split: of easy-VQA.
    """

    name = "easy_vqa"
    sampling: ClassVar[SamplingConfig] = SamplingConfig(max_new_tokens=4)

    def __init__(self, split: Split = "test"):
        self._source = EasyVqaSource(split)

    @functools.cached_property
    def items(self) -> list[Item]:
        """The questions; an id is `IMAGE/NUMBER`, the image's file without suffix and the question's number."""
        return [Item(f"{image.stem}/{number}", question.text, (image,), question.answer, question.kind)
                for image, questions in zip(self._source.images, self._source.questions, strict=True)
                for number, question in enumerate(questions)]

    def mark(self, item: Item, text: str, convention: str) -> float:
        """Returns 1 for an exact match."""
        return float(exact_match(text, item.gold))
