"""easy-VQA: 5,000 images of one coloured shape each and 48,248 questions, from the PyPI package `easy-vqa`.

The `test` images are kept for one final evaluation. `validation` is every tenth training image, `train` the rest.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from vocojax.data.conversation import Turn
from vocojax.data.sources.base import Sample
from vocojax.errors import InputError, MissingPackage

Split = Literal["train", "validation", "test"]
VALIDATION_EVERY = 10
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")


class Question(NamedTuple):
    """A question about one image.

    Attributes:
      text: the question.
      answer: one word.
      kind: 'colour', 'shape' or 'yes/no'.
    """

    text: str
    answer: str
    kind: str


class EasyVqaSource:
    """The questions of a split, one thread each. An image's questions share one sample, or several of equal size.

    Attributes:
      split: the split.
      images: the image files.
      questions: the questions about each image.

    Args:
      split: `train`, `validation` or `test`.
      threads_per_sample: the most questions in one sample; None for no limit.

    Raises:
      MissingPackage: the package `easy-vqa` is not installed.
      InputError: an unknown split.
    """

    def __init__(self, split: Split, threads_per_sample: int | None = None):
        try:
            import easy_vqa
        except ImportError as error:
            raise MissingPackage("the easy-VQA data set is not installed: pip install -e '.[quickstart]'") from error
        if split not in ("train", "validation", "test"):
            raise InputError(f"data.split must be 'train', 'validation' or 'test', got {split!r}")
        texts, answers, images = easy_vqa.get_test_questions() if split == "test" else easy_vqa.get_train_questions()
        paths = easy_vqa.get_test_image_paths() if split == "test" else easy_vqa.get_train_image_paths()
        by_image: dict[int, list[Question]] = defaultdict(list)
        for text, answer, image in zip(texts, answers, images, strict=True):
            by_image[image].append(Question(text, answer, _kind(answer)))
        if split != "test":
            held_out = split == "validation"
            by_image = {i: q for i, q in by_image.items() if (i % VALIDATION_EVERY == 0) == held_out}  # type: ignore[assignment]
        self.split = split
        self.images = [Path(paths[image]) for image in sorted(by_image)]
        self.questions = [tuple(by_image[image]) for image in sorted(by_image)]
        self._samples = [
            (image, group)
            for image, questions in enumerate(self.questions)
            for group in _groups(questions, threads_per_sample or len(questions))
        ]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        image, questions = self._samples[index]
        threads = tuple((Turn("user", q.text), Turn("assistant", q.answer)) for q in questions)
        return Sample(f"easy_vqa/{self.split}/{self.images[image].name}", (self.images[image],), threads)

    def caption(self, index: int) -> str:
        """Returns an image's colour and shape ("red circle"), as far as its questions and answers say them.

        Args:
          index: of the image, in `images`.
        """
        seen: set[str] = set()
        for question in self.questions[index]:
            words = set(re.findall(r"\w+", question.text))
            denies = question.kind == "yes/no" and (question.answer == "no") != bool(words & {"no", "not"})
            if not denies:
                seen |= {question.answer} | words
        return " ".join(word for word in (*COLOURS, *SHAPES) if word in seen)


class EasyVqaCaptions:
    """The images of a split with captions, for alignment: one sample per image whose colour and shape are known."""

    def __init__(self, split: Split):
        source = EasyVqaSource(split)
        captions = [source.caption(index) for index in range(len(source.images))]
        self._samples = [
            Sample(f"easy_vqa/{split}/{path.name}", (path,), ((Turn("user", "<image>"), Turn("assistant", caption)),))
            for path, caption in zip(source.images, captions, strict=True) if " " in caption
        ]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


def _groups(questions: Sequence[Question], most: int) -> list[Sequence[Question]]:
    """Splits the questions into as few groups as possible, of sizes as equal as possible."""
    count = -(-len(questions) // most)
    return [questions[i::count] for i in range(count)]


def _kind(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "colour" if answer in COLOURS else "shape"
