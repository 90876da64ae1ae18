"""The asking engine: many requests, each with its own visuals and settings, answered in batches."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from vocojax.config import require
from vocojax.data.images import ImageError
from vocojax.errors import InputError
from vocojax.files import parse_json
from vocojax.inference.assistant import Assistant
from vocojax.inference.caches.cache import VocoCache
from vocojax.inference.caches.store import Store
from vocojax.inference.decoding.sampling import SEEDS, SamplingConfig
from vocojax.inference.requests import Answer, Request
from vocojax.inference.visuals import Visual, VisualSource
from vocojax.layout import LayoutError, SampleLayout

Way = Literal["caches", "single pass"]


def answer_many(
    assistant: Assistant,
    requests: Sequence[Request],
    store: Store | None = None,
    *,
    way: Way | None = None,
    batch_size: int = 32,
    num_vocos: int | None = None,
    with_logits: bool = False,
    progress: str | None = "answers",
) -> Iterator[Answer]:
    """Answers requests in their order, in batches.

    A request that can't be answered (an image that can't be read, a text that is too long) gets an answer with an
    error; all others are answered.

    Args:
      assistant: answers.
      requests: each with its own conversation, visuals and settings.
      store: where caches of visuals are sought and put; None compresses what a batch needs.
      way: answer from caches or with all tokens in a single pass, where both give the same answers; None for caches
        where the model can read them.
      batch_size: requests that are answered at once.
      num_vocos: how many VoCo tokens of each unit are read; None for all.
      with_logits: answers carry their first token's logits.
      progress: name of the progress bar; None for no bar.

    Raises:
      CacheError: a request's cache is another model's, or an entry of the store can't be written.
      InputError: a single pass is asked for about a visual of which there is only the cache, or with `num_vocos`.
    """
    if not isinstance(requests, list | tuple):
        raise InputError(f"requests must be a list of Requests, got {type(requests).__name__}")
    require(batch_size >= 1, "batch_size", "must be >= 1", batch_size)
    way = way or ("caches" if assistant.reads_caches else "single pass")
    if way == "single pass" and num_vocos is not None:
        raise InputError("the number of VoCo tokens can be chosen only where answers come from caches: this model, or "
                         "this way of asking, reads whole images; leave it out")
    with tqdm(total=len(requests), desc=progress, unit="request", disable=progress is None) as bar:
        for first in range(0, len(requests), batch_size):
            batch = requests[first : first + batch_size]
            yield from _answer_batch(assistant, batch, store, way, num_vocos, with_logits)
            bar.update(len(batch))


def _answer_batch(
    assistant: Assistant, requests: Sequence[Request], store: Store | None, way: Way, num_vocos: int | None,
    with_logits: bool,
) -> list[Answer]:
    """Answers requests at once: prepares what each needs, and runs those that can be answered."""
    answers: dict[int, Answer] = {}
    visuals: dict[int, list[Visual | VocoCache]] = {}
    prepared: dict[str | Path | int, Visual] = {}
    for index, request in enumerate(requests):
        try:
            visuals[index] = [_prepare(assistant, source, prepared) for source in request.visuals]
        except ImageError as error:
            answers[index] = _refusal(error)

    cache: VocoCache | None = None
    units: dict[int, list[Any]]  # numbers of the units in the cache, or their prepared images
    if way == "caches" and any(visuals.values()):
        cache, units = _from_caches(assistant, visuals, store, num_vocos)
    else:
        units = {index: _pixels(own) for index, own in visuals.items()}

    samples: dict[int, SampleLayout] = {}
    for index, own in units.items():
        try:
            samples[index] = assistant.lay_out(requests[index].turns, len(own), cache)
        except LayoutError as error:
            answers[index] = _refusal(error)
    if not samples:
        return [answers[index] for index in range(len(requests))]

    chosen: list[list[Any]] = [units[index] for index in samples]
    samplings = [requests[index].sampling for index in samples]
    if cache is None:
        *_, last = assistant.run_whole(list(samples.values()), chosen, samplings)
    else:
        *_, last = assistant.run_behind(cache, list(samples.values()), chosen, samplings)
    logits = np.asarray(last.logits_BV) if with_logits else [None] * len(samples)
    for row, (index, sample) in enumerate(samples.items()):
        text, reason, ids = assistant.finish(last.ids_BT[row].tolist(), samplings[row])
        answers[index] = Answer(text, reason, assistant.prompt_tokens(sample, cache), ids, first_logits_V=logits[row])
    return [answers[index] for index in range(len(requests))]


def _prepare(
    assistant: Assistant, source: VisualSource | VocoCache, prepared: dict[str | Path | int, Visual]
) -> Visual | VocoCache:
    """Prepares a visual once, however many of a batch's requests are about it."""
    if isinstance(source, VocoCache):
        return source
    key = source if isinstance(source, str | Path) else id(source)
    if key not in prepared:
        prepared[key] = assistant.visual(source)
    return prepared[key]


