"""The asking engine: many requests, each with its own visuals and settings, answered in batches."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from vocojax.config import SEEDS, require
from vocojax.data.frame_choice import Sampling
from vocojax.data.images import ImageError
from vocojax.errors import InputError, shown
from vocojax.files import parse_json
from vocojax.inference.assistant import Assistant
from vocojax.inference.caches.cache import CacheError, VocoCache, require_model
from vocojax.inference.caches.store import Store
from vocojax.inference.decoding.sampling import SamplingConfig
from vocojax.inference.requests import Answer, Request
from vocojax.inference.video import compress_video
from vocojax.inference.visuals import Video, Visual, VisualSource
from vocojax.layout import LayoutError

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

    A request that can't be answered (an image that can't be read, a text that is too long, another model's cache) gets
    an answer with an error; all others are answered.

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
      CacheError: an entry of the store can't be read or written.
      InputError: `requests` is no list of Requests; or a single pass is asked for about a visual of which there is
        only the cache, or with `num_vocos`.
    """
    if not isinstance(requests, list | tuple):
        raise InputError(f"requests must be a list of Requests, got {type(requests).__name__}")
    for index, request in enumerate(requests):
        if not isinstance(request, Request):
            raise InputError(f"requests must be Requests, got {type(request).__name__} as number {index}")
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
    prepared: dict[str | Path | Video | int, Visual | VocoCache] = {}
    for index, request in enumerate(requests):
        try:
            visuals[index] = [_prepare(assistant, source, prepared, way, store) for source in request.visuals]
        except ImageError as error:
            answers[index] = _refusal(error)

    if way == "caches" and any(visuals.values()):
        caches = _caches_of(assistant, visuals, store, num_vocos, answers)
        groups = _groups(caches)
    else:
        groups = [_Group(None, {index: _pixels(own) for index, own in visuals.items()})]
    for group in groups:
        answers |= _answer_group(assistant, requests, group, with_logits)
    return [answers[index] for index in range(len(requests))]


class _Group(NamedTuple):
    """Requests that one program answers.

    Attributes:
      cache: holds their units; None where they are read whole.
      units: by the request's number, the numbers of its units in the cache, or its units' prepared images.
    """

    cache: VocoCache | None
    units: dict[int, list[Any]]


def _answer_group(
    assistant: Assistant, requests: Sequence[Request], group: _Group, with_logits: bool
) -> dict[int, Answer]:
    """Returns the answers to a group's requests by their numbers."""
    cache, answers, samples = group.cache, {}, {}
    for index, own in group.units.items():
        try:
            samples[index] = assistant.lay_out(requests[index].turns, len(own), cache)
        except (LayoutError, CacheError) as error:
            answers[index] = _refusal(error)
    if not samples:
        return answers

    chosen: list[list[Any]] = [group.units[index] for index in samples]
    samplings = [requests[index].sampling for index in samples]
    if cache is None:
        *_, last = assistant.runner.run_whole(list(samples.values()), chosen, samplings)
    else:
        *_, last = assistant.runner.run_behind(cache, list(samples.values()), chosen, samplings)
    logits = np.asarray(last.logits_BV) if with_logits else [None] * len(samples)
    for row, (index, sample) in enumerate(samples.items()):
        text, reason, ids = assistant.finish(last.ids_BT[row].tolist(), samplings[row])
        answers[index] = Answer(text, reason, assistant.prompt_tokens(sample, cache), ids, first_logits_V=logits[row])
    return answers


def _prepare(
    assistant: Assistant, source: VisualSource | VocoCache,
    prepared: dict[str | Path | Video | int, Visual | VocoCache], way: Way, store: Store | None,
) -> Visual | VocoCache:
    """Prepares a visual once, however many of a batch's requests are about it; a video's frames are compressed."""
    if isinstance(source, VocoCache):
        return source
    key = source if isinstance(source, str | Path | Video) else id(source)
    if key not in prepared:
        if isinstance(source, Video) and way == "caches":
            prepared[key] = compress_video(assistant, source, store)
        else:
            prepared[key] = assistant.visual(source)
    return prepared[key]


def _caches_of(
    assistant: Assistant, visuals: Mapping[int, Sequence[Visual | VocoCache]], store: Store | None,
    num_vocos: int | None, answers: dict[int, Answer],
) -> dict[int, list[VocoCache]]:
    """Returns the caches of each request's visuals; a request whose caches can't be used is answered with the error."""
    pixels = {visual.digest: visual for own in visuals.values() for visual in own if isinstance(visual, Visual)}
    found = dict(zip(pixels, assistant.caches_of(list(pixels.values()), store), strict=True))
    shorter: dict[int, VocoCache] = {}  # by the whole cache's id, so that equal ones stay one

    def cut(cache: VocoCache) -> VocoCache:
        if cache.fingerprint is not None:
            require_model(cache, assistant.fingerprint, "a cache of the request")
        if num_vocos is None:
            return cache
        if id(cache) not in shorter:
            shorter[id(cache)] = cache.truncate(num_vocos)
        return shorter[id(cache)]

    caches: dict[int, list[VocoCache]] = {}
    for index, own in visuals.items():
        try:
            caches[index] = [cut(found[visual.digest] if isinstance(visual, Visual) else visual) for visual in own]
            if len(kinds := {_kept(cache) for cache in caches[index]}) > 1:
                raise CacheError(f"the request's caches keep {sorted(kept for kept, *_ in kinds)} tokens per unit: "
                                 "truncate them to one number")
        except CacheError as error:
            caches.pop(index, None)
            answers[index] = _refusal(error)
    return caches


