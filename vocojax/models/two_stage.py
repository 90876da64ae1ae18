"""The two stages as pure functions of JAX arrays: `compress` units, `place` them before text, `read` the text.

Compress, place and read give the hidden states of a single pass over whole samples, and its gradients: all three are
differentiable in the model's parameters. Nothing here jits, reads a tokenizer or leaves the device; `layout.py` says
what the rows hold. Inference runs exactly these functions, and so does training that compresses units alone.
"""

import jax
import jax.numpy as jnp

from vocojax.config import DecoderConfig
from vocojax.kernels.rotary import Rotation, rotate
from vocojax.models.llama import KeyValues, rope_frequencies
from vocojax.models.voco import Rows, VocoLlama


def compress(
    model: VocoLlama, rows: Rows, keep: int, *, attention: str | None = None, remat: str = "none"
) -> KeyValues:
    """Runs units alone and keeps their last tokens.

    Args:
      model: whose keys and values they are.
      rows: U rows of one unit each, without padding.
      keep: how many of a unit's last tokens are kept: N for its VoCo tokens.
      attention: implementation of `interval_attention`; None picks by platform.
      remat: a key of `stack.REMAT_POLICIES`.

    Returns:
      Keys and values [L, U, keep, G, D], keys rotated to the positions they have where the unit stands alone.
    """
    return model(rows, keep=keep, attention=attention, remat=remat)[1]


def place(units: KeyValues, units_BT: jax.Array, decoder: DecoderConfig) -> KeyValues:
    """Makes a key/value prefix that holds units in slots 0, 1, 2, ... of every row.

    A unit's keys are rotated to the positions it has alone; rotating them by t * N more moves them to slot t
    (rotations compose).

    Args:
      units: N kept tokens of U units, from `compress`.
      units_BT: int, the unit in each slot of each row; unused slots come last and hold -1.
      decoder: the config of the decoder whose keys they are.

    Returns:
      Keys and values [L, B, T * N, G, D]. Unused slots hold some unit, which the rows' mask must hide
      (`SampleLayout.view_after_prefix` does).
    """
    num_rows, slots = units_BT.shape
    layers, _, kept, heads, width = units.k_LBKGD.shape
    k_LBTNGD, v_LBTNGD = (x_LUNGD[:, jnp.maximum(units_BT, 0)] for x_LUNGD in units)
    frequencies = rope_frequencies(decoder.head_width, decoder.rope_theta, decoder.rope_scaling)
    shift = Rotation.of((jnp.arange(slots) * kept)[:, None], frequencies)
    k_LBTNGD = rotate(k_LBTNGD, shift, implementation="xla")
    return KeyValues(*(x.reshape(layers, num_rows, slots * kept, heads, width) for x in (k_LBTNGD, v_LBTNGD)))


def read(
    model: VocoLlama, rows: Rows, prefix: KeyValues | None, keep: int = 0, *, attention: str | None = None,
    remat: str = "none",
) -> tuple[jax.Array, KeyValues]:
    """Reads rows of text after a prefix, or whole rows without one.

    Args:
      model: reads them.
      rows: text whose mask counts the prefix's tokens first, or whole samples with their images.
      prefix: keys and values [L, B, P, G, D] from `place`, or None.
      keep: of how many of each row's last tokens keys and values are returned: all of them to go on with an answer.
      attention: implementation of `interval_attention`; None picks by platform.
      remat: a key of `stack.REMAT_POLICIES`.

    Returns:
      Hidden states [B, S, E] before the final norm, and the kept keys and values [L, B, keep, G, D].
    """
    return model(rows, prefix=prefix, keep=keep, attention=attention, remat=remat)
