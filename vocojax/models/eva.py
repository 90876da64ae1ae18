"""EVA-CLIP's vision transformer as BLIP-2 and LLaMA-VID use it (arXiv 2303.15389).

No norm before or after the blocks, attention whose keys have no bias, exact GELU. Published weights are of ViT-g/14
with 39 blocks of width 1408.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from vocojax.config import VisionConfig
from vocojax.models.image_chunks import ImageChunks, run_filled
from vocojax.models.layers import LayerNorm, Linear, parameter
from vocojax.models.patches import cut, positions_of
from vocojax.models.stack import scan, stack


class EvaAttention(nnx.Module):
    """Multi-head self-attention from one fused projection, with biases for queries and values only."""

    def __init__(self, width: int, num_heads: int, rngs: nnx.Rngs):
        self.qkv = Linear(width, 3 * width, ("embed", "heads"), use_bias=False, rngs=rngs)
        self.query_bias = parameter(nnx.initializers.zeros, (width,), ("heads",), rngs)
        self.value_bias = parameter(nnx.initializers.zeros, (width,), ("heads",), rngs)
        self.out = Linear(width, width, ("heads", "embed"), use_bias=True, rngs=rngs)
        self.num_heads = num_heads

    def __call__(self, x_USE: jax.Array) -> jax.Array:
        q_USE, k_USE, v_USE = jnp.split(self.qkv(x_USE), 3, axis=-1)
        q_USE = q_USE + self.query_bias[...].astype(x_USE.dtype)
        v_USE = v_USE + self.value_bias[...].astype(x_USE.dtype)
        split = lambda y: y.reshape(*y.shape[:-1], self.num_heads, -1)
        attended_USHD = jax.nn.dot_product_attention(split(q_USE), split(k_USE), split(v_USE))
        return self.out(attended_USHD.reshape(x_USE.shape))


class EvaBlock(nnx.Module):
    """A layer of pre-norm attention and MLP, each added to its input."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        width = config.width
        self.attention_norm = LayerNorm(width, config.norm_eps, rngs=rngs)
        self.attention = EvaAttention(width, config.num_heads, rngs)
        self.mlp_norm = LayerNorm(width, config.norm_eps, rngs=rngs)
        self.mlp_in = Linear(width, config.mlp_width, ("embed", "mlp"), use_bias=True, rngs=rngs)
        self.mlp_out = Linear(config.mlp_width, width, ("mlp", "embed"), use_bias=True, rngs=rngs)

    def __call__(self, x_USE: jax.Array) -> jax.Array:
        x_USE = x_USE + self.attention(self.attention_norm(x_USE))
        return x_USE + self.mlp_out(jax.nn.gelu(self.mlp_in(self.mlp_norm(x_USE)), approximate=False))


class EvaVision(nnx.Module):
    """The vision tower. It takes CLIP's normalised pixels (`vocojax.models.clip.normalise`)."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        width, patch = config.width, config.patch_size
        small = nnx.initializers.truncated_normal(0.02)
        self.config = config
        self.class_embedding = parameter(small, (width,), ("norm",), rngs)
        self.patch_embedding = Linear(patch * patch * 3, width, (None, "embed"), use_bias=True, rngs=rngs)
        self.position_embedding = parameter(small, (config.num_patches + 1, width), (None, "embed"), rngs)
        self.blocks = stack(lambda layer_rngs: EvaBlock(config, layer_rngs), config.depth, rngs)

    def hidden(
        self, pixels_UHWC: jax.Array, grid: int | None = None, chunks: ImageChunks | None = None
    ) -> jax.Array:
        """Returns the last block's output [U, 1 + P, E], class token first.

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
        x_UPE = self.patch_embedding(patches_UPC)
        class_U1E = jnp.broadcast_to(self.class_embedding[...].astype(x_UPE.dtype), (x_UPE.shape[0], 1, x_UPE.shape[2]))
        x_USE = jnp.concatenate([class_U1E, x_UPE], axis=1) + positions_SE.astype(x_UPE.dtype)
        return scan(lambda x, block, _: (run_filled(block, x, chunks), None), x_USE, self.blocks)[0]

    def __call__(
        self, pixels_UHWC: jax.Array, grid: int | None = None, chunks: ImageChunks | None = None
    ) -> jax.Array:
        """Returns the features [U, P, E] of normalised pixels, without class token; arguments as of `hidden`."""
        return self.hidden(pixels_UHWC, grid, chunks)[:, 1:]
