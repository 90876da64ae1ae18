"""Layers shared by the vision tower, the compressors and the decoder.

Parameters are stored in the dtype they were created or loaded in (fp32 masters, bf16 where frozen) and cast to the
activation's dtype where they are used; norms compute in fp32.

Every parameter carries logical axis names; `parallel/shardings.py` maps them to mesh axes. Creating a parameter never
shards it (`eager_sharding=False`): whoever creates a model jits the creation with the shardings it wants.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

Initializer = Callable[..., jax.Array]
Axes = tuple[str | None, ...]


def parameter(init: Initializer, shape: tuple[int, ...], axes: Axes, rngs: nnx.Rngs) -> nnx.Param:
    """Creates an fp32 parameter of that shape, with one logical axis name per dimension."""
    return nnx.Param(init(rngs.params(), shape, jnp.float32), out_sharding=axes, eager_sharding=False)


class Linear(nnx.Module):
    """`x @ kernel (+ bias)` over the last axis; kernel [in, out]."""

    def __init__(self, in_width: int, out_width: int, axes: Axes, *, use_bias: bool, rngs: nnx.Rngs):
        self.kernel = parameter(nnx.initializers.lecun_normal(), (in_width, out_width), axes, rngs)
        self.bias = parameter(nnx.initializers.zeros, (out_width,), axes[1:], rngs) if use_bias else None
        self.lora: Callable[[jax.Array], jax.Array] | None = None  # `lora.add_lora` sets it

    def __call__(self, x: jax.Array) -> jax.Array:
        # One product over all tokens: XLA's CPU backend runs the backward pass of the batched form at half the speed.
        tokens = x.reshape(-1, x.shape[-1])
        y = tokens @ self.kernel[...].astype(x.dtype)
        if self.lora is not None:
            y = y + self.lora(tokens)
        y = checkpoint_name(y, "linear")
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis with scale and bias, in fp32."""

    def __init__(self, width: int, eps: float, *, rngs: nnx.Rngs):
        self.scale = parameter(nnx.initializers.ones, (width,), ("norm",), rngs)
        self.bias = parameter(nnx.initializers.zeros, (width,), ("norm",), rngs)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis with a scale, in fp32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float, *, rngs: nnx.Rngs):
        self.scale = parameter(nnx.initializers.ones, (width,), ("norm",), rngs)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        # Named without its last axis, which a TPU would pad from 1 to 128.
        mean_square = checkpoint_name(jnp.square(y).mean(-1), "norm")[..., None]
        y = y * jax.lax.rsqrt(mean_square + self.eps)
        return _settled((y * self.scale[...]).astype(x.dtype))


@jax.custom_vjp
def _settled(x: jax.Array) -> jax.Array:
    """Returns x. Its gradient is written to memory before it is used.

    Without this, XLA on TPU fuses the norm's gradient with the product that made its input, which takes longer than
    both.
    """
    return x


_settled.defvjp(lambda x: (x, None), lambda _, grad: (jax.lax.optimization_barrier(grad),))


@jax.custom_vjp
def settled_together(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns both. Their gradients are written to memory before they are used.

    Without this, XLA on TPU computes the gradient of SwiGLU again in each of the four products that read it.
    """
    return gate, up


settled_together.defvjp(
    lambda gate, up: ((gate, up), None), lambda _, grads: jax.lax.optimization_barrier(grads)
)


class BidirectionalAttention(nnx.Module):
    """Multi-head attention from `x` to `context` (to itself if they are the same array), in both directions."""

    def __init__(self, width: int, context_width: int, num_heads: int, *, rngs: nnx.Rngs):
        into = lambda in_width: Linear(in_width, width, ("embed", "heads"), use_bias=True, rngs=rngs)
        self.query, self.key, self.value = into(width), into(context_width), into(context_width)
        self.out = Linear(width, width, ("heads", "embed"), use_bias=True, rngs=rngs)
        self.num_heads = num_heads

    def __call__(self, x_UQE: jax.Array, context_UKE: jax.Array, is_token_UK: jax.Array | None = None) -> jax.Array:
        """Attends to the tokens of the context that are no padding; without `is_token_UK`, to all."""
        split = lambda y: y.reshape(*y.shape[:-1], self.num_heads, -1)
        attended_UQHD = jax.nn.dot_product_attention(
            split(self.query(x_UQE)), split(self.key(context_UKE)), split(self.value(context_UKE)),
            mask=None if is_token_UK is None else is_token_UK[:, None, None],
        )
        return self.out(attended_UQHD.reshape(x_UQE.shape))
