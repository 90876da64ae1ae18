"""easy-VQA: every question of a split, answered greedily and compared with the gold answer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vocojax.data.sources.easy_vqa import EasyVqaSource, Question, Split
from vocojax.evaluation.metrics import accuracy_by_kind, exact_match
from vocojax.evaluation.retention import Score
from vocojax.inference.assistant import Assistant
from vocojax.inference.caches.cache import VocoCache
from vocojax.inference.decoding.sampling import SamplingConfig
from vocojax.inference.many import Way, answer_many
from vocojax.inference.requests import Request
from vocojax.inference.visuals import Visual

SAMPLING = SamplingConfig(max_new_tokens=4)


@dataclass(frozen=True)
class Answers:
    """A model's answers to the questions of a split, in the split's order.

    Attributes:
      texts: the answers.
      logits: fp32 [questions, vocabulary], of each answer's first token.
    """

    texts: list[str]
    logits: np.ndarray


class EasyVqaBenchmark:
    """The questions of a split with their images, asked in batches.

    Args:
      split: of easy-VQA.
      batch_size: questions that are answered at once.
      max_images: ask about the first so many images only; None for all.
    """

    def __init__(self, split: Split, batch_size: int = 256, max_images: int | None = None):
        source = EasyVqaSource(split)
        self.image_paths = source.images[:max_images]
        asked = source.questions[:max_images]
        self.questions: list[Question] = [question for questions in asked for question in questions]
        self.image_of = np.array([image for image, questions in enumerate(asked) for _ in questions])
        self._batch_size = batch_size

    def answer_single_pass(self, assistant: Assistant) -> Answers:
        """Asks every question together with its image."""
        visuals = [Visual((image,)) for image in assistant.load_images(self.image_paths)]
        return self._ask(assistant, visuals, "single pass")

    def answer_two_stage(self, assistant: Assistant) -> Answers:
        """Compresses every image once, and asks every question after its image's cache."""
        return self._ask(assistant, assistant.compress(self.image_paths).split(), "caches")

    def score(self, answers: Answers) -> Score:
        """Returns exact match, overall and by kind of question."""
        correct = [exact_match(text, q.answer) for text, q in zip(answers.texts, self.questions, strict=True)]
        return Score(sum(correct) / len(correct), accuracy_by_kind(correct, [q.kind for q in self.questions]))

    def _ask(self, assistant: Assistant, visuals: Sequence[Visual] | Sequence[VocoCache], way: Way) -> Answers:
        requests = [Request(question.text, (visuals[image],), SAMPLING)
                    for question, image in zip(self.questions, self.image_of, strict=True)]
        texts: list[str] = []
        logits: list[np.ndarray] = []
        for answer in answer_many(assistant, requests, way=way, batch_size=self._batch_size, with_logits=True):
            assert answer.first_logits_V is not None, answer.error
            texts.append(answer.text)
            logits.append(answer.first_logits_V)
        return Answers(texts, np.stack(logits))
