"""Interval attention for TPU: forward and fused backward Pallas kernels that visit only tiles with a visible pair.

A grid step is one (query block, key block) tile of several heads at once. The grid is as long as the list of tiles in
scalar memory (`block_info.tile_list`): an empty tile costs neither compute nor DMA nor a grid step. `tpu_windows` says
which part of each array a step sees, `tpu_kernels` what it does with it.

Arrays stay `[B, S, heads * width]`: a block of columns is a group of heads, so nothing is transposed around the
kernels. Head widths that are no multiple of 128 are padded to one, which is what their tiles in memory hold anyway.

The backward pass computes the transposed scores, whose per-row statistics lie along lanes, once for all three
gradients. It walks the key blocks: dk and dv of a key block accumulate in place, while dq of the whole row (or of a
span of it, where VMEM is short) accumulates next to them. The method is FlashAttention-2's (arXiv 2307.08691) without
its second pass over the tiles.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vocojax.kernels.interval_attention import tpu_blocks
from vocojax.kernels.interval_attention.block_info import padded_vectors
from vocojax.kernels.interval_attention.mask import IntervalMask
from vocojax.kernels.interval_attention.tpu_blocks import LANES, Blocks
from vocojax.kernels.interval_attention.tpu_kernels import LOG2_E, backward_kernel, forward_kernel, mean_kernel
from vocojax.kernels.interval_attention.tpu_tiles import along_rows, columns_of, tiles_to_walk
from vocojax.kernels.interval_attention.tpu_windows import (
    backward_heads,
    backward_windows,
    forward_heads,
    forward_windows,
    heads_per_step,
    mean_windows,
)

MEAN_COLUMNS = 1024  # of a step of the kernel that multiplies outputs with their gradients: a MiB each at 512 rows


def forward(
    q_BQHD: jax.Array,
    k_BKGD: jax.Array,
    v_BKGD: jax.Array,
    mask: IntervalMask,
    scale: float,
    *,
    generation: str,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Runs the forward pass.

    Args:
      q_BQHD: queries.
      k_BKGD: keys.
      v_BKGD: values.
      mask: who sees whom.
      scale: of the scores.
      generation: a key of `tpu_blocks.GENERATIONS`.
      blocks: in place of that table's.
      interpret: without a TPU, for tests.

    Returns:
      `out_BQHD` in the dtype of q and `lse_BHQ`, fp32, the base-2 log-sum-exp (0 for rows that see nothing).
    """
    B, Q, H, D = q_BQHD.shape
    K, G = k_BKGD.shape[1:3]
    spec = tpu_blocks.GENERATIONS[generation]
    Dp = -(-D // LANES) * LANES
    if blocks is None:
        blocks = tpu_blocks.shared_by_cores(tpu_blocks.fitted(spec.forward_of(K), Q, K), generation, H * Dp)
    heads = forward_heads(H, G, Dp, blocks)
    q, k, v = (columns_of(x, block, Dp) for x, block in ((q_BQHD, blocks.q), (k_BKGD, blocks.k), (v_BKGD, blocks.k)))
    Qp, Kp = q.shape[1], k.shape[1]
    start, stop = padded_vectors(mask, blocks.q, blocks.k)
    tiles = tiles_to_walk(start, stop, mask.prefix, blocks.q, blocks.k)
    windows = forward_windows(tiles.layout, blocks, heads, H // G)
    statistic = pltpu.VMEM((heads.query, 1, blocks.q), jnp.float32)
    sums = pltpu.VMEM((heads.query * Dp, blocks.q), jnp.float32)

    out, lse = pl.pallas_call(
        functools.partial(
            forward_kernel, at=tiles.layout, scale=scale * LOG2_E, heads=heads.query, kv_heads=heads.kv,
            prefix=mask.prefix,
        ),
        name="interval_attention_forward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(H // heads.query, tiles.count),
            in_specs=[windows.q, windows.k, windows.k, windows.start, windows.stop],
            out_specs=[windows.q, windows.lse],
            scratch_shapes=[statistic, statistic, sums],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, H, 1, Qp), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=spec.vmem_bytes
        ),
        cost_estimate=_cost(2, B, H, Qp, Kp, Dp, [q, q, k, v]),
        interpret=interpret,
    )(tiles.codes, q, k, v, start[:, None], along_rows(stop))
    return out.reshape(B, Qp, H, Dp)[:, :Q, :, :D], lse[:, :, 0, :Q]


