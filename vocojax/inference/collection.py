"""A collection of image or video files compressed into a store: in batches, resumable, with a report of bad files."""

import collections
import glob
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from vocojax.data.frame_choice import Sampling
from vocojax.data.frame_files import has_frames, is_frame
from vocojax.data.images import ImageError
from vocojax.inference.assistant import Assistant
from vocojax.inference.caches.cache import VocoCache
from vocojax.inference.caches.files import from_bytes, to_bytes
from vocojax.inference.caches.store import Store
from vocojax.inference.decoding.sampling import SamplingConfig
from vocojax.inference.many import answer_many
from vocojax.inference.requests import Request
from vocojax.inference.visuals import Video, Visual, frame_units


@dataclass
class Outcome:
    """Counts of files.

    Attributes:
      compressed: newly compressed.
      skipped: in the store already, perhaps as the image of another file.
      bad: what is wrong with each file that can't be used, by its path.
    """

    compressed: int = 0
    skipped: int = 0
    bad: dict[str, str] = field(default_factory=dict)

    def __add__(self, other: "Outcome") -> "Outcome":
        return Outcome(self.compressed + other.compressed, self.skipped + other.skipped, self.bad | other.bad)

    def __str__(self) -> str:
        return f"{self.compressed} compressed, {self.skipped} there already, {len(self.bad)} bad"


class Int8Loss(NamedTuple):
    """Loss of int8 storage, measured on the first tokens' logits.

    Attributes:
      largest: the largest |Δ logit|.
      mean: the mean |Δ logit|.
      spread: the logits' standard deviation, to compare with.
      same_token: share of answers whose first token stays the same.
    """

    largest: float
    mean: float
    spread: float
    same_token: float

    def __str__(self) -> str:
        return (f"int8 storage: |Δ logit| at most {self.largest:.3g}, {self.mean:.3g} on average, of logits with a "
                f"standard deviation of {self.spread:.3g}; {self.same_token:.1%} of first tokens stay the same")


def find_files(patterns: Sequence[str], index: int = 0, count: int = 1) -> list[str]:
    """Returns the files that one of several processes works on.

    Args:
      patterns: globs; a file counts that matches any of them. `**` stands for any number of directories.
      index: of the process.
      count: of the processes; each takes every `count`-th file in sorted order.

    Raises:
      FileNotFoundError: there is none at all; a share may be empty.
    """
    found = sorted({path for path in _matching(patterns) if Path(path).is_file()})
    if not found:
        raise FileNotFoundError(f"no file matches {' '.join(patterns)}")
    return found[index::count]


def find_videos(patterns: Sequence[str], index: int = 0, count: int = 1) -> list[str]:
    """Returns the videos that one of several processes works on: files, and directories of frames.

    A directory counts if it holds images, or if it is named itself; its images are then no videos of their own.

    Args:
      patterns: see `find_files`.
      index: of the process.
      count: see `find_files`.

    Raises:
      FileNotFoundError: there is none at all; a share may be empty.
    """
    matching = {path.rstrip("/") or path for path in _matching(patterns)}
    directories = {path for path in matching if Path(path).is_dir() and (path in patterns or has_frames(path))}
    homes = set(map(Path, directories))
    files = {path for path in matching if Path(path).is_file()
             and not (Path(path).parent in homes and is_frame(Path(path)))}
    if not directories | files:
        raise FileNotFoundError(f"no video and no directory of frames matches {' '.join(patterns)}")
    return sorted(directories | files)[index::count]


def _matching(patterns: Sequence[str]) -> Iterator[str]:
    """Yields the paths that match. A name is no pattern where there is something of that name: photo[1].png."""
    for pattern in patterns:
        yield from [pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True)


