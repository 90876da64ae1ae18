"""The VoCo cache: what text sees of images, computed once, placed in any order in front of any text."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vocojax.config import DecoderConfig
from vocojax.errors import InputError, VocojaxError
from vocojax.inference.caches.fingerprint import Fingerprint
from vocojax.inference.decoding.decode import COMPILATIONS
from vocojax.kernels.rotary import Rotation, rotate
from vocojax.models.llama import KeyValues, rope_frequencies


class CacheError(VocojaxError, ValueError):
    """A cache that can't be used for what was asked of it."""


@dataclasses.dataclass(frozen=True, eq=False)
class VocoCache:
    """Keys and values of U units' kept tokens.

    Attributes:
      k_LUNGD: keys, rotated to the positions they have where the unit stands alone.
      v_LUNGD: values.
      position: of the first kept token in its unit: behind everything but the VoCo tokens, or 0 for whole units.
      model: whose keys they are; None where nobody said, and then the cache can't be saved or checked.
      images: digest of each unit's image (`fingerprint.image_digest`), U of them.
    """

    k_LUNGD: jax.Array | np.ndarray
    v_LUNGD: jax.Array | np.ndarray
    position: int
    images: tuple[str, ...]
    model: Fingerprint | None = None

    @property
    def num_units(self) -> int:
        return self.k_LUNGD.shape[1]

    @property
    def tokens_per_unit(self) -> int:
        """N, the tokens kept per unit."""
        return self.k_LUNGD.shape[2]

    @property
    def num_bytes(self) -> int:
        return self.k_LUNGD.nbytes + self.v_LUNGD.nbytes

    def take(self, units: slice) -> "VocoCache":
        """The cache of some of the units."""
        return self._with(lambda x: x[:, units], images=self.images[units])

    def truncate(self, num_vocos: int) -> "VocoCache":
        """Keeps every unit's first `num_vocos` VoCo tokens.

        A VoCo token sees only what stands before it, so this is exactly the cache of the same weights with
        `voco.num_vocos` set to that number; text then goes on right behind them.

        Raises:
          CacheError: there are fewer, or the cache holds whole units.
        """
        if not 1 <= num_vocos <= self.tokens_per_unit or self.position == 0:
            what = f"{self.tokens_per_unit} VoCo tokens per unit" if self.position else "whole units"
            raise CacheError(f"a cache of {what} cannot be truncated to {num_vocos}")
        return self._with(lambda x: x[:, :, :num_vocos])

    @classmethod
    def concat(cls, caches: Sequence["VocoCache"]) -> "VocoCache":
        """The units of several caches of one model, one behind the other; `place` puts them in any order.

        Raises:
          CacheError: nothing given, caches of several models, or of units that keep different tokens.
        """
        if not caches:
            raise CacheError("no cache to concatenate")
        first = caches[0]
        model = next((cache.model for cache in caches if cache.model is not None), None)
        for i, cache in enumerate(caches):
            if model is not None:
                require_model(cache, model, f"cache {i}")
            if (cache.tokens_per_unit, cache.position) != (first.tokens_per_unit, first.position):
                raise CacheError(f"cache {i} keeps {cache.tokens_per_unit} tokens from position {cache.position} of "
                                 f"each unit, cache 0 keeps {first.tokens_per_unit} from {first.position}: truncate "
                                 "them to one number first")

        def join(arrays: Sequence[Any]) -> Any:  # arrays from files stay on the host until they are placed
            on_host = all(isinstance(x, np.ndarray) for x in arrays)
            return np.concatenate(arrays, axis=1) if on_host else jnp.concatenate(arrays, axis=1)

        return dataclasses.replace(
            first,
            k_LUNGD=join([c.k_LUNGD for c in caches]),
            v_LUNGD=join([c.v_LUNGD for c in caches]),
            images=tuple(image for c in caches for image in c.images),
            model=model if all(c.model is not None for c in caches) else None,
        )

    def _with(self, change: Callable[[Any], Any], **others: Any) -> "VocoCache":
        return dataclasses.replace(self, k_LUNGD=change(self.k_LUNGD), v_LUNGD=change(self.v_LUNGD), **others)


def require_model(cache: VocoCache, model: Fingerprint, name: str) -> VocoCache:
    """The cache itself; `CacheError` says what differs if it is another model's."""
    if cache.model is not None and cache.model != model:
        raise CacheError(f"{name} is of another model: {model.differences(cache.model)}; compress its images with "
                         "this one")
    return cache


def place(cache: VocoCache, units_BT: np.ndarray, decoder: DecoderConfig) -> KeyValues:
    """A key/value prefix that holds, per row, units of the cache in slots 0, 1, 2, ...

    A unit's keys were rotated to the positions it has alone; rotating them by t*N more moves them to slot t
    (rotations compose).

    Args:
      units_BT: int, the unit in each row's slots; a row's unused slots come last and hold -1.

    Returns:
      Keys and values [L, B, T*N, G, D]; those of unused slots are a repetition that the caller's mask must hide.
    """
    units_BT = np.asarray(units_BT)
    if units_BT.size and not (units_BT.min() >= -1 and units_BT.max() < cache.num_units):
        raise InputError(f"units must be in [-1, {cache.num_units}), got {units_BT.min()} to {units_BT.max()}")
    frequencies = rope_frequencies(decoder.head_width, decoder.rope_theta, decoder.rope_scaling)
    units = KeyValues(*(jnp.asarray(_fill_up(x)) for x in (cache.k_LUNGD, cache.v_LUNGD)))
    return _place(units, jnp.maximum(units_BT, 0), frequencies)


def _fill_up(x_LUNGD: Any) -> Any:
    """To a power of two of units, so that few programs serve all numbers of images."""
    num_units = x_LUNGD.shape[1]
    fill = (1 << (num_units - 1).bit_length()) - num_units
    pad = np.pad if isinstance(x_LUNGD, np.ndarray) else jnp.pad
    return pad(x_LUNGD, [(0, fill if axis == 1 else 0) for axis in range(5)]) if fill else x_LUNGD


@jax.jit
def _place(units: KeyValues, units_BT: jax.Array, frequencies: jax.Array) -> KeyValues:
    COMPILATIONS["place"] += 1
    num_rows, slots = units_BT.shape
    layers, _, kept, heads, width = units.k_LBKGD.shape
    k, v = units.k_LBKGD[:, units_BT], units.v_LBKGD[:, units_BT]  # [L, B, T, N, G, D]
    shift = Rotation.of((jnp.arange(slots) * kept)[:, None], frequencies)
    flat = lambda x: x.reshape(layers, num_rows, slots * kept, heads, width)
    return KeyValues(flat(rotate(k, shift, implementation="xla")), flat(v))
