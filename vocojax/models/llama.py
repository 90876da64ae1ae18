"""The LLaMA decoder: RMSNorm, rotary positions (also Llama 3's), SwiGLU, grouped-query attention."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from vocojax.config import DecoderConfig, RopeScalingConfig
from vocojax.kernels.interval_attention import IntervalMask, interval_attention, one_query_attention
from vocojax.kernels.rotary import Rotation, rotate
from vocojax.models.layers import Linear, RMSNorm, parameter, settled_together
from vocojax.models.stack import scan, stack


class KeyValues(NamedTuple):
    """Keys and values of some tokens in every layer.

    Attributes:
      k_LBKGD: keys after RoPE.
      v_LBKGD: values.
    """

    k_LBKGD: jax.Array
    v_LBKGD: jax.Array

    @property
    def length(self) -> int:
        """Tokens held per row."""
        return self.k_LBKGD.shape[2]


class StaticCache(NamedTuple):
    """Keys and values of a decoding loop, with K slots that are filled while it runs.

    Attributes:
      k_LBGKD: keys after RoPE.
      v_LBGKD: values.
    """

    k_LBGKD: jax.Array
    v_LBGKD: jax.Array

    @classmethod
    def starting_with(cls, parts: Sequence[KeyValues], room: int, dtype: DTypeLike) -> "StaticCache":
        """Returns a cache of the parts one after the other, and then `room` empty slots."""
        join = lambda *arrays: jnp.pad(
            jnp.concatenate([x.astype(dtype).swapaxes(2, 3) for x in arrays], axis=3),
            [(0, 0)] * 3 + [(0, room), (0, 0)],
        )
        return cls(*(join(*arrays) for arrays in zip(*parts, strict=True)))

    @property
    def length(self) -> int:
        """Slots per row."""
        return self.k_LBGKD.shape[3]


def rope_frequencies(head_width: int, theta: float, scaling: RopeScalingConfig | None) -> np.ndarray:
    """Returns the radians per position of each of the D/2 rotated pairs, fp32.

    With `linear` scaling every frequency is divided by `factor`. With `llama3` scaling, wavelengths beyond
    `original_max_positions / low_freq_factor` are stretched by `factor`, those below
    `original_max_positions / high_freq_factor` are kept, and those between are interpolated (Llama 3.1).
    """
    frequencies = theta ** -(np.arange(0, head_width, 2, dtype=np.float64) / head_width)
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    if scaling is not None and scaling.kind == "llama3":
        turns = scaling.original_max_positions * frequencies / (2 * math.pi)
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        frequencies = frequencies * (keep + (1 - keep) / scaling.factor)
    return frequencies.astype(np.float32)


class DecoderBlock(nnx.Module):
    """One decoder layer."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        width, heads, kv_heads = config.width, config.num_heads, config.num_kv_heads
        linear = lambda i, o, axes: Linear(i, o, axes, use_bias=False, rngs=rngs)
        self.attention_norm = RMSNorm(width, config.norm_eps, rngs=rngs)
        self.query = linear(width, heads * config.head_width, ("embed", "heads"))
        self.key = linear(width, kv_heads * config.head_width, ("embed", "kv_heads"))
        self.value = linear(width, kv_heads * config.head_width, ("embed", "kv_heads"))
        self.out = linear(heads * config.head_width, width, ("heads", "embed"))
        self.mlp_norm = RMSNorm(width, config.norm_eps, rngs=rngs)
        self.gate = linear(width, config.mlp_width, ("embed", "mlp"))
        self.up = linear(width, config.mlp_width, ("embed", "mlp"))
        self.down = linear(config.mlp_width, width, ("mlp", "embed"))
        self.config = config

    def __call__(
        self,
        x_BSE: jax.Array,
        rotation: Rotation,
        mask: IntervalMask,
        prefix_BPGD: tuple[jax.Array, jax.Array] | None,
        attention: str | None,
        keeps_products: bool = False,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Returns the layer's output and the keys and values of x's own tokens, each [B, S, G, D].

        With `keeps_products` the backward pass does not compute the layer's products again.
        """
        q_BSHD, k_BSGD, v_BSGD = self._project(x_BSE, rotation, attention)
        k_BKGD, v_BKGD = k_BSGD, v_BSGD
        if prefix_BPGD is not None:
            k_BKGD = jnp.concatenate([prefix_BPGD[0].astype(k_BSGD.dtype), k_BSGD], axis=1)
            v_BKGD = jnp.concatenate([prefix_BPGD[1].astype(v_BSGD.dtype), v_BSGD], axis=1)
        attended_BSHD = interval_attention(q_BSHD, k_BKGD, v_BKGD, mask, implementation=attention)
        return self._finish(x_BSE, attended_BSHD, keeps_products), (k_BSGD, v_BSGD)

    def decode(
        self, x_B1E: jax.Array, rotation: Rotation, cache: StaticCache, layer: jax.Array, index: jax.Array,
        stop_BK: jax.Array,
    ) -> tuple[jax.Array, StaticCache]:
        """Runs the layer on one token per row: writes its key and value into slot `index` of the cache, then attends.

        Returns:
          The layer's output [B, 1, E], and the cache.
        """
        q_B1HD, *fresh = self._project(x_B1E, rotation, None)
        write = lambda old, new_B1GD: jax.lax.dynamic_update_slice(
            old, new_B1GD.swapaxes(1, 2)[None].astype(old.dtype), (layer, 0, 0, index, 0)
        )
        cache = StaticCache(*map(write, cache, fresh))
        own = lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False).astype(q_B1HD.dtype)
        k_BGKD, v_BGKD = map(own, cache)
        start_B = jnp.zeros(len(x_B1E), jnp.int32)
        attended_BHD = one_query_attention(q_B1HD[:, 0], k_BGKD, v_BGKD, start_B, stop_BK, index)
        return self._finish(x_B1E, attended_BHD[:, None]), cache

    def _project(
        self, x_BSE: jax.Array, rotation: Rotation, implementation: str | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns rotated queries and keys, and values: [B, S, H or G, D]."""
        split = lambda y: y.reshape(*y.shape[:-1], -1, self.config.head_width)
        normed = self.attention_norm(x_BSE)
        q_BSHD = rotate(split(self.query(normed)), rotation, implementation=implementation)
        k_BSGD = rotate(split(self.key(normed)), rotation, implementation=implementation)
        return q_BSHD, k_BSGD, split(self.value(normed))

    def keys_and_values(self, x_BSE: jax.Array, rotation: Rotation) -> KeyValues:
        """Returns rotated keys, and values, that the layer makes of some states: [B, S, G, D]."""
        _, k_BSGD, v_BSGD = self._project(x_BSE, rotation, "xla")
        return KeyValues(k_BSGD, v_BSGD)

    def _finish(self, x_BSE: jax.Array, attended_BSHD: jax.Array, keeps_products: bool = False) -> jax.Array:
        """Adds the attention's output and the MLP to the residual stream."""
        x_BSE = x_BSE + self.out(attended_BSHD.reshape(*x_BSE.shape[:2], -1))
        normed = self.mlp_norm(x_BSE)
        gate, up = settled_together(self.gate(normed), self.up(normed))
        if keeps_products:  # Else XLA on TPU fuses SwiGLU into a product, and copies its result to where it is kept.
            gate, up = jax.lax.optimization_barrier((gate, up))
        return x_BSE + self.down(jax.nn.silu(gate) * up)


class Decoder(nnx.Module):
    """The decoder: embeddings in, hidden states out. `logits` reads hidden states where tokens are wanted.

    Args:
      config: of the decoder.
      rngs: random streams for parameters that are not loaded.
      voco_offsets: rows that tell the VoCo tokens of a unit apart, see `VocoConfig.rows`; 0 for none.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, voco_offsets: int = 0):
        self.config = config
        embed_init = nnx.initializers.normal(config.width**-0.5)
        self.embedding = parameter(embed_init, (config.vocab_size, config.width), ("vocab", "embed"), rngs)
        self.blocks = stack(lambda layer_rngs: DecoderBlock(config, layer_rngs), config.depth, rngs)
        self.norm = RMSNorm(config.width, config.norm_eps, rngs=rngs)
        self.head = (
            None if config.tie_embeddings
            else Linear(config.width, config.vocab_size, ("embed", "vocab"), use_bias=False, rngs=rngs)
        )
        # Last, so that all other random parameters are those of a model without offsets.
        self.voco_offsets = (
            parameter(embed_init, (voco_offsets, config.width), (None, "embed"), rngs) if voco_offsets else None
        )

    def embed(self, ids_BS: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Returns the embeddings [B, S, E] of token ids."""
        return self.embedding[...][ids_BS].astype(dtype)  # cast last: a token's gradient is summed before it is rounded

    @jax.named_scope("decoder")
    def __call__(
        self,
        x_BSE: jax.Array,
        positions_BS: jax.Array,
        mask: IntervalMask,
        *,
        prefix: KeyValues | None = None,
        keep: int = 0,
        keep_outputs: bool = False,
        attention: str | None = None,
        remat: str = "none",
    ) -> tuple[jax.Array, KeyValues]:
        """Runs the layers.

        Args:
          x_BSE: embeddings.
          positions_BS: int32 rotary positions.
          mask: over [B, S] queries and [B, P + S] keys.
          prefix: keys and values of P earlier tokens.
          keep: how many of the last tokens' keys and values are returned.
          keep_outputs: whether these are made of each layer's output, and not of its input; see `VocoConfig.reads`.
          attention: implementation of `interval_attention`; None picks by platform.
          remat: a key of `stack.REMAT_POLICIES`.

        Returns:
          Hidden states [B, S, E] before the final norm, and the last `keep` tokens' keys and values.
        """
        first = x_BSE.shape[1] - keep
        rotation = self.rotation(positions_BS)

        def run(x: jax.Array, block: DecoderBlock, layer_prefix: KeyValues | None) -> tuple[jax.Array, KeyValues]:
            x, (k_BSGD, v_BSGD) = block(x, rotation, mask, layer_prefix, attention, remat == "minimal")
            if keep_outputs:
                return x, block.keys_and_values(x[:, first:], self.rotation(positions_BS[:, first:]))
            return x, KeyValues(k_BSGD[:, first:], v_BSGD[:, first:])

        return scan(run, x_BSE, self.blocks, prefix, remat=remat)

    def decode(
        self, x_B1E: jax.Array, positions_B1: jax.Array, cache: StaticCache, index: jax.Array, stop_BK: jax.Array
    ) -> tuple[jax.Array, StaticCache]:
        """Runs the layers on one more token per row.

        Args:
          x_B1E: its embedding.
          positions_B1: int32 rotary positions.
          cache: the tokens before it; its own key and value are written into slot `index`, in place where the caller
            carries the cache through a loop.
          index: int32 scalar.
          stop_BK: int32 interval mask of the cache's slots; slots after `index` are never seen.

        Returns:
          Hidden states [B, 1, E] before the final norm, and the cache.
        """
        rotation = self.rotation(positions_B1)

        def run(carry: tuple[jax.Array, StaticCache], block: DecoderBlock, layer: jax.Array) -> tuple[Any, None]:
            return block.decode(carry[0], rotation, carry[1], layer, index, stop_BK), None

        return scan(run, (x_B1E, cache), self.blocks, jnp.arange(self.config.depth))[0]

    def rotation(self, positions_BS: jax.Array) -> Rotation:
        """Returns the rotation of queries and keys at these positions, the same in every layer."""
        config = self.config
        return Rotation.of(positions_BS, rope_frequencies(config.head_width, config.rope_theta, config.rope_scaling))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns the fp32 logits [..., V] of hidden states [..., E].

        Rows of the vocabulary that stand for no token get -1e30, so that they take no part in a softmax or an argmax.
        """
        hidden = self.norm(hidden)
        kernel = self.embedding[...].T if self.head is None else self.head.kernel[...]
        logits = jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
        if self.config.vocab_padding == 0:
            return logits
        is_token_V = jnp.arange(self.config.vocab_size) < self.config.num_tokens
        return jnp.where(is_token_V, logits, -1e30)
