"""The VoCo cache: what text sees of images, computed once, placed in any order before any text."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vocojax.config import DecoderConfig, ModelConfig
from vocojax.errors import InputError, VocojaxError
from vocojax.inference.caches.fingerprint import Fingerprint, visual_digest
from vocojax.inference.decoding.decode import COMPILATIONS
from vocojax.layout import SampleLayout, UnitShape, Visibility, unit_shape, units_stand_alone
from vocojax.models import two_stage
from vocojax.models.llama import KeyValues


class CacheError(VocojaxError, ValueError):
    """A cache that can't be used for what was asked of it."""


@dataclasses.dataclass(frozen=True, eq=False)
class VocoCache:
    """Keys and values of the tokens that were kept of U units.

    Attributes:
      k_LUNGD: keys, rotated to the positions they have where the unit stands alone.
      v_LUNGD: values.
      first_position: of the first kept token in its unit: that of the first VoCo token, or 0 for whole units.
      image_digests: digest of each unit's pixels (`fingerprint.image_digest`), U of them.
      fingerprint: of the model whose keys they are; None where it was not given, and then the cache can't be saved or
        checked.
    """

    k_LUNGD: jax.Array | np.ndarray
    v_LUNGD: jax.Array | np.ndarray
    first_position: int
    image_digests: tuple[str, ...]
    fingerprint: Fingerprint | None = None

    def __repr__(self) -> str:
        model = "no model named" if self.fingerprint is None else f"model {self.fingerprint.digest[:12]}"
        return f"VocoCache({self.num_units} units of {self.tokens_per_unit} tokens, {self.k_LUNGD.dtype.name}, {model})"

    @property
    def num_units(self) -> int:
        """Number of units, U."""
        return self.k_LUNGD.shape[1]

    @property
    def tokens_per_unit(self) -> int:
        """Number of tokens kept per unit, N."""
        return self.k_LUNGD.shape[2]

    @property
    def digest(self) -> str:
        """Digest of the visual whose units these are; see `fingerprint.visual_digest`."""
        return visual_digest(self.image_digests)

    def take(self, units: slice) -> "VocoCache":
        """Returns the cache of some of the units."""
        return self._with(lambda x: x[:, units], image_digests=self.image_digests[units])

    def split(self, sizes: Sequence[int] | None = None) -> list["VocoCache"]:
        """Returns the units in groups of these sizes, by default each alone. The arrays move to the host.

        Each group has memory of its own, so that dropping some of them frees it.
        """
        sizes = [1] * self.num_units if sizes is None else sizes
        ends = list(itertools.accumulate(sizes))
        host = self._with(np.asarray)
        return [host.take(slice(end - size, end))._with(np.ascontiguousarray)
                for end, size in zip(ends, sizes, strict=True)]

    def truncate(self, num_vocos: int) -> "VocoCache":
        """Returns the cache of every unit's first `num_vocos` VoCo tokens.

        A VoCo token sees only what stands before it, so this is exactly the cache of the same weights with
        `voco.num_vocos` set to that number; text then continues right after them.

        Raises:
          CacheError: there are fewer, or the cache holds whole units.
        """
        if not 1 <= num_vocos <= self.tokens_per_unit or self.first_position == 0:
            what = f"{self.tokens_per_unit} VoCo tokens per unit" if self.first_position else "whole units"
            raise CacheError(f"a cache of {what} cannot be truncated to {num_vocos}")
        return self._with(lambda x: x[:, :, :num_vocos])

    @classmethod
    def concat(cls, caches: Sequence["VocoCache"]) -> "VocoCache":
        """Returns the units of several caches of one model, one after the other; `place` puts them in any order.

        Raises:
          CacheError: nothing given, caches of several models, or of units that keep different tokens.
        """
        if not caches:
            raise CacheError("no cache to concatenate")
        first = caches[0]
        known = next((cache.fingerprint for cache in caches if cache.fingerprint is not None), None)
        for i, cache in enumerate(caches):
            if known is not None:
                require_model(cache, known, f"cache {i}")
            if (cache.tokens_per_unit, cache.first_position) != (first.tokens_per_unit, first.first_position):
                raise CacheError(f"cache {i} keeps {cache.tokens_per_unit} tokens from position "
                                 f"{cache.first_position} of each unit, cache 0 keeps {first.tokens_per_unit} from "
                                 f"{first.first_position}: truncate them to one number first")

        def join(arrays: Sequence[Any]) -> Any:  # arrays from files stay on the host until they are placed
            on_host = all(isinstance(x, np.ndarray) for x in arrays)
            return np.concatenate(arrays, axis=1) if on_host else jnp.concatenate(arrays, axis=1)

        return dataclasses.replace(
            first,
            k_LUNGD=join([c.k_LUNGD for c in caches]),
            v_LUNGD=join([c.v_LUNGD for c in caches]),
            image_digests=tuple(digest for c in caches for digest in c.image_digests),
            fingerprint=known if all(c.fingerprint is not None for c in caches) else None,
        )

    def _with(self, change: Callable[[Any], Any], **others: Any) -> "VocoCache":
        return dataclasses.replace(self, k_LUNGD=change(self.k_LUNGD), v_LUNGD=change(self.v_LUNGD), **others)


