"""A collection of image files compressed into a store: batched, resumed, and told what could not be read."""

import collections
import glob
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from vocojax.data.conversation import Turn
from vocojax.data.images import ImageError, load_image
from vocojax.inference.assistant import Assistant
from vocojax.inference.caches.cache import VocoCache
from vocojax.inference.caches.files import from_bytes, to_bytes
from vocojax.inference.caches.fingerprint import image_digest
from vocojax.inference.caches.store import Store
from vocojax.inference.decoding.sampling import SamplingConfig


@dataclass
class Outcome:
    """What became of the files: newly compressed, in the store already (also as another file's image), or bad."""

    compressed: int = 0
    skipped: int = 0
    bad: dict[str, str] = field(default_factory=dict)  # path -> problem

    def __add__(self, other: "Outcome") -> "Outcome":
        return Outcome(self.compressed + other.compressed, self.skipped + other.skipped, self.bad | other.bad)

    def __str__(self) -> str:
        return f"{self.compressed} compressed, {self.skipped} there already, {len(self.bad)} bad"


class Int8Loss(NamedTuple):
    """What int8 storage does to the first token's logits: the largest and the mean |Δ|, their standard deviation to
    compare it with, and the share of answers whose first token stays the same."""

    largest: float
    mean: float
    spread: float
    same_token: float

    def __str__(self) -> str:
        return (f"int8 storage: |Δ logit| at most {self.largest:.3g}, {self.mean:.3g} in the mean, of logits with a "
                f"standard deviation of {self.spread:.3g}; {self.same_token:.1%} of first tokens stay the same")


def find_files(patterns: Sequence[str], index: int = 0, count: int = 1) -> list[str]:
    """The files that match any of the patterns (`**` goes into directories), sorted, and of them every `count`-th from
    `index` on: a process's own share.

    Raises:
      FileNotFoundError: there is none at all; a share may be empty.
    """
    found = sorted({path for pattern in patterns for path in glob.glob(pattern, recursive=True)
                    if Path(path).is_file()})
    if not found:
        raise FileNotFoundError(f"no file matches {' '.join(patterns)}")
    return found[index::count]


def compress_files(
    assistant: Assistant, store: Store, paths: Sequence[str], batch_size: int = 64, num_threads: int = 8
) -> Outcome:
    """Puts every image's cache into the store; what is in it already is not computed again.

    Files are read by threads while the device works; a file that can't be used is reported and passed over.

    Raises:
      CacheError: an entry can't be written.
    """
    outcome = Outcome()
    waiting: dict[str, np.ndarray] = {}
    num_vocos = assistant.model.config.unit_vocos

    def flush() -> None:
        store.put(assistant.compress(list(waiting.values()), batch_size))
        outcome.compressed += len(waiting)
        waiting.clear()

    with tqdm(total=len(paths), desc="compress", unit="image") as bar:
        for path, image in _read_ahead(assistant, paths, num_threads, 2 * batch_size):
            bar.update()
            if isinstance(image, ImageError):
                outcome.bad[path] = str(image)
                bar.write(f"skipped: {image}")
                continue
            digest = image_digest(image)
            if digest in waiting or store.has(digest, assistant.fingerprint, num_vocos):
                outcome.skipped += 1
                continue
            waiting[digest] = image
            if len(waiting) == batch_size:
                flush()
        if waiting:
            flush()
    return outcome


def int8_loss(assistant: Assistant, cache: VocoCache, question: str) -> Int8Loss:
    """Asks the question of every unit behind the cache as it is and as int8 storage gives it back."""
    rounded = from_bytes(to_bytes(cache, "int8"), "memory")
    asked, about = [(Turn("user", question),)] * cache.num_units, [[unit] for unit in range(cache.num_units)]
    first = SamplingConfig(max_new_tokens=1)
    exact, small = (np.asarray(assistant.generate_behind(c, asked, about, first).logits_BV) for c in (cache, rounded))
    is_token = exact > -1e29  # neither <voco> nor the vocabulary's padding
    difference = np.abs(exact[is_token] - small[is_token])
    return Int8Loss(float(difference.max()), float(difference.mean()), float(exact[is_token].std()),
                    float((exact.argmax(-1) == small.argmax(-1)).mean()))


def _read_ahead(
    assistant: Assistant, paths: Sequence[str], num_threads: int, window: int
) -> Iterator[tuple[str, np.ndarray | ImageError]]:
    """Prepared images, or what is wrong with them, in order; at most `window` of them are held."""
    size = assistant.model.config.vision.image_size

    def read(path: str) -> np.ndarray | ImageError:
        try:
            return load_image(path, size, assistant.fit)
        except ImageError as error:
            return error

    ahead: collections.deque[tuple[str, Future[np.ndarray | ImageError]]] = collections.deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for path in paths:
            ahead.append((path, pool.submit(read, path)))
            if len(ahead) == window:
                first, image = ahead.popleft()
                yield first, image.result()
        while ahead:
            first, image = ahead.popleft()
            yield first, image.result()
