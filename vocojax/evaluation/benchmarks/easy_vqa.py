"""easy-VQA: every question of a split, answered greedily and compared with the gold answer."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from tqdm import tqdm

from vocojax.data.conversation import Conversation, Turn
from vocojax.data.sources.easy_vqa import EasyVqaSource, Question, Split
from vocojax.evaluation.metrics import accuracy_by_kind, exact_match
from vocojax.evaluation.retention import Score
from vocojax.inference.assistant import Assistant
from vocojax.inference.compress import compress
from vocojax.inference.decoding.decode import Generation
from vocojax.inference.decoding.sampling import SamplingConfig

Generate = Callable[[np.ndarray, list[Conversation]], Generation]  # (image of each question, questions) -> answers
SAMPLING = SamplingConfig(max_new_tokens=4)


@dataclass(frozen=True)
class Answers:
    """A model's answers to the questions of a split, in the split's order, and the logits of their first tokens."""

    texts: list[str]
    logits: np.ndarray  # fp32 [questions, vocabulary]


class EasyVqaBenchmark:
    """The questions of a split with their images, asked in batches."""

    def __init__(self, split: Split, batch_size: int = 256, max_images: int | None = None):
        source = EasyVqaSource(split)
        self.image_paths = source.images[:max_images]
        asked = source.questions[:max_images]
        self.questions: list[Question] = [question for questions in asked for question in questions]
        self.image_of = np.array([image for image, questions in enumerate(asked) for _ in questions])
        self._batch_size = batch_size

    def answer_single_pass(self, assistant: Assistant) -> Answers:
        """Every question together with its image."""
        images = assistant.load_images(self.image_paths)
        return self._collect(assistant, "answers", lambda about, asked: assistant.generate_whole(
            [[images[i]] for i in about], asked, SAMPLING))

    def answer_two_stage(self, assistant: Assistant) -> Answers:
        """Every image compressed once, every question read behind the cache."""
        images = assistant.load_images(self.image_paths)
        cache = compress(assistant.model, assistant.tokenizer, images)
        return self._collect(assistant, "cached answers", lambda about, asked: assistant.generate_behind(
            cache, asked, [[i] for i in about], SAMPLING))

    def score(self, answers: Answers) -> Score:
        """Exact match, overall and by kind of question."""
        correct = [exact_match(text, q.answer) for text, q in zip(answers.texts, self.questions, strict=True)]
        return Score(sum(correct) / len(correct), accuracy_by_kind(correct, [q.kind for q in self.questions]))

    def _collect(self, assistant: Assistant, description: str, generate: Generate) -> Answers:
        texts: list[str] = []
        logits: list[np.ndarray] = []
        for chosen in tqdm(list(self._batches()), desc=description, unit="batch", leave=False):
            asked: list[Conversation] = [(Turn("user", self.questions[i].text),) for i in chosen]
            generation: Generation = jax.device_get(generate(self.image_of[chosen], asked))
            texts += assistant.texts(generation)
            logits.append(np.asarray(generation.logits_BV))
        count = len(self.questions)  # the last batch is filled up with questions from the beginning
        return Answers(texts[:count], np.concatenate(logits)[:count])

    def _batches(self) -> Iterator[Sequence[int]]:
        count = len(self.questions)
        for first in range(0, count, self._batch_size):
            yield [i % count for i in range(first, first + self._batch_size)]
