"""Interval attention of one query per row against a static cache: a step of decoding.

The cache has room for tokens that are still to come, so the query's index does not follow from the number of keys: it
is an argument. Keys are grouped by head (`[B, G, K, D]`), which makes both products plain matrix products over
contiguous memory. A step reads the cache once and is bound by that. XLA fuses the rest, so no kernel is needed.
"""

import jax
import jax.numpy as jnp


def one_query_attention(
    q_BHD: jax.Array,
    k_BGKD: jax.Array,
    v_BGKD: jax.Array,
    start_B: jax.Array,
    stop_BK: jax.Array,
    index: jax.Array,
    *,
    scale: float | None = None,
) -> jax.Array:
    """Computes softmax attention of the query at `index` over the keys that its interval lets it see.

    The rule is `IntervalMask`'s: key `j` is seen iff `start <= j <= index and index < stop[j]`. This hides the
    keys after `index`, which are not written yet. A query that sees nothing gets output 0.

    Args:
      q_BHD: the queries, any float dtype.
      k_BGKD: keys in a static cache of K slots, the dtype of q. What no query sees may hold anything finite.
      v_BGKD: values, likewise.
      start_B: int32, the first key of the query's window.
      stop_BK: int32, per key the first query index that no longer sees it.
      index: int32 scalar, or [B]: the query's own slot.
      scale: factor of the scores; `D ** -0.5` if not given.

    Returns:
      `out_BHD` in the dtype of q; scores and softmax are fp32 inside.
    """
    B, H, D = q_BHD.shape
    G, K = k_BGKD.shape[1:3]
    wide = jnp.promote_types(q_BHD.dtype, jnp.float32)
    scale = D**-0.5 if scale is None else scale
    j = jnp.arange(K)
    i_B1 = jnp.broadcast_to(index, (B,))[:, None]
    seen = ((start_B[:, None] <= j) & (j <= i_B1) & (i_B1 < stop_BK))[:, None, None]
    q_BGRD = q_BHD.reshape(B, G, H // G, D)
    scores = scale * jnp.einsum("BGRD,BGKD->BGRK", q_BGRD, k_BGKD, preferred_element_type=wide)
    highest = jnp.max(scores, axis=-1, keepdims=True, where=seen, initial=jnp.finfo(wide).min)
    weights = jnp.exp(jnp.where(seen, scores - highest, -jnp.inf))
    total = weights.sum(axis=-1, keepdims=True)
    weights = (weights / jnp.where(total > 0, total, 1)).astype(v_BGKD.dtype)
    out_BGRD = jnp.einsum("BGRK,BGKD->BGRD", weights, v_BGKD, preferred_element_type=wide)
    return out_BGRD.reshape(B, H, D).astype(q_BHD.dtype)