def backward(
    q_BQHD: jax.Array,
    k_BKGD: jax.Array,
    v_BKGD: jax.Array,
    mask: IntervalMask,
    out_BQHD: jax.Array,
    lse_BHQ: jax.Array,
    dout_BQHD: jax.Array,
    scale: float,
    *,
    generation: str,
    blocks: Blocks | None = None,
    dq_bytes: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs the backward pass.

    Args:
      q_BQHD: queries.
      k_BKGD: keys.
      v_BKGD: values.
      mask: who sees whom.
      out_BQHD: the forward pass's output.
      lse_BHQ: its log-sum-exp.
      dout_BQHD: the output's gradient.
      scale: of the scores.
      generation: a key of `tpu_blocks.GENERATIONS`.
      blocks: in place of that table's.
      dq_bytes: in place of that table's.
      interpret: without a TPU, for tests.

    Returns:
      The gradients of q, k and v, each in the shape and dtype of its operand.
    """
    B, Q, H, D = q_BQHD.shape
    K, G = k_BKGD.shape[1:3]
    spec = tpu_blocks.GENERATIONS[generation]
    Dp = -(-D // LANES) * LANES
    if blocks is None:
        blocks = tpu_blocks.shared_by_cores(tpu_blocks.fitted(spec.backward_of(K), Q, K), generation, H * Dp)
    heads, spans = backward_heads(Q, H, G, Dp, blocks, q_BQHD.dtype.itemsize, dq_bytes or spec.dq_bytes)
    q, dout = (columns_of(x, spans * blocks.q, Dp) for x in (q_BQHD, dout_BQHD))
    k, v = (columns_of(x, blocks.k, Dp) for x in (k_BKGD, v_BKGD))
    Qp, Kp = q.shape[1], k.shape[1]
    start, stop = padded_vectors(mask, spans * blocks.q, blocks.k)
    tiles = tiles_to_walk(start, stop, mask.prefix, blocks.q, blocks.k, spans)
    span = Qp // spans
    windows = backward_windows(tiles.layout, blocks, heads, span)

    lse = jnp.pad(lse_BHQ, ((0, 0), (0, 0), (0, Qp - Q)))[:, :, None]
    mean = _mean_gradient(columns_of(out_BQHD, spans * blocks.q, Dp), dout, H, blocks.q, interpret)

    columns = heads.query * Dp
    dq_sum = (heads.turns, columns, span) if blocks.transposed_dq else (heads.turns, span, columns)
    dk_sum = pltpu.VMEM((blocks.k, heads.kv * Dp), jnp.float32)
    dk_shape = jax.ShapeDtypeStruct((spans, *k.shape), k.dtype if spans == 1 else jnp.float32)

    dq, dk, dv = pl.pallas_call(
        functools.partial(
            backward_kernel, at=tiles.layout, scale=scale, heads=heads.query, kv_heads=heads.kv, prefix=mask.prefix,
            together=blocks.together, transposed_dq=blocks.transposed_dq,
        ),
        name="interval_attention_backward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(H // heads.group, tiles.count, heads.turns),
            in_specs=[windows.q, windows.k, windows.k, windows.q, windows.row, windows.row, windows.start,
                      windows.stop],
            out_specs=[windows.dq, windows.dk, windows.dk],
            scratch_shapes=[pltpu.VMEM(dq_sum, jnp.float32), dk_sum, dk_sum],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), dk_shape, dk_shape],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=spec.vmem_bytes
        ),
        cost_estimate=_cost(5, B, H, Qp, Kp, Dp, [q, q, q, k, k, v, v]),
        interpret=interpret,
    )(tiles.codes, q, k, v, dout, lse, mean, start[:, None], along_rows(stop))  # fmt: skip
    whole = lambda x, length, n: x.reshape(B, -1, n, Dp)[:, :length, :, :D]
    dk, dv = (x[0] if spans == 1 else x.sum(0).astype(k.dtype) for x in (dk, dv))
    return whole(dq, Q, H), whole(dk, K, G), whole(dv, K, G)


def _mean_gradient(out: jax.Array, dout: jax.Array, heads: int, block_q: int, interpret: bool) -> jax.Array:
    """Returns the product of every query's output and its gradient, see `mean_kernel`.

    Args:
      out: `[B, S, heads * width]`.
      dout: `[B, S, heads * width]`.
      heads: query heads.
      block_q: queries of a step.
      interpret: without a TPU, for tests.

    Returns:
      fp32 `[B, heads, 1, S]`.
    """
    B, S, columns = out.shape
    width = columns // heads
    at_once = heads_per_step(heads, max(1, MEAN_COLUMNS // width), 1)
    windows = mean_windows(block_q, at_once, width)
    return pl.pallas_call(
        functools.partial(mean_kernel, width=width),
        name="interval_attention_mean",
        grid=(B, heads // at_once, S // block_q),
        in_specs=[windows.operand, windows.operand],
        out_specs=windows.mean,
        out_shape=jax.ShapeDtypeStruct((B, heads, 1, S), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        cost_estimate=pl.CostEstimate(flops=2 * out.size, transcendentals=0, bytes_accessed=2 * out.nbytes),
        interpret=interpret,
    )(out, dout)


def _cost(products: int, B: int, H: int, Q: int, K: int, D: int, moved: list[Any]) -> pl.CostEstimate:
    """Returns an upper bound for XLA's scheduler: a causal square without a hole."""
    pairs = B * H * Q * (K - Q // 2)
    return pl.CostEstimate(
        flops=2 * products * pairs * D,
        transcendentals=pairs,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved),
    )
