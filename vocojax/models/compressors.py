"""Baselines that compress vision tokens outside the decoder (paper §4.2): average pooling and BLIP-2's Q-Former."""

import jax
import jax.numpy as jnp
from flax import nnx

from vocojax.config import CompressorConfig
from vocojax.models.layers import BidirectionalAttention, LayerNorm, Linear, parameter
from vocojax.models.stack import scan, stack


class AveragePool(nnx.Module):
    """The mean of an image's vision tokens: [U, P, E] -> [U, 1, E]."""

    def __init__(self, vision_width: int):
        self.out_width = vision_width

    def __call__(self, features_UPE: jax.Array) -> jax.Array:
        return features_UPE.mean(axis=1, keepdims=True)


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


def make_compressor(config: CompressorConfig, vision_width: int, rngs: nnx.Rngs) -> AveragePool | QFormer | None:
    """Builds the compressor that a config names; None if the decoder itself compresses."""
    if config.kind == "avg_pool":
        return AveragePool(vision_width)
    if config.kind == "qformer":
        return QFormer(config, vision_width, rngs)
    return None
