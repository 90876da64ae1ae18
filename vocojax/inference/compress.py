"""The first inference stage: images in, the keys and values of their VoCo tokens out."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vocojax.config import ModelConfig
from vocojax.data.tokenizer import Tokenizer
from vocojax.errors import InputError
from vocojax.inference.caches.cache import VocoCache
from vocojax.inference.caches.fingerprint import Fingerprint, image_digest
from vocojax.inference.prompts import batch_bucket, whole_rows
from vocojax.layout import lay_out_unit, unit_shape
from vocojax.models import two_stage
from vocojax.models.llama import KeyValues
from vocojax.models.voco import Rows, VocoLlama
from vocojax.parallel.mesh import place_rows, row_multiple

BATCH = 64  # default number of units that run at once


def compress(
    model: VocoLlama, tokenizer: Tokenizer, images: Sequence[np.ndarray], fingerprint: Fingerprint | None = None,
    batch_size: int = BATCH,
) -> VocoCache:
    """Runs every image's unit alone and keeps its VoCo tokens.

    Args:
      model: compresses.
      tokenizer: the model's.
      images: uint8 [size, size, 3] arrays as `data/images.py` prepares them, one unit each.
      fingerprint: the model's, which the cache will carry; None for a cache that can't be saved or checked.
      batch_size: how many images run at once, at most.

    Raises:
      InputError: no image, an image of another shape, or a baseline's model, which has no VoCo tokens.
    """
    require_vocos(model.config)
    return compress_keeping(model, tokenizer, images, model.config.unit_vocos, fingerprint, batch_size)


def require_vocos(config: ModelConfig) -> None:
    """Raises `InputError` for the model of a baseline, whose compressor makes no VoCo tokens to be cached."""
    kind = config.compressor.kind
    if config.question_tokens:
        raise InputError(f"a model with the compressor {kind!r} compresses an image for one question, so no cache "
                         "serves others: ask by Assistant.answer or answer_many")
    if config.unit_vocos == 0:
        raise InputError(f"a model with the compressor {kind!r} has no VoCo tokens to cache: ask by Assistant.answer "
                         "or answer_many")


def compress_keeping(
    model: VocoLlama, tokenizer: Tokenizer, images: Sequence[np.ndarray], keep: int,
    fingerprint: Fingerprint | None = None, batch_size: int = BATCH,
) -> VocoCache:
    """Runs every image's unit alone and keeps its last `keep` tokens.

    All of a unit's tokens are the usual caching of an image. The other arguments are those of `compress`.
    """
    size = model.config.vision.image_size
    if not images or any(image.shape != (size, size, 3) or image.dtype != np.uint8 for image in images):
        found = sorted({f"{image.dtype}{list(image.shape)}" for image in images}) or "none"
        raise InputError(f"images must be one or more uint8 [{size}, {size}, 3] arrays, got {found}")
    unit = lay_out_unit("unit", tokenizer, unit_shape(model.config))
    batch = rows_at_once(len(images), batch_size)
    parts = []
    for first in range(0, len(images), batch):
        chosen = [images[i % len(images)] for i in range(first, first + batch)]  # the last batch is filled up
        rows = whole_rows([unit] * batch, [[image] for image in chosen], model.config, "voco", len(unit))
        parts.append(run_units(model, place_rows(rows), keep))
    k_LUNGD, v_LUNGD = (jnp.concatenate(part, axis=1)[:, : len(images)] for part in zip(*parts, strict=True))
    return VocoCache(k_LUNGD, v_LUNGD, len(unit) - keep, tuple(map(image_digest, images)), fingerprint)


def rows_at_once(count: int, batch_size: int) -> int:
    """Returns the rows of one program for `count` images.

    The devices of the mesh in force share them evenly; they are at most `batch_size`, or as many as the devices.
    """
    multiple = row_multiple()
    return min(max(batch_size // multiple, 1) * multiple, batch_bucket(count))


@functools.partial(jax.jit, static_argnames=("keep", "attention"))
def run_units(model: VocoLlama, rows: Rows, keep: int, attention: str | None = None) -> KeyValues:
    """Runs `two_stage.compress` as one compiled program."""
    return two_stage.compress(model, rows, keep, attention=attention)
