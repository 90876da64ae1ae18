"""One of several processes that write, read and evict the same few entries.

    python -m tests.helpers.hammer DIR SEED SECONDS MAX_BYTES
"""

import sys
import time

import numpy as np

from vocojax.inference.caches.cache import VocoCache
from vocojax.inference.caches.fingerprint import Fingerprint
from vocojax.inference.caches.store import MissingCache, Store

MODEL = Fingerprint("{}", "of the test")
IMAGES = [f"{digit}" * 32 for digit in range(4)]


def entry(image: str) -> VocoCache:
    """64 KiB that depend on the image alone."""
    values = np.random.default_rng(int(image, 16) % 2**32).normal(size=(2, 1, 2, 16, 128)).astype(np.float32)
    return VocoCache(values, -values, 6, (image,), MODEL)


def hammer(root: str, seed: int, seconds: float, max_bytes: int | None = None) -> dict[str, int]:
    """Returns how often it wrote, read and found nothing; a wrong entry is an error."""
    store, random = Store(root, max_bytes=max_bytes), np.random.default_rng(seed)
    counts = {"put": 0, "get": 0, "miss": 0}
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        image = IMAGES[random.integers(len(IMAGES))]
        if random.random() < 0.5:
            store.put(entry(image))
            counts["put"] += 1
            continue
        try:
            found = store.get(image, MODEL, 2)
            assert np.array_equal(found.k_LUNGD, entry(image).k_LUNGD)
            assert np.array_equal(found.v_LUNGD, entry(image).v_LUNGD)
            counts["get"] += 1
        except MissingCache:
            counts["miss"] += 1
    return counts


if __name__ == "__main__":
    print(hammer(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]) or None))
