"""`interval_attention`: attention under an `IntervalMask`, by any of its implementations."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from vocojax.kernels.interval_attention.mask import IntervalMask
from vocojax.kernels.interval_attention.reference import reference_attention
from vocojax.kernels.sharding import device_kind, per_shard

IMPLEMENTATIONS = ("reference", "chunked", "pallas_tpu", "pallas_gpu")


def interval_attention(
    q_BQHD: jax.Array,
    k_BKGD: jax.Array,
    v_BKGD: jax.Array,
    mask: IntervalMask,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention of each query over the keys its `IntervalMask` lets it see.

    Grouped-query attention is native: query head `h` reads key/value head `h * G // H`, nothing is repeated. With
    `K > Q` the first `P = K - Q` keys are a prefix (a cache) and query row `r` has index `P + r`.

    A query that sees nothing gets output 0 and gradient 0. Keys and values that no query sees, and queries that see
    nothing, may hold anything, NaN and Inf included: they change no output, and their gradients are exactly 0.

    For rematerialisation the result is named 'attention_out' and the saved log-sum-exp 'attention_lse'
    (`jax.checkpoint_policies.save_only_these_names`): a policy that saves both never runs the forward pass again.

    Under a mesh (`jax.set_mesh`) rows are computed where the axes 'slice', 'data' and 'fsdp' put them and heads where
    'tensor' does, without any communication; see `sharding.per_shard`.

    Args:
      q_BQHD: queries, any float dtype.
      k_BKGD: keys, the dtype of q. H must be a multiple of G.
      v_BKGD: values, the shape and dtype of k.
      mask: `start` int32 `[B, Q]` and `stop` int32 `[B, K]`.
      scale: factor of the scores before the softmax; `D ** -0.5` if not given.
      implementation: 'reference' (dense), 'chunked' (XLA, no Q x K array), 'pallas_tpu' or 'pallas_gpu'. None picks the
        kernel of the default backend, or 'chunked' if it has none, and logs once what it picked. A named one is used or
        an error is raised, never another one.

    Returns:
      `out_BQHD` in the dtype of q. Scores, softmax and sums are float32 inside.

    Raises:
      ValueError: shapes, dtypes or names that do not fit. The message names the argument.
    """
    _check(q_BQHD, k_BKGD, v_BKGD, mask)
    scale = float(q_BQHD.shape[-1] ** -0.5 if scale is None else scale)
    if implementation is None:
        implementation = _for_platform(jax.default_backend())
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown: use one of {IMPLEMENTATIONS} or None")

    if implementation == "pallas_tpu":
        return _fused(implementation, scale, q_BQHD, k_BKGD, v_BKGD, mask)  # its kernels replace what nobody sees
    # What nobody sees is replaced by zeros before the products, because 0 * NaN would carry it into every sum. Here XLA
    # fuses the selection into whatever computes q, k and v. The selection on the output keeps the gradient of queries
    # that see nothing, which is just as arbitrary, out of the other gradients.
    only = lambda live_BS, x_BSHD: jnp.where(live_BS[:, :, None, None], x_BSHD, jnp.zeros((), x_BSHD.dtype))
    (B, _, H, _), G = q_BQHD.shape, k_BKGD.shape[2]
    liveness = per_shard(lambda mask: (mask.live_queries(), mask.live_keys()), ["BQ"], ["BQ", "BK"], B, H, G)
    seeing, seen = liveness(mask)
    q_BQHD, k_BKGD, v_BKGD = only(seeing, q_BQHD), only(seen, k_BKGD), only(seen, v_BKGD)
    if implementation == "reference":
        out_BQHD = reference_attention(q_BQHD, k_BKGD, v_BKGD, mask, scale)
    else:
        out_BQHD = _fused(implementation, scale, q_BQHD, k_BKGD, v_BKGD, mask)
    return only(seeing, out_BQHD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(
    implementation: str, scale: float, q_BQHD: jax.Array, k_BKGD: jax.Array, v_BKGD: jax.Array, mask: IntervalMask
) -> jax.Array:
    """Runs a fused forward pass. For the backward pass it keeps its operands, the output and its log-sum-exp only."""
    return _fused_forward(implementation, scale, q_BQHD, k_BKGD, v_BKGD, mask)[0]


def _fused_forward(
    implementation: str, scale: float, q_BQHD: jax.Array, k_BKGD: jax.Array, v_BKGD: jax.Array, mask: IntervalMask
) -> tuple[jax.Array, Any]:
    (B, _, H, _), G = q_BQHD.shape, k_BKGD.shape[2]
    pass_ = functools.partial(_kernel(implementation).forward, scale=scale)
    forward = per_shard(pass_, ["BQHD", "BKGD", "BKGD", "BS"], ["BQHD", "BHQ"], B, H, G)
    out_BQHD, lse_BHQ = forward(q_BQHD, k_BKGD, v_BKGD, mask)
    out_BQHD, lse_BHQ = checkpoint_name(out_BQHD, "attention_out"), checkpoint_name(lse_BHQ, "attention_lse")
    return out_BQHD, (q_BQHD, k_BKGD, v_BKGD, mask, out_BQHD, lse_BHQ)


def _fused_backward(implementation: str, scale: float, saved: Any, dout_BQHD: jax.Array) -> Any:
    q_BQHD, k_BKGD, v_BKGD, mask, out_BQHD, lse_BHQ = saved
    (B, _, H, _), G = q_BQHD.shape, k_BKGD.shape[2]
    pass_ = functools.partial(_kernel(implementation).backward, scale=scale)
    operands = ["BQHD", "BKGD", "BKGD", "BS", "BQHD", "BHQ", "BQHD"]
    backward = per_shard(pass_, operands, ["BQHD", "BKGD", "BKGD"], B, H, G)
    grads = backward(q_BQHD, k_BKGD, v_BKGD, mask, out_BQHD, lse_BHQ, dout_BQHD)
    return *grads, jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), mask)


