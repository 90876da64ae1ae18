"""VoCo-LLaMA: a vision tower, a projector and a decoder that compresses vision tokens by its attention mask."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike

from vocojax.config import ModelConfig, VocoConfig
from vocojax.errors import InputError
from vocojax.kernels.interval_attention import IntervalMask
from vocojax.models.clip import ClipVision, normalise
from vocojax.models.compressors import LlamaVid, RandomTokens, make_compressor
from vocojax.models.eva import EvaVision
from vocojax.models.image_chunks import ImageChunks
from vocojax.models.llama import Decoder, KeyValues
from vocojax.models.projector import Projector


class Rows(NamedTuple):
    """Rows of tokens as the decoder takes them; `data/packing.py` makes them from sample layouts.

    Attributes:
      ids_BS: int32 token ids.
      positions_BS: int32 rotary positions.
      start_BS: int32, of the interval mask.
      stop_BK: int32, of the interval mask; its first K - S keys belong to a key/value prefix.
      vision_BS: int32, at a vision token its index among the row's U*P, -1 elsewhere.
      images_BUHWC: uint8 RGB images of the row, zeros in slots without one; U may be 0.
      questions_BUT: int32 token ids of the question that each image is compressed for, -1 after the last one; None for
        a model whose compressor reads no text.
    """

    ids_BS: jax.Array
    positions_BS: jax.Array
    start_BS: jax.Array
    stop_BK: jax.Array
    vision_BS: jax.Array
    images_BUHWC: jax.Array
    questions_BUT: jax.Array | None = None

    @property
    def mask(self) -> IntervalMask:
        return IntervalMask(self.start_BS, self.stop_BK)


class VocoLlama(nnx.Module):
    """The whole model.

    Args:
      config: see `ModelConfig`.
      rngs: random streams for parameters that are not loaded.
      dtype: what it computes in (parameters keep theirs; norms, softmax and logits are fp32 anyway).
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype: DTypeLike = jnp.bfloat16):
        self.config, self.dtype = config, jnp.dtype(dtype)
        make_vision = ClipVision if config.vision.kind == "clip" else EvaVision
        self.vision = make_vision(config.vision, rngs)
        self.compressor = make_compressor(config, rngs)
        in_width = config.vision.width if self.compressor is None else self.compressor.out_width
        self.projector = Projector(config.projector, in_width, config.decoder.width, rngs)
        self.decoder = Decoder(config.decoder, rngs, config.voco_offsets)
        append_voco_row(self.decoder, config.voco.token_id)

    @jax.named_scope("vision")
    def encode_images(
        self, images_UHWC: jax.Array, step: jax.Array | int = 0, questions_UT: jax.Array | None = None,
        chunks: ImageChunks | None = None,
    ) -> jax.Array:
        """Returns the tokens of images as decoder embeddings [U, config.unit_tokens, E].

        Args:
          images_UHWC: uint8 RGB.
          step: see `__call__`.
          questions_UT: see `Rows`.
          chunks: of the images; those without an image skip the tower's layers. None for all of them.

        Raises:
          InputError: the compressor reads questions, and there are none.
        """
        pixels_UHWC = normalise(images_UHWC, self.dtype)
        if isinstance(self.compressor, LlamaVid):
            if questions_UT is None:
                raise InputError("the compressor 'llama_vid' makes an image's tokens for a question, got none")
            context_U1E, content_UNE = self.compressor(
                self.vision.hidden(pixels_UHWC, chunks=chunks), questions_UT)
            return jnp.concatenate([context_U1E, self.projector(content_UNE)], axis=1)
        features_UPE = self.vision(pixels_UHWC, self.config.tower_grid, chunks)
        if isinstance(self.compressor, RandomTokens):
            features_UPE = self.compressor(features_UPE, images_UHWC, step)
        elif self.compressor is not None:
            features_UPE = self.compressor(features_UPE)
        return self.projector(features_UPE)

    def embed(self, rows: Rows, step: jax.Array | int = 0, axes: tuple[str, ...] | None = None) -> jax.Array:
        """Returns the embeddings [B, S, E] of the rows' tokens, vision tokens in their places; see `__call__`."""
        x_BSE = self.decoder.embed(rows.ids_BS, self.dtype)
        num_rows, num_images = rows.images_BUHWC.shape[:2]
        if num_images == 0:
            return x_BSE
        images_UHWC = rearrange(rows.images_BUHWC, "b u h w c -> (b u) h w c")
        questions_BUT = rows.questions_BUT
        questions_UT = None if questions_BUT is None else rearrange(questions_BUT, "b u t -> (b u) t")
        tokens_UPE = self._encode_slots(rows.vision_BS, images_UHWC, step, questions_UT, axes)
        tokens_BTE = tokens_UPE.reshape(num_rows, -1, tokens_UPE.shape[-1])
        if self.config.voco.init != "learned" and self.config.unit_vocos:
            x_BSE = x_BSE + self._pooled(rows, tokens_UPE)
        if self.decoder.voco_offsets is not None:
            x_BSE = x_BSE + self._offsets(rows, self.decoder.voco_offsets[...])
        placed_BSE = jnp.take_along_axis(tokens_BTE, jnp.maximum(rows.vision_BS, 0)[..., None], axis=1)
        return jnp.where(rows.vision_BS[..., None] >= 0, placed_BSE, x_BSE)

    def _encode_slots(
        self, vision_BS: jax.Array, images_UHWC: jax.Array, step: jax.Array | int, questions_UT: jax.Array | None,
        axes: tuple[str, ...] | None,
    ) -> jax.Array:
        """Returns the tokens of all slots for images; nobody reads those of a slot without an image."""
        if axes is None:
            return self.encode_images(images_UHWC, step, questions_UT)
        chunks = ImageChunks.of(vision_BS, len(images_UHWC) // len(vision_BS), self.config.unit_tokens, axes)
        questions_UT = None if questions_UT is None else questions_UT[chunks.order_A]
        return self.encode_images(images_UHWC[chunks.order_A], step, questions_UT, chunks)[chunks.place_A]

    def _pooled(self, rows: Rows, tokens_UPE: jax.Array) -> jax.Array:
        """Returns [B, S, E]: at a VoCo token the mean of the vision tokens in its window, 0 elsewhere."""
        windows_NP = voco_windows(self.config.voco, math.isqrt(tokens_UPE.shape[1]))
        means_UNE = window_means(tokens_UPE, windows_NP)
        means_BTE = means_UNE.reshape(len(rows.ids_BS), -1, means_UNE.shape[-1])
        number_BS = self._voco_numbers(rows)
        # The latest vision token before a VoCo token is one of its own unit.
        unit_BS = jax.lax.cummax(rows.vision_BS, axis=1) // tokens_UPE.shape[1]
        window_BS = jnp.where(number_BS >= 0, unit_BS * self.config.voco.num_vocos + number_BS, 0)
        placed_BSE = jnp.take_along_axis(means_BTE, window_BS[..., None], axis=1)
        return jnp.where(number_BS[..., None] >= 0, placed_BSE, 0)

    def _offsets(self, rows: Rows, offsets_NE: jax.Array) -> jax.Array:
        """Returns [B, S, E]: at a VoCo token its own offset, 0 elsewhere."""
        number_BS = self._voco_numbers(rows)
        placed_BSE = offsets_NE[jnp.maximum(number_BS, 0)].astype(self.dtype)
        return jnp.where(number_BS[..., None] >= 0, placed_BSE, 0)

    def _voco_numbers(self, rows: Rows) -> jax.Array:
        """Returns int32 [B, S]: at a VoCo token its number among those of its unit, from 0; -1 elsewhere."""
        index_S = jnp.arange(rows.ids_BS.shape[1])
        is_voco_BS = rows.ids_BS == self.config.voco.token_id
        # The latest other token before a VoCo token is the one before the first VoCo token of its unit.
        before_BS = jax.lax.cummax(jnp.where(is_voco_BS, -1, index_S), axis=1)
        return jnp.where(is_voco_BS, index_S - before_BS - 1, -1)

    def __call__(
        self,
        rows: Rows,
        *,
        prefix: KeyValues | None = None,
        keep: int = 0,
        keep_outputs: bool = False,
        step: jax.Array | int = 0,
        axes: tuple[str, ...] | None = None,
        attention: str | None = None,
        remat: str = "none",
    ) -> tuple[jax.Array, KeyValues]:
        """Runs the model. Further arguments and the results are those of `Decoder.__call__`.

        Args:
          step: the training step, by which a compressor's random choices differ; 0 for those of evaluation.
          axes: the mesh axes that rows are split over in a `jax.shard_map`, `()` on one device. Slots without an image
            skip the vision tower then. With None all slots run: rows may lie on several devices.

        Raises:
          InputError: a model whose text reads outputs (`VocoConfig.reads`) is given text and images together.
        """
        reads_outputs = self.config.voco.reads == "output" and self.config.unit_vocos > 0
        if reads_outputs and rows.images_BUHWC.shape[1] and not keep_outputs:
            raise InputError("a model with voco.reads 'output' reads images from caches alone: train it with plan "
                             "'two_stage', and ask it from caches, not in a single pass")
        return self.decoder(
            self.embed(rows, step, axes), rows.positions_BS, rows.mask, prefix=prefix, keep=keep,
            keep_outputs=keep_outputs, attention=attention, remat=remat,
        )


def voco_windows(voco: VocoConfig, side: int) -> np.ndarray:
    """Returns bool [N, P]: which of a square image's patches are in each VoCo token's window, see `VocoConfig.init`.

    Args:
      voco: config of the VoCo tokens.
      side: patches on a side of an image, at least the windows above one another and side by side.
    """
    if voco.init == "pool":
        return grid_windows(*voco.windows, side)
    levels = voco.windows[0].bit_length()
    grids = [grid_windows(1 << level, 1 << level, side) for level in range(levels)]
    return np.concatenate(grids)[: voco.num_vocos]


def grid_windows(rows: int, columns: int, side: int) -> np.ndarray:
    """Returns bool [rows * columns, side * side], the patches of each of a grid's windows, row after row.

    Windows differ by one patch in height or width where rows or columns do not divide the patches of a side.
    """
    patch = np.arange(side)
    window_P = ((patch * rows // side)[:, None] * columns + patch * columns // side).reshape(-1)
    return window_P == np.arange(rows * columns)[:, None]


def window_means(tokens_UPE: jax.Array, windows_NP: np.ndarray) -> jax.Array:
    """Returns [U, N, E], the means of images' tokens in windows, given as bool [N, P]."""
    shares_NP = windows_NP.astype(np.float32) / windows_NP.sum(axis=1, keepdims=True, dtype=np.float32)
    return jnp.einsum("np,upe->une", shares_NP.astype(tokens_UPE.dtype), tokens_UPE)


def append_voco_row(decoder: Decoder, token_id: int) -> None:
    """Sets the `<voco>` row of the embedding, and its column of an untied head, to the mean of the rows before it."""
    embedding = decoder.embedding[...]
    decoder.embedding[...] = embedding.at[token_id].set(embedding[:token_id].mean(0))
    if decoder.head is not None:
        kernel = decoder.head.kernel[...]
        decoder.head.kernel[...] = kernel.at[:, token_id].set(kernel[:, :token_id].mean(1))


def rows_from_batch(batch: Mapping[str, jax.Array], view: str = "") -> Rows:
    """Returns the rows of a batch of `data/packing.py`; `view` is the prefix of another visibility's arrays in it."""
    return Rows(
        batch["ids"], batch[view + "positions"], batch[view + "start"], batch[view + "stop"], batch["vision"],
        batch["images"], batch.get("questions"),
    )
