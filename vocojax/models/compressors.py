"""Baselines that compress vision tokens outside the decoder (paper §4.2).

One more, `downsample`, needs no module: the vision tower encodes a smaller image (`ModelConfig.tower_grid`).
"""

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from vocojax.config import CompressorConfig, ModelConfig
from vocojax.models.layers import BidirectionalAttention, LayerNorm, Linear, parameter
from vocojax.models.stack import scan, stack


class AveragePool(nnx.Module):
    """The means of an image's vision tokens in square windows: [U, P, E] -> [U, num_tokens, E]."""

    def __init__(self, config: CompressorConfig, vision_width: int):
        self.out_width, self.grid = vision_width, config.content_grid

    def __call__(self, features_UPE: jax.Array) -> jax.Array:
        return pool(features_UPE, self.grid)


def pool(features_UPE: jax.Array, grid: int) -> jax.Array:
    """Returns the means [U, grid * grid, E] of square windows of an image's vision tokens, row after row."""
    side = math.isqrt(features_UPE.shape[1])
    windows_UNPE = rearrange(features_UPE, "u (n h m w) e -> u (n m) (h w) e", n=grid, m=grid, h=side // grid)
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
    """BERT's post-norm layer over queries; some of the layers have cross attention to the vision features.

    With InstructBLIP's text (arXiv 2305.06500), queries and text attend to each other. Text has its own MLP and no
    cross attention.
    """

    def __init__(self, config: CompressorConfig, vision_width: int, has_cross_attention: bool, rngs: nnx.Rngs):
        width, norm = config.width, lambda: LayerNorm(config.width, config.norm_eps, rngs=rngs)
        self.num_queries = config.queries
        self.attention = BidirectionalAttention(width, width, config.num_heads, rngs=rngs)
        self.attention_norm = norm()
        self.cross_attention = (
            BidirectionalAttention(width, vision_width, config.num_heads, rngs=rngs) if has_cross_attention else None
        )
        self.cross_attention_norm = norm() if has_cross_attention else None
        into = lambda: Linear(width, config.mlp_width, ("embed", "mlp"), use_bias=True, rngs=rngs)
        out = lambda: Linear(config.mlp_width, width, ("mlp", "embed"), use_bias=True, rngs=rngs)
        self.mlp_in, self.mlp_out, self.mlp_norm = into(), out(), norm()
        self.text_mlp_in = into() if config.reads_text else None
        self.text_mlp_out = out() if config.reads_text else None
        self.text_mlp_norm = norm() if config.reads_text else None

    def __call__(self, x_USE: jax.Array, features_UPE: jax.Array, is_token_US: jax.Array | None = None) -> jax.Array:
        """Runs the layer.

        Args:
          x_USE: queries, and then text if the Q-Former reads any.
          features_UPE: vision features.
          is_token_US: bool, False for padding of the text; None for no padding.
        """
        x_USE = self.attention_norm(x_USE + self.attention(x_USE, x_USE, is_token_US))
        x_UQE, text_UTE = x_USE[:, : self.num_queries], x_USE[:, self.num_queries :]
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            x_UQE = self.cross_attention_norm(x_UQE + self.cross_attention(x_UQE, features_UPE))
        hidden = jax.nn.gelu(self.mlp_in(x_UQE), approximate=False)
        x_UQE = self.mlp_norm(x_UQE + self.mlp_out(hidden))
        if self.text_mlp_in is None or self.text_mlp_out is None or self.text_mlp_norm is None:
            return x_UQE
        hidden = jax.nn.gelu(self.text_mlp_in(text_UTE), approximate=False)
        text_UTE = self.text_mlp_norm(text_UTE + self.text_mlp_out(hidden))
        return jnp.concatenate([x_UQE, text_UTE], axis=1)


class QFormerGroup(nnx.Module):
    """`cross_attention_every` layers, of which the first has cross attention: the unit that repeats."""

    def __init__(self, config: CompressorConfig, vision_width: int, rngs: nnx.Rngs):
        self.crossing = QFormerBlock(config, vision_width, True, rngs)
        rest = config.cross_attention_every - 1
        make = lambda layer_rngs: QFormerBlock(config, vision_width, False, layer_rngs)
        self.rest = stack(make, rest, rngs) if rest else None

    def __call__(self, x_USE: jax.Array, features_UPE: jax.Array, is_token_US: jax.Array | None = None) -> jax.Array:
        x_USE = self.crossing(x_USE, features_UPE, is_token_US)
        if self.rest is None:
            return x_USE
        return scan(lambda x, block, _: (block(x, features_UPE, is_token_US), None), x_USE, self.rest)[0]


class QFormer(nnx.Module):
    """BLIP-2's Q-Former (arXiv 2301.12597): learned queries that read the vision features, and text if there is any.

    [U, P, vision_width] -> [U, queries, width].
    """

    def __init__(self, config: CompressorConfig, vision_width: int, rngs: nnx.Rngs):
        self.out_width = config.width
        self.vision_norm = LayerNorm(vision_width, 1e-5, rngs=rngs)
        query_init = nnx.initializers.normal(0.02)
        self.queries = parameter(query_init, (config.queries, config.width), (None, "embed"), rngs)
        self.query_norm = LayerNorm(config.width, config.norm_eps, rngs=rngs)
        make = lambda layer_rngs: QFormerGroup(config, vision_width, layer_rngs)
        self.groups = stack(make, config.depth // config.cross_attention_every, rngs)

    def __call__(
        self, features_UPE: jax.Array, text_UTE: jax.Array | None = None, is_token_UT: jax.Array | None = None
    ) -> jax.Array:
        """Runs the queries.

        Args:
          features_UPE: vision features.
          text_UTE: embedded text, or None.
          is_token_UT: bool, False for the text's padding.
        """
        features_UPE = self.vision_norm(features_UPE)
        queries_UQE = jnp.broadcast_to(
            self.queries[...].astype(features_UPE.dtype), (features_UPE.shape[0], *self.queries.shape)
        )
        x_USE, is_token_US = queries_UQE, None
        if text_UTE is not None and is_token_UT is not None:
            x_USE = jnp.concatenate([queries_UQE, text_UTE.astype(queries_UQE.dtype)], axis=1)
            is_token_US = jnp.concatenate([jnp.ones(queries_UQE.shape[:2], bool), is_token_UT], axis=1)
        run = lambda x, group, _: (group(x, features_UPE, is_token_US), None)
        return scan(run, self.query_norm(x_USE), self.groups)[0][:, : queries_UQE.shape[1]]


class LlamaVid(nnx.Module):
    """LLaMA-VID's context and content tokens (arXiv 2311.17043 §3.2).

    A Q-Former makes queries from the question and the image. Each query attends to the vision tokens; the mean of what
    they find becomes one context token. Means of square windows are the content tokens. The context token has its own
    projection to the decoder, the content tokens take the projector.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        compressor, width = config.compressor, config.vision.width
        self.out_width, self.grid = width, compressor.content_grid
        embedding = lambda rows, axis: parameter(
            nnx.initializers.normal(0.02), (rows, compressor.width), (axis, "embed"), rngs)
        self.word_embedding = embedding(config.decoder.vocab_size, "vocab")
        self.position_embedding = embedding(compressor.question_tokens, None)
        self.qformer = QFormer(compressor, width, rngs)
        self.query = Linear(compressor.width, width, ("embed", "heads"), use_bias=True, rngs=rngs)
        self.key = Linear(width, width, ("embed", "heads"), use_bias=True, rngs=rngs)
        self.value = Linear(width, config.decoder.width, ("heads", "embed"), use_bias=True, rngs=rngs)

    def __call__(self, features_USE: jax.Array, questions_UT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Compresses images for their questions.

        Args:
          features_USE: vision tokens after the class token, which only the Q-Former reads.
          questions_UT: int32 token ids, -1 after the last one.

        Returns:
          The context tokens [U, 1, decoder width] and the content tokens [U, num_tokens - 1, vision width].
        """
        is_token_UT = questions_UT >= 0
        words_UTE = self.word_embedding[...][jnp.maximum(questions_UT, 0)] + self.position_embedding[...]
        queries_UQE = self.query(self.qformer(features_USE, words_UTE, is_token_UT))
        features_UPE = features_USE[:, 1:]
        found_UQE = jax.nn.dot_product_attention(
            queries_UQE[:, :, None], self.key(features_UPE)[:, :, None], features_UPE[:, :, None])[:, :, 0]
        context_U1E = self.value(found_UQE.mean(axis=1, keepdims=True))
        return context_U1E, pool(features_UPE, self.grid)


Compressor = AveragePool | RandomTokens | QFormer | LlamaVid


def make_compressor(config: ModelConfig, rngs: nnx.Rngs) -> Compressor | None:
    """Builds the compressor that a config names; None if the decoder itself compresses, or the tower reads less."""
    compressor, vision_width = config.compressor, config.vision.width
    if compressor.kind == "avg_pool":
        return AveragePool(compressor, vision_width)
    if compressor.kind == "random":
        return RandomTokens(compressor, vision_width)
    if compressor.kind == "qformer":
        return QFormer(compressor, vision_width, rngs)
    if compressor.kind == "llama_vid":
        return LlamaVid(config, rngs)
    return None
