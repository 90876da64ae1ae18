"""Clips: sequences of easy-VQA's images as the frames of a video, with questions whose answers depend on time.

A clip's frames are images of one split of easy-VQA, so clips of different splits share no image. Every clip follows
from a fixed seed, its split and its number.
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vocojax.data.conversation import Turn
from vocojax.data.sources.base import Sample
from vocojax.data.sources.easy_vqa import COLOURS, SHAPES, EasyVqaSource, Question, Split
from vocojax.errors import InputError

SEED = 2406_12275
LENGTHS = (8, 16, 32, 64)  # frames of a clip, each twice the one before
CLIPS = {"train": 150_000, "validation": 150, "test": 150}
STEADY = 1 / 3  # share of clips in which the shape never changes
QUESTIONS = 24  # about a clip, where nothing else is asked for
# Kinds of questions and the share of each. Answers of the first five depend on the order of the frames.
SHARES = {"frame t": 8, "first frame": 2, "last frame": 2, "came first": 4, "change after t": 4, "count": 2,
          "change": 2}
ORDERED = ("frame t", "first frame", "last frame", "came first", "change after t")


class Frame(NamedTuple):
    """What a frame shows.

    Attributes:
      colour: one of `COLOURS`.
      shape: one of `SHAPES`.
    """

    colour: str
    shape: str


class Clip(NamedTuple):
    """A clip and questions about it.

    Attributes:
      images: the image file of each frame.
      questions: with the kinds of `SHARES`.
    """

    images: tuple[Path, ...]
    questions: tuple[Question, ...]


def questions_about(frames: Sequence[Frame]) -> dict[str, list[Question]]:
    """Returns all questions about a clip by kind.

    Where the shape never changes, a frame's shape says nothing about time and is not asked for.

    Args:
      frames: what they show, in their order.
    """
    number, shapes = len(frames), {frame.shape for frame in frames}
    found: dict[str, list[Question]] = defaultdict(list)

    def ask(kind: str, text: str, answer: str) -> None:
        found[kind].append(Question(text, answer, kind))

    def ask_about(kind: str, name: str, frame: Frame) -> None:
        ask(kind, f"{name} of {number}: what color is the shape?", frame.colour)
        if len(shapes) > 1:
            ask(kind, f"{name} of {number}: what shape is in the image?", frame.shape)

    for t, frame in enumerate(frames, 1):
        ask_about("frame t", f"frame {t}", frame)
    ask_about("first frame", "first frame", frames[0])
    ask_about("last frame", "last frame", frames[-1])
    colours = list(dict.fromkeys(frame.colour for frame in frames))  # in the order in which they come
    for at, first in enumerate(colours):
        for later in colours[at + 1 :]:
            for one, other in ((first, later), (later, first)):
                ask("came first", f"{number} frames: what color came first, {one} or {other}?", first)
    if len(shapes) > 1:
        for t, (frame, following) in enumerate(itertools.pairwise(frames), 1):
            ask("change after t", f"frame {t} of {number}: does the shape change after it?",
                "no" if frame.shape == following.shape else following.shape)
    for colour in COLOURS:
        ask("count", f"{number} frames: how many are {colour}?", str(sum(frame.colour == colour for frame in frames)))
    ask("change", f"{number} frames: does the shape change?", "yes" if len(shapes) > 1 else "no")
    return dict(found)


def words() -> str:
    """Returns all words of questions and answers, for a word tokenizer."""
    every = [*(Frame(colour, shape) for colour in COLOURS for shape in SHAPES)]
    texts = [f"{question.text} {question.answer}" for group in questions_about(every).values() for question in group]
    return " ".join([*texts, "no", *map(str, range(max(LENGTHS) + 1))])


class EasyVqaClips:
    """Clips of a split's images. Every question is a thread of its own.

    Args:
      split: `train`, `validation` or `test`.
      questions: about a clip; None for `QUESTIONS`.
      frames: the most frames of a clip. Clips have the `LENGTHS` up to this, each half as often as the one before it,
        so that every length has as many frames.

    Raises:
      InputError: no length is as short as `frames`.
    """

    def __init__(self, split: Split, questions: int | None = None, frames: int = max(LENGTHS)):
        source = EasyVqaSource(split)
        seen = [source.caption(index).split() for index in range(len(source.images))]
        self._frames = [(path, Frame(*words)) for path, words in zip(source.images, seen, strict=True)
                        if len(words) == 2]
        self._by_shape = {shape: np.flatnonzero([frame.shape == shape for _, frame in self._frames])
                          for shape in SHAPES}
        self._lengths = [length for length in LENGTHS if length <= frames]
        if not self._lengths:
            raise InputError(f"data.frames must be at least {min(LENGTHS)}, the length of the shortest clip, got "
                             f"{frames}")
        self._split, self._questions = split, questions or QUESTIONS

    def __len__(self) -> int:
        return CLIPS[self._split]

    def __getitem__(self, index: int) -> Sample:
        clip = self.clip(index)
        threads = tuple((Turn("user", q.text), Turn("assistant", q.answer)) for q in clip.questions)
        return Sample(f"easy_vqa_clips/{self._split}/{index}", clip.images, threads)

    def clip(self, index: int) -> Clip:
        """Returns a clip by its number."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        random = np.random.default_rng([SEED, sorted(CLIPS).index(self._split), index])
        place = index % (2 ** len(self._lengths) - 1) + 1
        length = self._lengths[(place & -place).bit_length() - 1]  # by the ruler sequence 0, 1, 0, 2, 0, 1, 0, 3, ...
        pool = self._by_shape[random.choice(SHAPES)] if random.random() < STEADY else len(self._frames)
        chosen = [self._frames[image] for image in random.choice(pool, length, replace=False)]
        asked = questions_about([frame for _, frame in chosen])
        return Clip(tuple(path for path, _ in chosen), tuple(_draw(asked, self._questions, random)))


def _draw(asked: dict[str, list[Question]], count: int, random: np.random.Generator) -> list[Question]:
    """Draws questions: a kind by its share, then one of the answers that there are, then a question with it."""
    kinds = list(asked)
    shares = np.array([SHARES[kind] for kind in kinds], float)
    drawn = []
    for kind in random.choice(len(kinds), count, p=shares / shares.sum()):
        of_kind = asked[kinds[kind]]
        answer = random.choice(sorted({question.answer for question in of_kind}))
        with_answer = [question for question in of_kind if question.answer == answer]
        drawn.append(with_answer[random.integers(len(with_answer))])
    return drawn