def require_model(cache: VocoCache, fingerprint: Fingerprint, name: str) -> VocoCache:
    """Returns the cache itself; `CacheError` says what differs if it is another model's."""
    if cache.fingerprint is not None and cache.fingerprint != fingerprint:
        raise CacheError(f"{name} is of another model: {fingerprint.differences(cache.fingerprint)}; compress its "
                         "images with this one")
    return cache


def cached_shape(
    cache: VocoCache, unit: SampleLayout, visibility: Visibility, num_units: int
) -> tuple[UnitShape, int]:
    """Returns the unit shape to lay a prompt out with that is read after a cache.

    Args:
      cache: of the same model's units.
      unit: one of the model's units, laid out alone.
      visibility: who sees whom.
      num_units: units before the prompt's text.

    Returns:
      The shape, whose VoCo tokens are the cached ones, and how many tokens of a unit are not in the cache.

    Raises:
      CacheError: text does not see what the cache keeps, or sees more.
    """
    first, kept = int(unit.seen_by_text(visibility).argmax()), cache.tokens_per_unit
    if not units_stand_alone(visibility):
        if (cache.first_position, kept) != (first, len(unit)) or num_units > 1:
            raise CacheError("a causal model reads whole units, one to a prompt: keep all of a unit's tokens "
                             "(compress_keeping), or read with visibility='voco'")
        return unit.unit, 0
    if cache.first_position != first:
        raise CacheError(f"the cache keeps tokens from position {cache.first_position} of a unit, text sees those "
                         f"from {first} on: compress without keeping more than VoCo tokens")
    return unit.unit._replace(vocos=kept), first


def place(cache: VocoCache, units_BT: np.ndarray, model: ModelConfig) -> KeyValues:
    """Makes a key/value prefix that holds, per row, units of the cache in slots 0, 1, 2, ...; see `two_stage.place`.

    Args:
      cache: holds the units, on the host or on devices.
      units_BT: int, the unit in each row's slots; a row's unused slots come last and hold -1.
      model: the config of the model whose keys they are.

    Returns:
      Keys and values [L, B, T * N, G, D]; those of unused slots are a repetition that the caller's mask must hide.
    """
    units_BT = np.asarray(units_BT)
    if units_BT.size and not (units_BT.min() >= -1 and units_BT.max() < cache.num_units):
        raise InputError(f"units must be in [-1, {cache.num_units}), got {units_BT.min()} to {units_BT.max()}")
    units = KeyValues(*(jnp.asarray(_fill_up(x)) for x in (cache.k_LUNGD, cache.v_LUNGD)))
    kept = unit_shape(model)._replace(vocos=cache.tokens_per_unit)
    return _place(units, units_BT, model.decoder, kept.stride(cache.first_position + cache.tokens_per_unit))


def _fill_up(x_LUNGD: Any) -> Any:
    """Pads to a power of two of units, so that few programs serve all numbers of images."""
    num_units = x_LUNGD.shape[1]
    fill = (1 << (num_units - 1).bit_length()) - num_units
    pad = np.pad if isinstance(x_LUNGD, np.ndarray) else jnp.pad
    return pad(x_LUNGD, [(0, fill if axis == 1 else 0) for axis in range(5)]) if fill else x_LUNGD


@functools.partial(jax.jit, static_argnames=("decoder", "stride"))
def _place(units: KeyValues, units_BT: jax.Array, decoder: DecoderConfig, stride: int) -> KeyValues:
    COMPILATIONS["place"] += 1
    return two_stage.place(units, units_BT, decoder, stride)
