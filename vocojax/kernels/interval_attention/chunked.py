"""Interval attention in plain XLA without an S x S array: for the CPU, and for any device without a kernel of its own.

Queries and keys are cut into chunks. The softmax is accumulated over key chunks with a running maximum, and the
backward pass computes the scores of a chunk pair again from the saved log-sum-exp (FlashAttention, arXiv 2205.14135).
Pairs of chunks without a visible pair are skipped. A sequence that fits in one chunk becomes one dense block without
any loop.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from vocojax.kernels.interval_attention.mask import NEVER, IntervalMask

CHUNK = 128  # most positions of a chunk: the scores of a pair of chunks stay in a core's cache


class _Chunks(NamedTuple):
    """The operands with a leading axis of chunks; lower-case `q` and `k` are positions inside a chunk.

    Heads come before positions, so that the products of a pair of chunks are plain matrix products.
    """

    q_BGRqD: jax.Array
    start_Bq: jax.Array
    i_q: jax.Array
    k_BGkD: jax.Array
    v_BGkD: jax.Array
    stop_Bk: jax.Array
    j_k: jax.Array

    def visible(self, a: Any, b: Any) -> jax.Array:
        """Returns the mask of query chunk `a` and key chunk `b`, bool `[B, 1, 1, q, k]`."""
        i, j = self.i_q[a][:, None], self.j_k[b]
        seen = (self.start_Bq[a][:, :, None] <= j) & (j <= i) & (i < self.stop_Bk[b][:, None, :])
        return seen[:, None, None]

    def key_range(self, a: Any) -> tuple[Any, Any]:
        """Returns the range of key chunks that are not wholly in the future of query chunk `a`."""
        return 0, 1 if len(self.j_k) == 1 else (self.j_k[:, 0] <= self.i_q[a][-1]).sum()

    def query_range(self, b: Any) -> tuple[Any, Any]:
        """Returns the range of query chunks that are not wholly in the past of key chunk `b`."""
        return 0 if len(self.i_q) == 1 else (self.i_q[:, -1] < self.j_k[b][0]).sum(), len(self.i_q)


def _cut(q_BQHD: jax.Array, k_BKGD: jax.Array, v_BKGD: jax.Array, mask: IntervalMask) -> _Chunks:
    """Returns the chunks of the operands."""
    Q, (K, G) = q_BQHD.shape[1], k_BKGD.shape[1:3]
    return _Chunks(
        q_BGRqD=_heads(q_BQHD, G),
        start_Bq=_positions(mask.start, NEVER),
        i_q=_positions(K - Q + jnp.arange(Q)[None], NEVER)[:, 0],
        k_BGkD=_heads(k_BKGD, G)[:, :, :, 0],
        v_BGkD=_heads(v_BKGD, G)[:, :, :, 0],
        stop_Bk=_positions(mask.stop),
        j_k=_positions(jnp.arange(K)[None], NEVER)[:, 0],
    )


def _positions(x_BS: jax.Array, fill: int = 0) -> jax.Array:
    """Returns the chunks `[n, B, s, ...]` of `[B, S, ...]`: as few as `CHUNK` allows, all of one size, so that the
    padding is less than a position per chunk."""
    B, S = x_BS.shape[:2]
    count = -(-S // CHUNK)
    padding = [(0, 0), (0, -S % count)] + [(0, 0)] * (x_BS.ndim - 2)
    padded = jnp.pad(x_BS, padding, constant_values=fill)
    return jnp.moveaxis(padded.reshape(B, count, -1, *x_BS.shape[2:]), 1, 0)


def _heads(x_BSHD: jax.Array, kv_heads: int) -> jax.Array:
    """Returns the chunks `[n, B, G, R, s, D]` of `[B, S, H, D]`, with R heads for each of the G key/value heads."""
    return rearrange(_positions(x_BSHD), "n B s (G R) D -> n B G R s D", G=kv_heads)


def _joined(x_nBGRsD: jax.Array, length: int) -> jax.Array:
    """Puts chunks together again: `[n, B, G, R, s, D]` -> `[B, length, H, D]`."""
    return rearrange(x_nBGRsD, "n B G R s D -> B (n s) (G R) D")[:, :length]


def _loop(low: Any, high: Any, body: Callable[[Any, Any], Any], state: Any) -> Any:
    """Runs a `fori_loop`, or just the step if there is one: short sequences pay for no control flow."""
    once = isinstance(low, int) and isinstance(high, int) and high - low == 1
    return body(low, state) if once else jax.lax.fori_loop(low, high, body, state)


def _for_each(count: int, body: Callable[[Any], Any]) -> Any:
    """Returns the stacked results of `body(0) ... body(count - 1)`."""
    if count == 1:
        return jax.tree.map(lambda x: x[None], body(0))
    return jax.lax.map(body, jnp.arange(count))


def _skip_empty(visible: jax.Array, busy: Callable[[], Any], idle: Callable[[], Any], alone: bool) -> Any:
    """Returns `busy()`, or `idle()` if the chunk pair has no visible pair. A sequence of one chunk is always busy."""
    return busy() if alone else jax.lax.cond(visible.any(), busy, idle)


def forward(
    q_BQHD: jax.Array, k_BKGD: jax.Array, v_BKGD: jax.Array, mask: IntervalMask, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Returns `out_BQHD` in the dtype of q, and `lse_BHQ`, the log-sum-exp of each row's visible scores, in float32."""
    Q = q_BQHD.shape[1]
    c = _cut(q_BQHD, k_BKGD, v_BKGD, mask)
    wide = jnp.promote_types(q_BQHD.dtype, jnp.float32)
    alone = len(c.i_q) == len(c.j_k) == 1

    def query_chunk(a: Any) -> tuple[jax.Array, jax.Array]:
        def key_chunk(b: Any, state: Any) -> Any:
            visible = c.visible(a, b)

            def accumulate() -> Any:
                highest, total, out = state
                scores = scale * jnp.einsum(
                    "BGRqD,BGkD->BGRqk", c.q_BGRqD[a], c.k_BGkD[b], preferred_element_type=wide)
                raised = jnp.maximum(highest, jnp.max(scores, axis=-1, where=visible, initial=lowest, keepdims=True))
                weights = jnp.exp(jnp.where(visible, scores - raised, -jnp.inf))
                decay = jnp.exp(highest - raised)
                narrow = weights.astype(v_BKGD.dtype)
                gain = jnp.einsum("BGRqk,BGkD->BGRqD", narrow, c.v_BGkD[b], preferred_element_type=wide)
                return raised, total * decay + weights.sum(axis=-1, keepdims=True), out * decay + gain

            return _skip_empty(visible, accumulate, lambda: state, alone)

        lowest = jnp.finfo(wide).min
        rows = (*c.q_BGRqD.shape[1:5], 1)
        state = (jnp.full(rows, lowest, wide), jnp.zeros(rows, wide), jnp.zeros(c.q_BGRqD.shape[1:], wide))
        highest, total, out = _loop(*c.key_range(a), key_chunk, state)
        total = jnp.where(total > 0, total, 1)  # rows that see nothing: output 0, log-sum-exp about -3e38
        return (out / total).astype(q_BQHD.dtype), highest + jnp.log(total)

    out_BQHD, lse_BQH1 = (_joined(x, Q) for x in _for_each(len(c.i_q), query_chunk))
    return out_BQHD, lse_BQH1[..., 0].mT


