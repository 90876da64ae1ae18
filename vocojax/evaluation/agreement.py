"""Whether answers from VoCo caches are those of a single pass, for random questions about random images.

    fresh     behind the cache as it was computed
    loaded    behind entries of a store, read back from disk
    joined    behind images compressed in a random order, taken apart and concatenated in theirs
    cut       behind a cache made with three VoCo tokens more and truncated
    rotated   about one to three images in random order, each moved to its slot
"""

import dataclasses
import tempfile
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from vocojax.data.conversation import Conversation, Turn
from vocojax.inference.assistant import Assistant
from vocojax.inference.caches.cache import VocoCache
from vocojax.inference.caches.store import Store
from vocojax.inference.decoding.decode import Generation
from vocojax.inference.decoding.sampling import SamplingConfig
from vocojax.models.parameters import abstract, parameters_of, with_parameters
from vocojax.models.voco import VocoLlama

SAMPLING = SamplingConfig(max_new_tokens=4)
MORE_VOCOS = 3
MOST_UNITS = 3


@dataclasses.dataclass
class Agreement:
    """How many of the pairs' answers are the same token by token, and how far apart the first tokens' logits are."""

    pairs: int = 0
    identical: int = 0
    max_abs_logit_diff: float = 0.0

    def add(self, single: Generation, cached: Generation, count: int) -> None:
        """Takes in the first `count` rows of a batch answered both ways."""
        a, b = (jax.device_get(g) for g in (single, cached))
        is_token = ~np.isneginf(a.logits_BV[:count])  # all but the <voco> token's
        difference = np.abs(a.logits_BV[:count][is_token] - b.logits_BV[:count][is_token]).max()
        self.pairs += count
        self.identical += int((a.ids_BT[:count] == b.ids_BT[:count]).all(1).sum())
        self.max_abs_logit_diff = float(np.maximum(self.max_abs_logit_diff, difference))  # keeps NaN


def agreement(
    assistant: Assistant, images: Sequence[np.ndarray], questions: Sequence[str], pairs: int, seed: int = 0,
    batch_size: int = 256,
) -> dict[str, Agreement]:
    """Asks `pairs` random questions of random images, in each of the ways above.

    Args:
      images: prepared, uint8 [size, size, 3] each.
    """
    random = np.random.default_rng(seed)
    caches = {
        "fresh": assistant.compress(images),
        "loaded": _through_a_store(assistant, images),
        "joined": _apart_and_together(assistant, images, random),
        "cut": _cut(assistant, images),
    }
    found = {name: Agreement() for name in (*caches, "rotated")}
    for first in tqdm(range(0, pairs, batch_size), desc="pairs", unit="batch", leave=False):
        count = min(batch_size, pairs - first)  # the last batch is drawn whole, so that no other program is compiled
        about = [[int(i)] for i in random.integers(len(images), size=batch_size)]
        asked: list[Conversation] = [
            (Turn("user", questions[i]),) for i in random.integers(len(questions), size=batch_size)
        ]
        single = assistant.generate_whole([[images[i] for i in units] for units in about], asked, SAMPLING)
        for name, cache in caches.items():
            found[name].add(single, assistant.generate_behind(cache, asked, about, SAMPLING), count)
        several = [[int(i) for i in random.integers(len(images), size=random.integers(1, MOST_UNITS + 1))]
                   for _ in about]
        single = assistant.generate_whole([[images[i] for i in units] for units in several], asked, SAMPLING)
        cached = assistant.generate_behind(caches["loaded"], asked, several, SAMPLING)
        found["rotated"].add(single, cached, count)
    return found


def _through_a_store(assistant: Assistant, images: Sequence[np.ndarray]) -> VocoCache:
    cache = assistant.compress(images)
    with tempfile.TemporaryDirectory() as directory:
        Store(directory).put(cache)
        store = Store(directory)
        read = [store.get(image, assistant.fingerprint, cache.tokens_per_unit) for image in cache.images]
    return VocoCache.concat(read)


def _apart_and_together(
    assistant: Assistant, images: Sequence[np.ndarray], random: np.random.Generator
) -> VocoCache:
    order = random.permutation(len(images))
    shuffled = assistant.compress([images[i] for i in order])
    host = dataclasses.replace(shuffled, k_LUNGD=np.asarray(shuffled.k_LUNGD), v_LUNGD=np.asarray(shuffled.v_LUNGD))
    parts = [host.take(slice(place, place + 1)) for place in np.argsort(order)]
    return VocoCache.concat(parts)


def _cut(assistant: Assistant, images: Sequence[np.ndarray]) -> VocoCache:
    """The same weights with more VoCo tokens per image, cut to as many as the model has."""
    model = assistant.model
    vocos = model.config.voco.num_vocos
    config = dataclasses.replace(model.config, voco=dataclasses.replace(model.config.voco,
                                                                        num_vocos=vocos + MORE_VOCOS))
    longer = abstract(lambda: VocoLlama(config, nnx.Rngs(0), model.dtype))
    wider = dataclasses.replace(assistant, model=with_parameters(longer, parameters_of(model)))
    return wider.compress(images).truncate(vocos)
