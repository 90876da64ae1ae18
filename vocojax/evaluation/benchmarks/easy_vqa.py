"""easy-VQA: every question of a split, answered greedily and compared with the gold answer."""

from collections.abc import Sequence

import numpy as np

from vocojax.data.sources.easy_vqa import EasyVqaSource, Question, Split
from vocojax.evaluation.metrics import accuracy_by_kind, exact_match
from vocojax.evaluation.retention import Score
from vocojax.inference.decoding.sampling import SamplingConfig
from vocojax.inference.requests import Answer, Request

SAMPLING = SamplingConfig(max_new_tokens=4)


class EasyVqaBenchmark:
    """The questions of a split with their images; see `base.Benchmark`.

    Args:
      split: of easy-VQA.
      max_images: ask about the first so many images only; None for all.

    Attributes:
      image_paths: of the images.
      questions: about all of them.
      image_of: int [questions], the index of each question's image.
    """

    def __init__(self, split: Split, max_images: int | None = None):
        source = EasyVqaSource(split)
        self.image_paths = source.images[:max_images]
        asked = source.questions[:max_images]
        self.questions: list[Question] = [question for questions in asked for question in questions]
        self.image_of = np.array([image for image, questions in enumerate(asked) for _ in questions])

    def requests(self) -> list[Request]:
        """Returns every question with its image."""
        return [Request(question.text, (self.image_paths[image],), SAMPLING)
                for question, image in zip(self.questions, self.image_of, strict=True)]

    def score(self, answers: Sequence[Answer]) -> Score:
        """Returns exact match, overall and by kind of question."""
        correct = [exact_match(answer.text, question.answer)
                   for answer, question in zip(answers, self.questions, strict=True)]
        return Score(sum(correct) / len(correct), accuracy_by_kind(correct, [q.kind for q in self.questions]))