def _kept(cache: VocoCache) -> tuple[int, int, str]:
    """Returns what the caches of one program have in common."""
    return cache.tokens_per_unit, cache.first_position, cache.k_LUNGD.dtype.name


def _groups(caches: Mapping[int, Sequence[VocoCache]]) -> list[_Group]:
    """Groups requests by what their caches keep; each group has one cache of all its visuals, each once."""
    kinds = {index: _kept(own[0]) for index, own in caches.items() if own}
    some = next(iter(kinds.values()), None)
    groups: list[_Group] = []
    for kind in dict.fromkeys(kinds.values()):
        members = {index: own for index, own in caches.items() if kinds.get(index, some) == kind}  # text alone: any
        different = {id(cache): cache for own in members.values() for cache in own}
        ends = itertools.accumulate(cache.num_units for cache in different.values())
        units = {name: range(end - cache.num_units, end)
                 for (name, cache), end in zip(different.items(), ends, strict=True)}
        groups.append(_Group(VocoCache.concat(list(different.values())), {
            index: [unit for cache in own for unit in units[id(cache)]] for index, own in members.items()
        }))
    if not groups:
        groups.append(_Group(None, {index: [] for index in caches}))
    return groups


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
      videos: video files, after the images.
    """

    images: tuple[str, ...]
    text: str
    seed: int = 0
    record: Mapping[str, Any] = field(default_factory=dict)
    videos: tuple[str, ...] = ()


def read_questions(path: str | Path, seed: int = 0) -> list[Question]:
    """Reads JSON lines `{"image": path or [paths], "question": text, "seed"?: int in [0, 2**32), ...}`.

    A line may have "video" in place of "image", or in addition to it.

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
    for number, marked in enumerate(lines, start=1):
        line = marked.removeprefix("\ufeff")  # a byte order mark, at the start of each of several joined files
        if not line.strip():
            continue
        try:
            questions.append(_question(parse_json(line), (seed + len(questions)) % SEEDS))
        except ValueError as error:
            raise InputError(f'{path}, line {number}: is no {{"image": ..., "question": ...}}: {error}') from error
    if not questions:
        raise InputError(f"{path}: holds no question")
    return questions


def _question(record: Any, seed: int) -> Question:
    """Returns a line's question; `ValueError` says what it lacks."""
    if not isinstance(record, dict):
        raise ValueError(f"must be an object, got {shown(record)}")
    if not record.keys() & {"image", "video"}:
        raise ValueError("'image' or 'video' is missing")
    if "question" not in record:
        raise ValueError("'question' is missing")
    images, videos = _paths(record, "image"), _paths(record, "video")
    if not images + videos or not all(isinstance(text, str) for text in (*images, *videos, record["question"])):
        raise ValueError("image, video and question must be strings")
    own_seed = record.get("seed", seed)
    if type(own_seed) is not int or not 0 <= own_seed < SEEDS:
        raise ValueError(f"seed must be a whole number in [0, 2**32), got {shown(own_seed)}")
    return Question(images, record["question"], own_seed, record, videos)


def _paths(record: Mapping[str, Any], key: str) -> tuple[Any, ...]:
    """Returns the one or several values of a key, none if it is absent."""
    value = record.get(key, [])
    return tuple(value) if isinstance(value, list) else (value,)


def answer_all(
    assistant: Assistant, store: Store | None, questions: Sequence[Question], sampling: SamplingConfig,
    batch_size: int = 32, num_vocos: int | None = None, frames: int = 8, frame_sampling: Sampling = "uniform",
) -> Iterator[tuple[Question, dict[str, str]]]:
    """Answers a file's questions in order.

    Args:
      assistant: answers.
      store: of the images' caches; an image that is not in it is compressed and put in. None keeps none on disk;
        a model that reads whole images (an upper bound, a baseline) uses none.
      questions: from `read_questions`.
      sampling: of all answers, but for the seeds.
      batch_size: questions that are answered at once.
      num_vocos: how many of each image's VoCo tokens are read; None for all.
      frames: the most frames of a video; see `Video`.
      frame_sampling: which frames of a video; see `Video`.

    Yields:
      Each question with `{"answer": text}`, or `{"error": problem}` for an image or a text that can't be used.
    """
    requests = [Request(question.text,
                        (*question.images, *(Video(path, frames, frame_sampling) for path in question.videos)),
                        dataclasses.replace(sampling, seed=question.seed)) for question in questions]
    answers = answer_many(assistant, requests, store, batch_size=batch_size, num_vocos=num_vocos)
    for question, answer in zip(questions, answers, strict=True):
        yield question, {"error": answer.error} if answer.error else {"answer": answer.text}
