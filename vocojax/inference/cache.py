"""The VoCo cache: what text sees of images, computed once, placed in any order in front of any text."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vocojax.config import DecoderConfig
from vocojax.models.llama import KeyValues, rope_frequencies, rotate


class VocoCache(NamedTuple):
    """Keys (rotated to their single-image positions) and values of U units' kept tokens, each [L, U, N, G, D]."""

    k_LUNGD: jax.Array
    v_LUNGD: jax.Array

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
        return VocoCache(self.k_LUNGD[:, units], self.v_LUNGD[:, units])


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
        raise ValueError(f"units must be in [-1, {cache.num_units}), got {units_BT.min()} to {units_BT.max()}")
    frequencies = rope_frequencies(decoder.head_width, decoder.rope_theta, decoder.rope_scaling)
    return _place(cache, jnp.maximum(units_BT, 0), frequencies)


@jax.jit
def _place(cache: VocoCache, units_BT: jax.Array, frequencies: jax.Array) -> KeyValues:
    num_rows, slots = units_BT.shape
    layers, _, kept, heads, width = cache.k_LUNGD.shape
    k, v = cache.k_LUNGD[:, units_BT], cache.v_LUNGD[:, units_BT]  # [L, B, T, N, G, D]
    shift_T1 = (jnp.arange(slots) * kept)[:, None]
    flat = lambda x: x.reshape(layers, num_rows, slots * kept, heads, width)
    return KeyValues(flat(rotate(k, shift_T1, frequencies)), flat(v))
