"""CLIP's vision transformer, as OpenAI published it (arXiv 2103.00020): class token, pre-LN stem, quick GELU."""

import jax
import jax.numpy as jnp
from flax import nnx

from vocojax.config import VisionConfig
from vocojax.models.image_chunks import ImageChunks, run_filled
from vocojax.models.layers import BidirectionalAttention, LayerNorm, Linear, parameter
from vocojax.models.patches import cut, positions_of
from vocojax.models.stack import scan, stack

# Mean and standard deviation of an RGB channel, for values in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(images_UHWC: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns CLIP's normalised pixels of uint8 RGB images."""
    scaled = images_UHWC.astype(jnp.float32) / 255.0
    return ((scaled - jnp.array(CLIP_MEAN)) / jnp.array(CLIP_STD)).astype(dtype)


def quick_gelu(x: jax.Array) -> jax.Array:
    """Returns OpenAI's approximation of the GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


class ClipBlock(nnx.Module):
    """A layer of pre-norm attention and MLP, each added to its input."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        width = config.width
        self.attention_norm = LayerNorm(width, config.norm_eps, rngs=rngs)
        self.attention = BidirectionalAttention(width, width, config.num_heads, rngs=rngs)
        self.mlp_norm = LayerNorm(width, config.norm_eps, rngs=rngs)
        self.mlp_in = Linear(width, config.mlp_width, ("embed", "mlp"), use_bias=True, rngs=rngs)
        self.mlp_out = Linear(config.mlp_width, width, ("mlp", "embed"), use_bias=True, rngs=rngs)

    def __call__(self, x_USE: jax.Array) -> jax.Array:
        normed = self.attention_norm(x_USE)
        x_USE = x_USE + self.attention(normed, normed)
        return x_USE + self.mlp_out(quick_gelu(self.mlp_in(self.mlp_norm(x_USE))))


class ClipVision(nnx.Module):
    """The vision tower.

    The blocks up to the selected hidden state (`blocks`) are stacked apart from those after it (`final_blocks`), which
    only `pooled` runs. So features cost no layer that nobody reads, and a checkpoint stays complete.
    """

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        width, patch = config.width, config.patch_size
        small = nnx.initializers.normal(width**-0.5)
        self.config = config
        self.class_embedding = parameter(small, (width,), ("norm",), rngs)
        self.patch_embedding = parameter(
            nnx.initializers.lecun_normal(), (patch * patch * 3, width), (None, "embed"), rngs
        )
        self.position_embedding = parameter(small, (config.num_patches + 1, width), (None, "embed"), rngs)
        self.pre_norm = LayerNorm(width, config.norm_eps, rngs=rngs)
        selected = config.depth + 1 + config.select_layer
        make = lambda layer_rngs: ClipBlock(config, layer_rngs)
        self.blocks = stack(make, selected, rngs)
        self.final_blocks = stack(make, config.depth - selected, rngs) if selected < config.depth else None
        self.post_norm = LayerNorm(width, config.norm_eps, rngs=rngs)

    def hidden(
        self, pixels_UHWC: jax.Array, grid: int | None = None, chunks: ImageChunks | None = None
    ) -> jax.Array:
        """Returns the selected hidden state [U, 1 + P, E], class token first.

        Args:
          pixels_UHWC: normalised pixels of the tower's image size.
          grid: patches on a side to which the image is reduced before; None for all of them.
          chunks: of the images. Layers run the filled ones only; None for all of them.

        Raises:
          InputError: images of another size than the tower's.
        """
        grid = grid or self.config.grid
        patches_UPC = cut(pixels_UHWC, self.config, grid)
        positions_SE = positions_of(self.position_embedding[...], self.config, grid)
        x_UPE = patches_UPC @ self.patch_embedding[...].astype(patches_UPC.dtype)
        class_U1E = jnp.broadcast_to(self.class_embedding[...].astype(x_UPE.dtype), (x_UPE.shape[0], 1, x_UPE.shape[2]))
        x_USE = jnp.concatenate([class_U1E, x_UPE], axis=1) + positions_SE.astype(x_UPE.dtype)
        run = lambda x_USE, block, _: (run_filled(block, x_USE, chunks), None)
        return scan(run, self.pre_norm(x_USE), self.blocks)[0]

    def __call__(
        self, pixels_UHWC: jax.Array, grid: int | None = None, chunks: ImageChunks | None = None
    ) -> jax.Array:
        """Returns the features [U, P, E], the selected hidden state without class token; arguments as of `hidden`."""
        return self.hidden(pixels_UHWC, grid, chunks)[:, 1:]

    def pooled(self, pixels_UHWC: jax.Array) -> jax.Array:
        """Returns CLIP's image feature [U, E] of normalised pixels: the normed class token after the last block."""
        x_USE = self.hidden(pixels_UHWC)
        if self.final_blocks is not None:
            x_USE = scan(lambda x, block, _: (block(x), None), x_USE, self.final_blocks)[0]
        return self.post_norm(x_USE[:, 0])

