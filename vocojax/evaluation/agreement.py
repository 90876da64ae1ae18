"""Compares answers from VoCo caches with those of a single pass, for random questions about random images.

    fresh     from the cache as it was computed
    loaded    from entries of a store, read back from disk
    joined    from images compressed in a random order, taken apart and concatenated in the order they had
    cut       from a cache made with three VoCo tokens more and truncated; not for models whose VoCo tokens depend on
              their number
    rotated   about one to three images in random order, each moved to its slot
"""

import dataclasses
import tempfile
from collections.abc import Iterable, Sequence

import numpy as np
from flax import nnx
from tqdm import tqdm

from vocojax.inference.assistant import Assistant
from vocojax.inference.caches.cache import VocoCache
from vocojax.inference.caches.store import Store
from vocojax.inference.decoding.sampling import SamplingConfig
from vocojax.inference.many import Way, answer_many
from vocojax.inference.requests import Answer, Request
from vocojax.inference.visuals import Visual
from vocojax.models.parameters import abstract, parameters_of, with_parameters
from vocojax.models.voco import VocoLlama

SAMPLING = SamplingConfig(max_new_tokens=4)
MORE_VOCOS = 3
MOST_UNITS = 3


@dataclasses.dataclass
class Agreement:
    """Counts of pairs that were answered both ways.

    Attributes:
      pairs: how many there were.
      identical: pairs whose answers are the same token by token.
      max_abs_logit_diff: the largest difference of the first tokens' logits; NaN if any of them is.
    """

    pairs: int = 0
    identical: int = 0
    max_abs_logit_diff: float = 0.0

    def add(self, single: Answer, cached: Answer) -> None:
        """Takes in a pair: its answers in a single pass and from a cache, with logits."""
        assert single.first_logits_V is not None and cached.first_logits_V is not None
        is_token = ~np.isneginf(single.first_logits_V)  # all but the <voco> token's
        difference = np.abs(single.first_logits_V[is_token] - cached.first_logits_V[is_token]).max()
        self.pairs += 1
        self.identical += single.token_ids == cached.token_ids
        self.max_abs_logit_diff = float(np.maximum(self.max_abs_logit_diff, difference))  # keeps NaN


def agreement(
    assistant: Assistant, images: Sequence[np.ndarray], questions: Sequence[str], pairs: int, seed: int = 0,
    batch_size: int = 256,
) -> dict[str, Agreement]:
    """Asks random questions about random images, in each of the ways above.

    Args:
      assistant: answers.
      images: prepared, uint8 [size, size, 3] each.
      questions: to draw from.
      pairs: how many pairs of a question and an image (or several images) are drawn.
      seed: of the draws.
      batch_size: pairs that are answered at once.

    Returns:
      The counts of each way, by its name.
    """
    random = np.random.default_rng(seed)
    caches = {
        "fresh": assistant.compress(images).split(),
        "loaded": _through_a_store(assistant, images),
        "joined": _apart_and_together(assistant, images, random),
    }
    voco = assistant.model.config.voco
    if voco.is_nested and voco.rows == "shared":  # offsets have a row for each VoCo token, and no more
        caches["cut"] = _cut(assistant, images).split()
    visuals = [Visual((image,)) for image in images]
    asked: list[tuple[str, int, list[int]]] = []  # question, one image, several images
    while len(asked) < pairs:
        about = random.integers(len(images), size=batch_size)
        chosen = random.integers(len(questions), size=batch_size)
        several = [random.integers(len(images), size=random.integers(1, MOST_UNITS + 1)).tolist() for _ in about]
        asked += [(questions[q], int(image), group) for q, image, group in zip(chosen, about, several, strict=True)]
    asked = asked[:pairs]

    def answers(way: Way, of: Sequence[Visual] | Sequence[VocoCache], several: bool) -> Iterable[Answer]:
        requests = [Request(question, tuple(of[i] for i in (group if several else [image])), SAMPLING)
                    for question, image, group in asked]
        return answer_many(assistant, requests, way=way, batch_size=batch_size, with_logits=True, progress=None)

    found = {name: Agreement() for name in (*caches, "rotated")}
    everything = zip(
        answers("single pass", visuals, False),
        *(answers("caches", cache, False) for cache in caches.values()),
        answers("single pass", visuals, True),
        answers("caches", caches["loaded"], True),
        strict=True,
    )
    for single, *cached, several_single, several_cached in tqdm(everything, desc="pairs", total=pairs, unit="pair",
                                                                leave=False):
        for name, answer in zip(caches, cached, strict=True):
            found[name].add(single, answer)
        found["rotated"].add(several_single, several_cached)
    return found


def _through_a_store(assistant: Assistant, images: Sequence[np.ndarray]) -> list[VocoCache]:
    cache = assistant.compress(images)
    with tempfile.TemporaryDirectory() as directory:
        Store(directory).put(cache)
        store = Store(directory)
        return [store.get(digest, assistant.fingerprint, cache.tokens_per_unit) for digest in cache.image_digests]


def _apart_and_together(
    assistant: Assistant, images: Sequence[np.ndarray], random: np.random.Generator
) -> list[VocoCache]:
    order = random.permutation(len(images))
    parts = assistant.compress([images[i] for i in order]).split()
    return VocoCache.concat([parts[place] for place in np.argsort(order)]).split()


def _cut(assistant: Assistant, images: Sequence[np.ndarray]) -> VocoCache:
    """Compresses with the same weights and more VoCo tokens per image, and cuts to as many as the model has."""
    model = assistant.model
    vocos = model.config.voco.num_vocos
    config = dataclasses.replace(model.config, voco=dataclasses.replace(model.config.voco,
                                                                        num_vocos=vocos + MORE_VOCOS))
    longer = abstract(lambda: VocoLlama(config, nnx.Rngs(0), model.dtype))
    wider = assistant.with_model(with_parameters(longer, parameters_of(model)))
    return wider.compress(images).truncate(vocos)
