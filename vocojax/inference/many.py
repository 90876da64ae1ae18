"""Many questions about images in a store: read from a file, answered in batches."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vocojax.data.images import ImageError
from vocojax.errors import InputError
from vocojax.inference.assistant import Assistant
from vocojax.inference.caches.store import Store
from vocojax.inference.decoding.sampling import SEEDS, SamplingConfig
from vocojax.layout import LayoutError


@dataclass(frozen=True)
class Question:
    """A question about some image files; `record` is the line it came from."""

    images: tuple[str, ...]
    text: str
    seed: int = 0
    record: Mapping[str, Any] = field(default_factory=dict)


def read_questions(path: str | Path, seed: int = 0) -> list[Question]:
    """Reads JSON lines `{"image": path or [paths], "question": text, "seed"?: int in [0, 2**32), ...}`.

    Args:
      seed: of the first line without one; the others count on from it.

    Raises:
      InputError: names the line that is no question.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # JSON may hold what else splitlines splits at
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: must be UTF-8: {error}") from error
    questions: list[Question] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            image = record["image"]
            images = (image,) if isinstance(image, str) else tuple(image)
            if not images or not all(isinstance(x, str) for x in (*images, record["question"])):
                raise ValueError("image and question must be strings")
            own_seed = record.get("seed", (seed + len(questions)) % SEEDS)
            if type(own_seed) is not int or not 0 <= own_seed < SEEDS:
                raise ValueError(f"seed must be a whole number in [0, 2**32), got {own_seed!r}")
            questions.append(Question(images, record["question"], own_seed, record))
        except (ValueError, TypeError, KeyError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise InputError(f'{path}, line {number}: is no {{"image": ..., "question": ...}}: {what}') from error
    if not questions:
        raise InputError(f"{path}: holds no question")
    return questions


def answer_all(
    assistant: Assistant, store: Store, questions: Sequence[Question], sampling: SamplingConfig, batch_size: int = 32,
    num_vocos: int | None = None,
) -> Iterator[tuple[Question, dict[str, str]]]:
    """Answers in order: `{"answer": text}`, or `{"error": problem}` for an image or a text that can't be used.

    Args:
      num_vocos: how many of each image's VoCo tokens are read; None for all.
    """
    with tqdm(total=len(questions), desc="answers", unit="question") as bar:
        for first in range(0, len(questions), batch_size):
            batch = questions[first : first + batch_size]
            yield from zip(batch, _answer_batch(assistant, store, batch, sampling, num_vocos), strict=True)
            bar.update(len(batch))


def _answer_batch(
    assistant: Assistant, store: Store, batch: Sequence[Question], sampling: SamplingConfig, num_vocos: int | None
) -> list[dict[str, str]]:
    paths = list(dict.fromkeys(path for question in batch for path in question.images))
    try:
        cache = assistant.recall(store, paths, num_vocos)
        units = [[paths.index(path) for path in question.images] for question in batch]
        texts = assistant.read(cache, [q.text for q in batch], units, sampling, [q.seed for q in batch])
        return [{"answer": text} for text in texts]
    except (ImageError, LayoutError) as error:
        if len(batch) == 1:
            return [{"error": str(error)}]
    # One of them can't be answered: each alone, so that the others are.
    return [_answer_batch(assistant, store, [question], sampling, num_vocos)[0] for question in batch]
