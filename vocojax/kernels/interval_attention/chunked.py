"""Interval attention in plain XLA without an S x S array: for the CPU, and for any device without a kernel of its own.

Queries and keys are cut into chunks. The softmax is accumulated over key chunks with a running maximum, and the
backward pass computes the scores of a chunk pair again from the saved log-sum-exp (FlashAttention, arXiv 2205.14135).
A sequence that fits in one chunk becomes one dense block without any loop.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vocojax.kernels.interval_attention.mask import NEVER, IntervalMask

CHUNK = 512


class _Chunks(NamedTuple):
    """The operands with a leading axis of chunks; lower-case `q` and `k` are positions inside a chunk."""

    q_BqGRD: jax.Array
    start_Bq: jax.Array
    i_q: jax.Array
    k_BkGD: jax.Array
    v_BkGD: jax.Array
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


def _cut(
    q_BQHD: jax.Array, k_BKGD: jax.Array, v_BKGD: jax.Array, mask: IntervalMask
) -> tuple[_Chunks, Callable[[jax.Array], jax.Array]]:
    """Returns the chunks of the operands, and a function that cuts any other `[B, Q, ...]` array like the queries."""

    def cutter(length: int) -> Callable[..., jax.Array]:
        size = min(CHUNK, length)
        count = -(-length // size)

        def cut(x: jax.Array, fill: int = 0) -> jax.Array:
            pad = [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2)
            x = jnp.pad(x, pad, constant_values=fill).reshape(x.shape[0], count, size, *x.shape[2:])
            return jnp.moveaxis(x, 1, 0)

        return cut

    B, Q, H, D = q_BQHD.shape
    K, G = k_BKGD.shape[1:3]
    cut_q, cut_k = cutter(Q), cutter(K)
    chunks = _Chunks(
        q_BqGRD=cut_q(q_BQHD.reshape(B, Q, G, H // G, D)),
        start_Bq=cut_q(mask.start, NEVER),
        i_q=cut_q(K - Q + jnp.arange(Q)[None], NEVER)[:, 0],
        k_BkGD=cut_k(k_BKGD),
        v_BkGD=cut_k(v_BKGD),
        stop_Bk=cut_k(mask.stop),
        j_k=cut_k(jnp.arange(K)[None], NEVER)[:, 0],
    )
    return chunks, cut_q


def _joined(x_nBq: jax.Array, length: int) -> jax.Array:
    """Puts chunks together again: `[n, B, q, ...]` -> `[B, length, ...]`."""
    x = jnp.moveaxis(x_nBq, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


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
    B, Q, H, D = q_BQHD.shape
    c, _ = _cut(q_BQHD, k_BKGD, v_BKGD, mask)
    wide = jnp.promote_types(q_BQHD.dtype, jnp.float32)
    alone = len(c.i_q) == len(c.j_k) == 1

    def query_chunk(a: Any) -> tuple[jax.Array, jax.Array]:
        def key_chunk(b: Any, state: Any) -> Any:
            visible = c.visible(a, b)

            def accumulate() -> Any:
                highest, total, out = state
                scores = scale * jnp.einsum("BqGRD,BkGD->BGRqk", c.q_BqGRD[a], c.k_BkGD[b], preferred_element_type=wide)
                raised = jnp.maximum(highest, jnp.max(scores, axis=-1, where=visible, initial=lowest))
                weights = jnp.exp(jnp.where(visible, scores - raised[..., None], -jnp.inf))
                decay = jnp.exp(highest - raised)
                narrow = weights.astype(v_BKGD.dtype)
                gain = jnp.einsum("BGRqk,BkGD->BGRqD", narrow, c.v_BkGD[b], preferred_element_type=wide)
                return raised, total * decay + weights.sum(axis=-1), out * decay[..., None] + gain

            return _skip_empty(visible, accumulate, lambda: state, alone)

        lowest = jnp.finfo(wide).min
        rows = (B, *c.q_BqGRD.shape[3:5], c.q_BqGRD.shape[2])
        state = (jnp.full(rows, lowest, wide), jnp.zeros(rows, wide), jnp.zeros((*rows, D), wide))
        highest, total, out = _loop(*c.key_range(a), key_chunk, state)
        total = jnp.where(total > 0, total, 1)  # rows that see nothing: output 0, log-sum-exp about -3e38
        out, lse = out / total[..., None], highest + jnp.log(total)
        return jnp.moveaxis(out, 3, 1).astype(q_BQHD.dtype), jnp.moveaxis(lse, 3, 1)

    out, lse = (_joined(x, Q) for x in _for_each(len(c.i_q), query_chunk))
    return out.reshape(B, Q, H, D), lse.reshape(B, Q, H).mT


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
    B, Q, H, D = q_BQHD.shape
    K, G = k_BKGD.shape[1:3]
    c, cut_q = _cut(q_BQHD, k_BKGD, v_BKGD, mask)
    wide = lse_BHQ.dtype
    alone = len(c.i_q) == len(c.j_k) == 1
    # Softmax's own gradient needs, per row, the weights' mean of dout . v, which is dout . out.
    mean_BQH = jnp.sum(dout_BQHD.astype(wide) * out_BQHD.astype(wide), axis=-1)
    dout = cut_q(dout_BQHD.reshape(B, Q, G, H // G, D))
    lse, mean = (cut_q(x.reshape(B, Q, G, H // G)) for x in (lse_BHQ.mT, mean_BQH))
    by_row = lambda x_BqGR: jnp.moveaxis(x_BqGR, 1, 3)[..., None]

    def key_chunk(dq: jax.Array, b: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        k, v = c.k_BkGD[b], c.v_BkGD[b]

        def query_chunk(a: Any, state: Any) -> Any:
            dq, dk, dv = state
            q, dout_a, visible = c.q_BqGRD[a], dout[a], c.visible(a, b)

            def accumulate() -> Any:
                scores = scale * jnp.einsum("BqGRD,BkGD->BGRqk", q, k, preferred_element_type=wide)
                weights = jnp.exp(jnp.where(visible, scores - by_row(lse[a]), -jnp.inf))
                dweights = jnp.einsum("BqGRD,BkGD->BGRqk", dout_a, v, preferred_element_type=wide)
                dscores = (scale * weights * (dweights - by_row(mean[a]))).astype(q.dtype)
                weights = weights.astype(q.dtype)
                return (
                    jnp.einsum("BGRqk,BkGD->BqGRD", dscores, k, preferred_element_type=wide),
                    dk + jnp.einsum("BGRqk,BqGRD->BkGD", dscores, q, preferred_element_type=wide),
                    dv + jnp.einsum("BGRqk,BqGRD->BkGD", weights, dout_a, preferred_element_type=wide),
                )

            dq_a, dk, dv = _skip_empty(visible, accumulate, lambda: (jnp.zeros(q.shape, wide), dk, dv), alone)
            return dq.at[a].add(dq_a), dk, dv

        none = jnp.zeros(k.shape, wide)
        dq, dk, dv = _loop(*c.query_range(b), query_chunk, (dq, none, none))
        return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

    dq = jnp.zeros(c.q_BqGRD.shape, wide)
    if len(c.j_k) == 1:
        dq, (dk, dv) = key_chunk(dq, 0)
        dk, dv = dk[None], dv[None]
    else:
        dq, (dk, dv) = jax.lax.scan(key_chunk, dq, jnp.arange(len(c.j_k)))
    return _joined(dq, Q).reshape(B, Q, H, D).astype(q_BQHD.dtype), _joined(dk, K), _joined(dv, K)