def backward(
    q_BQHD: jax.Array,
    k_BKGD: jax.Array,
    v_BKGD: jax.Array,
    mask: IntervalMask,
    out_BQHD: jax.Array,
    lse_BHQ: jax.Array,
    dout_BQHD: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of q, k and v, each in the shape and dtype of its operand."""
    Q, (K, G) = q_BQHD.shape[1], k_BKGD.shape[1:3]
    c = _cut(q_BQHD, k_BKGD, v_BKGD, mask)
    wide = lse_BHQ.dtype
    alone = len(c.i_q) == len(c.j_k) == 1
    # Softmax's own gradient needs, per row, the weights' mean of dout . v, which is dout . out.
    mean_BQH1 = jnp.sum(dout_BQHD.astype(wide) * out_BQHD.astype(wide), axis=-1, keepdims=True)
    dout, lse, mean = (_heads(x, G) for x in (dout_BQHD, lse_BHQ.mT[..., None], mean_BQH1))

    def key_chunk(dq: jax.Array, b: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        k, v = c.k_BGkD[b], c.v_BGkD[b]

        def query_chunk(a: Any, state: Any) -> Any:
            dq, dk, dv = state
            q, dout_a, visible = c.q_BGRqD[a], dout[a], c.visible(a, b)

            def accumulate() -> Any:
                scores = scale * jnp.einsum("BGRqD,BGkD->BGRqk", q, k, preferred_element_type=wide)
                weights = jnp.exp(jnp.where(visible, scores - lse[a], -jnp.inf))
                dweights = jnp.einsum("BGRqD,BGkD->BGRqk", dout_a, v, preferred_element_type=wide)
                dscores = (scale * weights * (dweights - mean[a])).astype(q.dtype)
                weights = weights.astype(q.dtype)
                return (
                    jnp.einsum("BGRqk,BGkD->BGRqD", dscores, k, preferred_element_type=wide),
                    dk + jnp.einsum("BGRqk,BGRqD->BGkD", dscores, q, preferred_element_type=wide),
                    dv + jnp.einsum("BGRqk,BGRqD->BGkD", weights, dout_a, preferred_element_type=wide),
                )

            dq_a, dk, dv = _skip_empty(visible, accumulate, lambda: (jnp.zeros(q.shape, wide), dk, dv), alone)
            return dq.at[a].add(dq_a), dk, dv

        none = jnp.zeros(k.shape, wide)
        dq, dk, dv = _loop(*c.query_range(b), query_chunk, (dq, none, none))
        return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

    dq = jnp.zeros(c.q_BGRqD.shape, wide)
    if len(c.j_k) == 1:
        dq, (dk, dv) = key_chunk(dq, 0)
        dk, dv = dk[None], dv[None]
    else:
        dq, (dk, dv) = jax.lax.scan(key_chunk, dq, jnp.arange(len(c.j_k)))
    dk, dv = (_joined(x_nBGkD[:, :, :, None], K) for x_nBGkD in (dk, dv))
    return _joined(dq, Q).astype(q_BQHD.dtype), dk, dv