_fused.defvjp(_fused_forward, _fused_backward)


class Kernel(NamedTuple):
    """The two passes of an implementation.

    Attributes:
      forward: `(q, k, v, mask, scale) -> out, lse`.
      backward: `(q, k, v, mask, out, lse, dout, scale) -> dq, dk, dv`.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def _kernel(implementation: str) -> Kernel:
    """Returns the two passes of a fused implementation, with the blocks of the device that the program is built for."""
    # Imported on demand: Pallas takes a good part of a second to load.
    if implementation == "pallas_tpu":
        from vocojax.kernels.interval_attention import pallas_tpu, tpu_blocks

        generation = tpu_blocks.generation(device_kind())
        bound = lambda function: functools.partial(function, generation=generation)
        return Kernel(bound(pallas_tpu.forward), bound(pallas_tpu.backward))
    if implementation == "pallas_gpu":
        from vocojax.kernels.interval_attention import gpu_blocks, pallas_gpu

        architecture = gpu_blocks.architecture(device_kind())
        bound = lambda function: functools.partial(function, architecture=architecture)
        return Kernel(bound(pallas_gpu.forward), bound(pallas_gpu.backward))
    from vocojax.kernels.interval_attention import chunked

    return Kernel(chunked.forward, chunked.backward)


@functools.cache
def _for_platform(backend: str) -> str:
    """Returns the implementation for a backend. Cached, so that it is logged once."""
    picked = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}.get(backend, "chunked")
    logging.getLogger(__name__).info(
        "interval_attention: %s, because the default backend is %s; implementation=... selects another", picked, backend
    )
    return picked


def _check(q_BQHD: jax.Array, k_BKGD: jax.Array, v_BKGD: jax.Array, mask: IntervalMask) -> None:
    for name, x, axes in (("q", q_BQHD, "[B, Q, H, D]"), ("k", k_BKGD, "[B, K, G, D]"), ("v", v_BKGD, "[B, K, G, D]")):
        if x.ndim != 4:
            raise ValueError(f"{name} must be {axes}, got shape {x.shape}: add or remove axes")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {x.dtype}: cast it")
        if x.dtype != q_BQHD.dtype:
            raise ValueError(f"{name} is {x.dtype} but q is {q_BQHD.dtype}: cast them to one dtype")
    B, Q, H, D = q_BQHD.shape
    K, G = k_BKGD.shape[1:3]
    if k_BKGD.shape != (B, K, G, D):
        raise ValueError(f"k has shape {k_BKGD.shape}, q has {q_BQHD.shape}: batch and head width must agree")
    if v_BKGD.shape != k_BKGD.shape:
        raise ValueError(f"v has shape {v_BKGD.shape} but k has {k_BKGD.shape}: they must be equal")
    if H % G:
        raise ValueError(f"q has {H} heads and k has {G}: the query heads must be a multiple of the key/value heads")
    if K < Q:
        raise ValueError(f"k has {K} keys for {Q} queries: every query needs its own key, so K >= Q")
    for name, x, shape in (("start", mask.start, (B, Q)), ("stop", mask.stop, (B, K))):
        if x.shape != shape:
            raise ValueError(f"mask.{name} has shape {x.shape}, expected {shape}: one entry per row and position")
        if x.dtype != jnp.int32:
            raise ValueError(f"mask.{name} must be int32, got {x.dtype}: cast it")