def _from_caches(
    assistant: Assistant, visuals: Mapping[int, Sequence[Visual | VocoCache]], store: Store | None,
    num_vocos: int | None,
) -> tuple[VocoCache, dict[int, list[int]]]:
    """Returns one cache of all visuals, each once, and for each request its units in the cache."""
    key = lambda visual: visual.digest if isinstance(visual, Visual) else id(visual)
    different = {key(visual): visual for own in visuals.values() for visual in own}
    pixels = [visual for visual in different.values() if isinstance(visual, Visual)]
    found = dict(zip(map(key, pixels), assistant.caches_of(pixels, store), strict=True))
    caches = [visual if isinstance(visual, VocoCache) else found[name] for name, visual in different.items()]
    if num_vocos is not None:
        caches = [cache.truncate(num_vocos) for cache in caches]
    ends = itertools.accumulate(cache.num_units for cache in caches)
    units = {name: range(end - cache.num_units, end)
             for name, cache, end in zip(different, caches, ends, strict=True)}
    return VocoCache.concat(caches), {
        index: [unit for visual in own for unit in units[key(visual)]] for index, own in visuals.items()
    }


def _pixels(visuals: Sequence[Visual | VocoCache]) -> list[np.ndarray]:
    """Returns the prepared images of a request's units."""
    units: list[np.ndarray] = []
    for visual in visuals:
        if isinstance(visual, VocoCache):
            raise InputError("a single pass needs the pixels of a visual, got its cache: answer from caches")
        units += visual.units
    return units


def _refusal(error: Exception) -> Answer:
    return Answer("", "error", error=str(error))


@dataclass(frozen=True)
class Question:
    """A line of a file of questions.

    Attributes:
      images: image files in their order.
      text: the question.
      seed: of the answer's draws.
      record: all that the line holds.
    """

    images: tuple[str, ...]
    text: str
    seed: int = 0
    record: Mapping[str, Any] = field(default_factory=dict)


def read_questions(path: str | Path, seed: int = 0) -> list[Question]:
    """Reads JSON lines `{"image": path or [paths], "question": text, "seed"?: int in [0, 2**32), ...}`.

    Args:
      path: the file.
      seed: of the first line, unless it states its own; each further line's is one more.

    Raises:
      InputError: names the line that is no question.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines would also split inside JSON strings
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: must be UTF-8: {error}") from error
    questions: list[Question] = []
    for number, line in enumerate(lines, start=1):
        line = line.removeprefix("\ufeff")  # a byte order mark; every file of several that were joined has its own
        if not line.strip():
            continue
        try:
            record = parse_json(line)
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
    """Answers a file's questions in order.

    Args:
      assistant: answers.
      store: of the images' caches; an image that is not in it is compressed and put in. Unused by a model that reads
        whole images (an upper bound, a baseline).
      questions: from `read_questions`.
      sampling: of all answers, but for the seeds.
      batch_size: questions that are answered at once.
      num_vocos: how many of each image's VoCo tokens are read; None for all.

    Yields:
      Each question with `{"answer": text}`, or `{"error": problem}` for an image or a text that can't be used.
    """
    requests = [Request(question.text, question.images, dataclasses.replace(sampling, seed=question.seed))
                for question in questions]
    answers = answer_many(assistant, requests, store, batch_size=batch_size, num_vocos=num_vocos)
    for question, answer in zip(questions, answers, strict=True):
        yield question, {"error": answer.error} if answer.error else {"answer": answer.text}
