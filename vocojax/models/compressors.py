"""Baselines that compress vision tokens outside the decoder (paper §4.2).

One more, `downsample`, needs no module: the vision tower encodes a smaller image (`ModelConfig.tower_grid`).
"""

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from vocojax.config import CompressorConfig
from vocojax.models.layers import BidirectionalAttention, LayerNorm, Linear, parameter
from vocojax.models.stack import scan, stack


class AveragePool(nnx.Module):
    """The means of an image's vision tokens in square windows, row after row: [U, P, E] -> [U, num_tokens, E]."""

    def __init__(self, config: CompressorConfig, vision_width: int):
        self.out_width, self.grid = vision_width, config.grid

    def __call__(self, features_UPE: jax.Array) -> jax.Array:
        side = math.isqrt(features_UPE.shape[1])
        windows_UNPE = rearrange(features_UPE, "u (n h m w) e -> u (n m) (h w) e", n=self.grid, m=self.grid,
                                 h=side // self.grid)
        return windows_UNPE.mean(axis=2)


class RandomTokens(nnx.Module):
    """Some of an image's vision tokens, in their order: [U, P, E] -> [U, num_tokens, E].

    The draw depends on an image's pixels and the training step, and on nothing else of a batch.
    """

    def __init__(self, config: CompressorConfig, vision_width: int):
        self.out_width, self.num_tokens = vision_width, config.num_tokens

    def __call__(self, features_UPE: jax.Array, images_UHWC: jax.Array, step: jax.Array | int) -> jax.Array:
        """Draws the tokens.

        Args:
          features_UPE: vision tokens.
          images_UHWC: uint8 RGB images that they belong to.
          step: the training step, 0 in evaluation.
        """

        def draw(seed: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(seed), step)
            chosen_N = jax.random.choice(key, features_UPE.shape[1], (self.num_tokens,), replace=False)
            return jnp.sort(chosen_N)

        chosen_UN = jax.vmap(draw)(_pixel_sums(images_UHWC))
        return jnp.take_along_axis(features_UPE, chosen_UN[..., None], axis=1)


def _pixel_sums(images_UHWC: jax.Array) -> jax.Array:
    """Returns uint32 [U], a weighted sum of each image's pixels. Two images rarely have the same."""
    pixels_UX = images_UHWC.reshape(len(images_UHWC), -1).astype(jnp.uint32)
    weights_X = jnp.arange(pixels_UX.shape[1], dtype=jnp.uint32) * jnp.uint32(0x9E3779B1) | jnp.uint32(1)
    return (pixels_UX * weights_X).sum(axis=1, dtype=jnp.uint32)


class QFormerBlock(nnx.Module):
    """BERT's post-norm layer over the queries; some of the layers have cross attention to the vision features."""

    def __init__(self, config: CompressorConfig, vision_width: int, has_cross_attention: bool, rngs: nnx.Rngs):
        width, norm = config.width, lambda: LayerNorm(config.width, config.norm_eps, rngs=rngs)
        self.attention = BidirectionalAttention(width, width, config.num_heads, rngs=rngs)
        self.attention_norm = norm()
        self.cross_attention = (
            BidirectionalAttention(width, vision_width, config.num_heads, rngs=rngs) if has_cross_attention else None
        )
        self.cross_attention_norm = norm() if has_cross_attention else None
        self.mlp_in = Linear(width, config.mlp_width, ("embed", "mlp"), use_bias=True, rngs=rngs)
        self.mlp_out = Linear(config.mlp_width, width, ("mlp", "embed"), use_bias=True, rngs=rngs)
        self.mlp_norm = norm()

    def __call__(self, x_UQE: jax.Array, features_UPE: jax.Array) -> jax.Array:
        x_UQE = self.attention_norm(x_UQE + self.attention(x_UQE, x_UQE))
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            x_UQE = self.cross_attention_norm(x_UQE + self.cross_attention(x_UQE, features_UPE))
        hidden = jax.nn.gelu(self.mlp_in(x_UQE), approximate=False)
        return self.mlp_norm(x_UQE + self.mlp_out(hidden))


class QFormerGroup(nnx.Module):
    """`cross_attention_every` layers, of which the first has cross attention: the unit that repeats."""

    def __init__(self, config: CompressorConfig, vision_width: int, rngs: nnx.Rngs):
        self.crossing = QFormerBlock(config, vision_width, True, rngs)
        rest = config.cross_attention_every - 1
        make = lambda layer_rngs: QFormerBlock(config, vision_width, False, layer_rngs)
        self.rest = stack(make, rest, rngs) if rest else None

    def __call__(self, x_UQE: jax.Array, features_UPE: jax.Array) -> jax.Array:
        x_UQE = self.crossing(x_UQE, features_UPE)
        if self.rest is None:
            return x_UQE
        return scan(lambda x, block, _: (block(x, features_UPE), None), x_UQE, self.rest)[0]


class QFormer(nnx.Module):
    """BLIP-2's Q-Former without text (arXiv 2301.12597): learned queries that read the vision features.

    [U, P, vision_width] -> [U, num_tokens, width].
    """

    def __init__(self, config: CompressorConfig, vision_width: int, rngs: nnx.Rngs):
        self.out_width = config.width
        self.vision_norm = LayerNorm(vision_width, 1e-5, rngs=rngs)
        query_init = nnx.initializers.normal(0.02)
        self.queries = parameter(query_init, (config.num_tokens, config.width), (None, "embed"), rngs)
        self.query_norm = LayerNorm(config.width, config.norm_eps, rngs=rngs)
        make = lambda layer_rngs: QFormerGroup(config, vision_width, layer_rngs)
        self.groups = stack(make, config.depth // config.cross_attention_every, rngs)

    def __call__(self, features_UPE: jax.Array) -> jax.Array:
        features_UPE = self.vision_norm(features_UPE)
        queries_UQE = jnp.broadcast_to(
            self.queries[...].astype(features_UPE.dtype), (features_UPE.shape[0], *self.queries.shape)
        )
        run = lambda x, group, _: (group(x, features_UPE), None)
        return scan(run, self.query_norm(queries_UQE), self.groups)[0]


Compressor = AveragePool | RandomTokens | QFormer


def make_compressor(config: CompressorConfig, vision_width: int, rngs: nnx.Rngs) -> Compressor | None:
    """Builds the compressor that a config names; None if the decoder itself compresses, or the tower reads less."""
    if config.kind == "avg_pool":
        return AveragePool(config, vision_width)
    if config.kind == "random":
        return RandomTokens(config, vision_width)
    if config.kind == "qformer":
        return QFormer(config, vision_width, rngs)
    return None
