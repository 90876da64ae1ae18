"""Interval attention written out: dense scores and a float32 softmax. Tests compare the others with it."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vocojax.kernels.interval_attention.mask import IntervalMask


def reference_attention(
    q_BQHD: jax.Array, k_BKGD: jax.Array, v_BKGD: jax.Array, mask: IntervalMask, scale: float
) -> jax.Array:
    """Computes softmax attention with the whole `[B, H, Q, K]` array of scores, differentiated by JAX itself.

    Arguments and result are those of `interval_attention`.
    """
    B, Q, H, D = q_BQHD.shape
    G = k_BKGD.shape[2]
    wide = jnp.promote_types(q_BQHD.dtype, jnp.float32)
    visible = mask.dense()[:, None, None]

    q_BQGRD = q_BQHD.reshape(B, Q, G, H // G, D)
    scores = scale * jnp.einsum("BQGRD,BKGD->BGRQK", q_BQGRD, k_BKGD, preferred_element_type=wide)
    # A row without a visible key has no maximum. A finite one in its place keeps it, and its gradient, at exactly zero.
    highest = jnp.max(scores, axis=-1, keepdims=True, where=visible, initial=jnp.finfo(wide).min)
    weights = jnp.exp(jnp.where(visible, scores - jax.lax.stop_gradient(highest), -jnp.inf))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1)
    out_BQGRD = jnp.einsum("BGRQK,BKGD->BQGRD", weights.astype(v_BKGD.dtype), v_BKGD, preferred_element_type=wide)
    return checkpoint_name(out_BQGRD.reshape(B, Q, H, D).astype(q_BQHD.dtype), "attention_out")