def compress_files(
    assistant: Assistant, store: Store, paths: Sequence[str], batch_size: int = 64, num_threads: int = 8
) -> Outcome:
    """Puts every image's cache into the store; an image that is in it already is not compressed again.

    Files are read by threads while the device works; a file that can't be used is reported and skipped.

    Args:
      assistant: compresses.
      store: is filled.
      paths: of the image files.
      batch_size: images that are compressed at once.
      num_threads: threads that read files.

    Raises:
      CacheError: an entry can't be written.
    """
    outcome = Outcome()
    waiting: dict[str, Visual] = {}
    num_vocos = assistant.model.config.unit_vocos

    def flush() -> None:
        if not outcome.compressed:
            store.require_writable()
        visuals = list(waiting.values())
        for cache in assistant.compress(visuals, batch_size).split([len(visual.units) for visual in visuals]):
            store.put_visual(cache)
        outcome.compressed += len(waiting)
        waiting.clear()

    with tqdm(total=len(paths), desc="compress", unit="image") as bar:
        for path, visual in _read_ahead(assistant, paths, num_threads, 2 * batch_size):
            bar.update()
            if isinstance(visual, ImageError):
                outcome.bad[path] = str(visual)
                bar.write(f"skipped: {visual}")
                continue
            digest = visual.digest
            if digest in waiting or store.has(digest, assistant.fingerprint, num_vocos):
                outcome.skipped += 1
                continue
            waiting[digest] = visual
            if len(waiting) == batch_size:
                flush()
        if waiting:
            flush()
    return outcome


def compress_videos(
    assistant: Assistant, store: Store, paths: Sequence[str], frames: int = 8, frame_sampling: Sampling = "uniform",
    batch_size: int = 64,
) -> Outcome:
    """Puts the caches of every video's frames into the store, each frame a visual of its own.

    A video whose frames are all in the store counts as skipped. One that can't be used is reported and skipped.

    Args:
      assistant: compresses.
      store: is filled.
      paths: of the video files and of the directories of frames.
      frames: see `Video`.
      frame_sampling: see `Video`.
      batch_size: frames that are decoded and compressed at once.

    Raises:
      CacheError: an entry can't be written.
    """
    outcome = Outcome()
    size, fit, num_vocos = assistant.processor.image_size, assistant.processor.fit, assistant.processor.unit.vocos
    with tqdm(total=len(paths), desc="compress", unit="video") as bar:
        for path in paths:
            units, new = frame_units(Video(path, frames, frame_sampling), size, fit), 0
            try:
                while batch := [Visual((unit,)) for unit in itertools.islice(units, batch_size)]:
                    missing = [visual for visual in batch
                               if not store.has(visual.digest, assistant.fingerprint, num_vocos)]
                    assistant.caches_of(missing, store, batch_size)
                    new += len(missing)
            except ImageError as error:
                outcome.bad[path] = str(error)
                bar.write(f"skipped: {error}")
            else:
                outcome.compressed += new > 0
                outcome.skipped += new == 0
            bar.update()
    return outcome


def int8_loss(assistant: Assistant, cache: VocoCache, question: str) -> Int8Loss:
    """Asks a question about every unit, from the cache as it is and as int8 storage gives it back."""
    rounded = from_bytes(to_bytes(cache, "int8"), "memory")
    first = SamplingConfig(max_new_tokens=1)
    requests = [[Request(question, (unit,), first) for unit in form.split()] for form in (cache, rounded)]
    exact, small = (
        np.array([answer.first_logits_V for answer in answer_many(
            assistant, asked, way="caches", with_logits=True, progress=None)])
        for asked in requests
    )
    is_token = exact > -1e29  # neither <voco> nor the vocabulary's padding
    difference = np.abs(exact[is_token] - small[is_token])
    return Int8Loss(float(difference.max()), float(difference.mean()), float(exact[is_token].std()),
                    float((exact.argmax(-1) == small.argmax(-1)).mean()))


def _read_ahead(
    assistant: Assistant, paths: Sequence[str], num_threads: int, window: int
) -> Iterator[tuple[str, Visual | ImageError]]:
    """Yields prepared images, or what is wrong with them, in order; at most `window` of them are held."""

    def read(path: str) -> Visual | ImageError:
        try:
            return assistant.visual(path)
        except ImageError as error:
            return error

    ahead: collections.deque[tuple[str, Future[Visual | ImageError]]] = collections.deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for path in paths:
            ahead.append((path, pool.submit(read, path)))
            if len(ahead) == window:
                first, visual = ahead.popleft()
                yield first, visual.result()
        while ahead:
            first, visual = ahead.popleft()
            yield first, visual.result()
