"""The two stages as pure functions of JAX arrays: `compress` units, `place` them before text, `read` the text.

Compress, place and read give the hidden states of a single pass over whole samples, and its gradients: all three are
differentiable in the model's parameters. Nothing here jits, reads a tokenizer or leaves the device; `layout.py` says
what the rows hold. Inference runs exactly these functions, and so does training that compresses units alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from vocojax.config import DecoderConfig
from vocojax.kernels.rotary import Rotation, rotate
from vocojax.models.llama import KeyValues, rope_frequencies
from vocojax.models.lora import row_keys, with_dropout
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
    keep_outputs = model.config.voco.reads == "output"
    return model(rows, keep=keep, keep_outputs=keep_outputs, attention=attention, remat=remat)[1]


class Units(NamedTuple):
    """The units that one device runs for a batch of texts, in X chunks of C units that run one after the other.

    Attributes:
      images_XCFR: uint8 RGB images, pixels one after the other and then padding (`data/text_rows.py`).
      text_XC: int32, the text that reads the unit; -1 for no unit. Chunks without any unit are skipped.
      slot_XC: int32, the unit's place among those of its text.
      position_XC: int32, rotary position of the unit's first token.
      ids_R: int32 token ids of one unit alone, padding before it.
      positions_R: int32 rotary positions of one unit alone.
      vision_R: int32, as `Rows.vision_BS`.
      start_R: int32, of the interval mask.
      stop_R: int32, of the interval mask.
    """

    images_XCFR: jax.Array
    text_XC: jax.Array
    slot_XC: jax.Array
    position_XC: jax.Array
    ids_R: jax.Array
    positions_R: jax.Array
    vision_R: jax.Array
    start_R: jax.Array
    stop_R: jax.Array


def compress_in_chunks(
    model: VocoLlama, units: Units, text_B: jax.Array, slots: int, *, axes: tuple[str, ...] = (),
    attention: str | None = None, remat: str = "none", dropout: jax.Array | None = None,
) -> KeyValues:
    """Runs units chunk after chunk, and makes the key/value prefix of texts from their VoCo tokens.

    The backward pass runs a chunk again when it needs it, from the images on. So the prefix is all that is kept of a
    unit. A unit runs at the positions that it has in its sample, so nothing has to be rotated afterwards.

    Inside a `jax.shard_map`, every device runs its own units, whatever text they belong to. After each chunk the VoCo
    tokens' keys and values are gathered from all devices, and every device keeps those of its texts; their gradients go
    back the same way. Nothing else of a unit leaves its device.

    Args:
      model: whose keys and values they are.
      units: of this device.
      text_B: int32, the names of this device's texts in `Units.text_XC`.
      slots: places for units per text, T.
      axes: the mesh axes of the devices that share the units; none for one device.
      attention: implementation of `interval_attention`; None picks by platform.
      remat: a key of `stack.REMAT_POLICIES`, for the layers inside a chunk.
      dropout: the step's key for LoRA's dropout; None for none.

    Returns:
      Keys and values [L, B, T * N, G, D]. Places without a unit hold zeros, which the texts' mask must hide.
    """
    decoder, kept, chunk = model.config.decoder, model.config.unit_vocos, units.text_XC.shape[1]
    side = model.config.vision.image_size
    kept_shape = decoder.depth, chunk, kept, decoder.num_kv_heads, decoder.head_width

    def run(images_CFR: jax.Array, position_C: jax.Array, keys_C: jax.Array | None) -> KeyValues:
        # Otherwise XLA copies all images into the layout that the vision tower would like a chunk's to have.
        images_CFR = with_layout_constraint(images_CFR, Layout(major_to_minor=(0, 1, 2)))
        flat_CR = images_CFR.reshape(chunk, -1)[:, : 3 * side**2]
        images_CUHWC = flat_CR.reshape(chunk, 1, side, side, 3)
        repeat = lambda x_R: jnp.broadcast_to(x_R, (chunk, *x_R.shape))
        rows = Rows(repeat(units.ids_R), units.positions_R + position_C[:, None], repeat(units.start_R),
                    repeat(units.stop_R), repeat(units.vision_R), images_CUHWC)
        running = model if keys_C is None else with_dropout(model, keys_C)
        return compress(running, rows, kept, attention=attention, remat=remat)

    def skip(images_CFR: jax.Array, position_C: jax.Array, keys_C: jax.Array | None) -> KeyValues:
        nothing = jnp.zeros(kept_shape, model.dtype)
        return KeyValues(nothing, nothing)

    @jax.checkpoint
    def run_chunk(
        images_CFR: jax.Array, position_C: jax.Array, keys_C: jax.Array | None, is_used: jax.Array
    ) -> KeyValues:
        return jax.lax.cond(is_used, run, skip, images_CFR, position_C, keys_C)

    def add_chunk(prefix: KeyValues, chunk_units: tuple[jax.Array, ...]) -> tuple[KeyValues, None]:
        images_CFR, text_C, slot_C, position_C = chunk_units
        is_used = (text_C >= 0).any()
        if axes:  # all devices run the chunk or none does, because layers are gathered inside it
            is_used = jax.lax.pmax(is_used.astype(jnp.int32), axes) > 0
        keys_C = None if dropout is None else row_keys(dropout, text_C, slot_C)
        compressed = run_chunk(images_CFR, position_C, keys_C, is_used)
        everyones = lambda x, axis: jax.lax.all_gather(x, axes, axis=axis, tiled=True) if axes else x
        text_A, slot_A = everyones(text_C, 0), everyones(slot_C, 0)
        is_own_AB = (text_A[:, None] == text_B) & (text_A >= 0)[:, None]
        outside_A = len(text_B) + jnp.arange(len(text_A))  # other devices' units are dropped
        row_A = jnp.where(is_own_AB.any(1), is_own_AB.argmax(1), outside_A)
        put = lambda x_LBTNGD, x_LCNGD: x_LBTNGD.at[:, row_A, slot_A].set(
            everyones(x_LCNGD, 1), mode="drop", unique_indices=True)
        return KeyValues(*map(put, prefix, compressed)), None

    empty = jnp.zeros((decoder.depth, len(text_B), slots, *kept_shape[2:]), model.dtype)
    chunks = units.images_XCFR, units.text_XC, units.slot_XC, units.position_XC
    prefix, _ = jax.lax.scan(add_chunk, KeyValues(empty, empty), chunks)
    return KeyValues(*(x.reshape(*x.shape[:2], -1, *x.shape[4:]) for x in prefix))


def place(units: KeyValues, units_BT: jax.Array, decoder: DecoderConfig, stride: int) -> KeyValues:
    """Makes a key/value prefix that holds units in slots 0, 1, 2, ... of every row.

    A unit's keys are rotated to the positions it has alone; rotating them by t * stride more moves them to slot t
    (rotations compose).

    Args:
      units: N kept tokens of U units, from `compress`.
      units_BT: int, the unit in each slot of each row; unused slots come last and hold -1.
      decoder: the config of the decoder whose keys they are.
      stride: `UnitShape.stride` of the units, N for compact positions.

    Returns:
      Keys and values [L, B, T * N, G, D]. Unused slots hold some unit, which the rows' mask must hide
      (`SampleLayout.view_after_prefix` does).
    """
    num_rows, slots = units_BT.shape
    layers, _, kept, heads, width = units.k_LBKGD.shape
    k_LBTNGD, v_LBTNGD = (x_LUNGD[:, jnp.maximum(units_BT, 0)] for x_LUNGD in units)
    frequencies = rope_frequencies(decoder.head_width, decoder.rope_theta, decoder.rope_scaling)
    shift = Rotation.of((jnp.arange(slots) * stride)[:, None], frequencies)
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
