"""Interval attention for TPU: forward and fused backward Pallas kernels that visit only tiles with a visible pair.

A grid step is one (query block, key block) tile of several heads at once. Which tile it is comes from a list in scalar
memory (`block_info.tile_list`), and the grid is as long as the list: an empty tile costs neither compute nor DMA nor a
grid step. A full tile runs without any mask arithmetic; a partial one builds its mask in registers from the vectors. A
dirty one also replaces what nobody sees before its products, because 0 * NaN would carry it into every sum: around the
kernels that would take a pass over each operand.

Arrays stay `[B, S, heads * width]`: a block of columns is a group of heads, so nothing is transposed around the
kernels. Head widths that are no multiple of 128 are padded to one, which is what their tiles in memory hold anyway.

The backward pass computes the transposed scores, whose per-row statistics lie along lanes, once for all three
gradients. It walks the key blocks; dk and dv of a key block accumulate in place while dq of the whole row (or of a
span of it, where VMEM is short) accumulates beside them. The method is FlashAttention-2's (arXiv 2307.08691) without
its second pass over the tiles.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vocojax.kernels.interval_attention import tpu_blocks
from vocojax.kernels.interval_attention.block_info import DIRTY, FULL, PARTIAL, TileCode, padded_vectors
from vocojax.kernels.interval_attention.mask import IntervalMask
from vocojax.kernels.interval_attention.tpu_blocks import LANES, Blocks
from vocojax.kernels.interval_attention.tpu_tiles import (
    along_lanes,
    along_rows,
    any_of,
    columns_of,
    only,
    part,
    product,
    tiles_to_walk,
    widened,
)

HIDDEN = -2.0e38  # the score of an invisible pair
LOWEST = -1.0e30  # where running maxima begin: far above HIDDEN, so that exp2(HIDDEN - maximum) is exactly 0
LOG2_E = math.log2(math.e)
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
    """-> `out_BQHD` in the dtype of q and `lse_BHQ`, float32, the base-2 log-sum-exp (0 for rows that see nothing).

    `generation` names a row of `tpu_blocks.GENERATIONS`; `blocks` overrides its block sizes.
    """
    B, Q, H, D = q_BQHD.shape
    K, G = k_BKGD.shape[1:3]
    spec = tpu_blocks.GENERATIONS[generation]
    blocks = blocks or tpu_blocks.fitted(spec.forward, Q, K)
    Dp = -(-D // LANES) * LANES
    heads = heads_per_step(H, blocks.columns // Dp, H // G)
    kv_heads = max(1, heads * G // H)
    q, k, v = (columns_of(x, block, Dp) for x, block in ((q_BQHD, blocks.q), (k_BKGD, blocks.k), (v_BKGD, blocks.k)))
    Qp, Kp = q.shape[1], k.shape[1]
    start, stop = padded_vectors(mask, blocks.q, blocks.k)
    tiles = tiles_to_walk(start, stop, mask.prefix, blocks.q, blocks.k)
    at = tiles.layout

    q_spec = pl.BlockSpec((None, blocks.q, heads * Dp), lambda h, t, c: (at.row(c[t]), at.query_block(c[t]), h))
    kv_head = lambda h: lax.div(h * heads, kv_heads * (H // G))
    k_spec = pl.BlockSpec(
        (None, blocks.k, kv_heads * Dp), lambda h, t, c: (at.row(c[t]), at.key_block(c[t]), kv_head(h))
    )
    start_spec = pl.BlockSpec((None, blocks.q, LANES), lambda h, t, c: (at.row(c[t]), at.query_block(c[t]), 0))
    stop_spec = pl.BlockSpec((None, 1, blocks.k), lambda h, t, c: (at.row(c[t]), 0, at.key_block(c[t])))
    lse_spec = pl.BlockSpec((None, heads, 1, blocks.q), lambda h, t, c: (at.row(c[t]), h, 0, at.query_block(c[t])))
    rows = lambda width: pltpu.VMEM((blocks.q, width), jnp.float32)

    out, lse = pl.pallas_call(
        functools.partial(
            _forward_kernel, at=at, scale=scale * LOG2_E, heads=heads, kv_heads=kv_heads, prefix=mask.prefix
        ),
        name="interval_attention_forward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(H // heads, tiles.count),
            in_specs=[q_spec, k_spec, k_spec, start_spec, stop_spec],
            out_specs=[q_spec, lse_spec],
            scratch_shapes=[rows(heads * LANES), rows(heads * LANES), rows(heads * Dp)],
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
    )(tiles.codes, q, k, v, along_rows(start), stop[:, None])
    return out.reshape(B, Qp, H, Dp)[:, :Q, :, :D], lse[:, :, 0, :Q]


def _forward_kernel(
    codes, q_ref, k_ref, v_ref, start_ref, stop_ref, out_ref, lse_ref, highest_ref, total_ref, sum_ref,
    *, at: TileCode, scale: float, heads: int, kv_heads: int, prefix: int,
) -> None:  # fmt: skip
    code = codes[pl.program_id(1)]
    bq, bk = q_ref.shape[0], k_ref.shape[0]
    width = q_ref.shape[1] // heads

    @pl.when(code & TileCode.FIRST != 0)
    def open_block() -> None:
        highest_ref[...] = jnp.full_like(highest_ref, LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def accumulate(visible: jax.Array | None, seen: jax.Array | None = None) -> None:
        for h in range(heads):
            head, stats, kv = part(h, width), part(h, LANES), part(h * kv_heads // heads, width)
            v = only(seen, v_ref[:, kv])
            scores = product(q_ref[:, head], k_ref[:, kv], ((1,), (1,))) * scale
            if visible is not None:
                scores = jnp.where(visible, scores, HIDDEN)
            before = highest_ref[:, stats]
            highest = jnp.maximum(before, scores.max(axis=1, keepdims=True))
            weights = jnp.exp2(scores - widened(highest, bk))
            decay = jnp.exp2(before - highest)
            highest_ref[:, stats] = highest
            total_ref[:, stats] = total_ref[:, stats] * decay + weights.sum(axis=1, keepdims=True)
            gain = product(weights.astype(v.dtype), v, ((1,), (0,)))
            sum_ref[:, head] = sum_ref[:, head] * widened(decay, width) + gain

    @pl.when(code & TileCode.KIND == FULL)
    def full_tile() -> None:
        accumulate(None)

    def visible() -> jax.Array:
        i = prefix + at.query_block(code) * bq + lax.broadcasted_iota(jnp.int32, (bq, bk), 0)
        j = at.key_block(code) * bk + lax.broadcasted_iota(jnp.int32, (bq, bk), 1)
        return (widened(start_ref[...], bk) <= j) & (j <= i) & (i < stop_ref[...])

    @pl.when(code & TileCode.KIND == PARTIAL)
    def partial_tile() -> None:
        accumulate(visible())

    @pl.when(code & TileCode.KIND == DIRTY)
    def dirty_tile() -> None:
        pairs = visible()
        accumulate(pairs, seen=any_of(pairs, of_rows=False))

    @pl.when(code & TileCode.LAST != 0)
    def close_block() -> None:
        for h in range(heads):
            head, stats = part(h, width), part(h, LANES)
            total = total_ref[:, stats]
            divisor = jnp.where(total > 0, total, 1.0)
            out_ref[:, head] = (sum_ref[:, head] * widened(1 / divisor, width)).astype(out_ref.dtype)
            lse = jnp.where(total > 0, highest_ref[:, stats] + jnp.log2(divisor), 0.0)
            lse_ref[h] = along_lanes(lse)


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
    """-> the gradients of q, k and v, each in the shape and dtype of its operand.

    `generation` names a row of `tpu_blocks.GENERATIONS`; `blocks` and `dq_bytes` override what it says.
    """
    B, Q, H, D = q_BQHD.shape
    K, G = k_BKGD.shape[1:3]
    spec = tpu_blocks.GENERATIONS[generation]
    blocks = blocks or tpu_blocks.fitted(spec.backward, Q, K)
    Dp = -(-D // LANES) * LANES
    repeats = H // G
    heads, spans = backward_plan(Q, H, repeats, Dp, blocks, q_BQHD.dtype.itemsize, dq_bytes or spec.dq_bytes)
    kv_heads = max(1, heads // repeats)
    turns = max(1, repeats // heads)  # grid steps over the query heads that share one step's key/value heads
    group = turns * heads  # the query heads whose dq accumulates together
    q, dout = (columns_of(x, spans * blocks.q, Dp) for x in (q_BQHD, dout_BQHD))
    k, v = (columns_of(x, blocks.k, Dp) for x in (k_BKGD, v_BKGD))
    Qp, Kp = q.shape[1], k.shape[1]
    start, stop = padded_vectors(mask, spans * blocks.q, blocks.k)
    tiles = tiles_to_walk(start, stop, mask.prefix, blocks.q, blocks.k, spans)
    at, span = tiles.layout, Qp // spans

    lse = jnp.pad(lse_BHQ, ((0, 0), (0, 0), (0, Qp - Q)))[:, :, None]
    mean = _mean_gradient(columns_of(out_BQHD, spans * blocks.q, Dp), dout, H, blocks.q, interpret)

    in_span = lambda c: lax.div(at.query_block(c), span // blocks.q)
    q_head = lambda h, r: h * turns + r
    q_spec = pl.BlockSpec(
        (None, blocks.q, heads * Dp), lambda h, t, r, c: (at.row(c[t]), at.query_block(c[t]), q_head(h, r))
    )
    k_spec = pl.BlockSpec((None, blocks.k, kv_heads * Dp), lambda h, t, r, c: (at.row(c[t]), at.key_block(c[t]), h))
    row_spec = pl.BlockSpec(
        (None, heads, 1, blocks.q), lambda h, t, r, c: (at.row(c[t]), q_head(h, r), 0, at.query_block(c[t]))
    )
    start_spec = pl.BlockSpec((None, 1, blocks.q), lambda h, t, r, c: (at.row(c[t]), 0, at.query_block(c[t])))
    stop_spec = pl.BlockSpec((None, blocks.k, LANES), lambda h, t, r, c: (at.row(c[t]), at.key_block(c[t]), 0))
    dq_spec = pl.BlockSpec((None, span, group * Dp), lambda h, t, r, c: (at.row(c[t]), in_span(c[t]), h))
    dk_spec = pl.BlockSpec(
        (None, None, blocks.k, kv_heads * Dp),
        lambda h, t, r, c: (in_span(c[t]), at.row(c[t]), at.key_block(c[t]), h),
    )
    keys = pltpu.VMEM((blocks.k, kv_heads * Dp), jnp.float32)
    dq_shape = (turns, heads * Dp, span) if blocks.transposed_dq else (turns, span, heads * Dp)
    dk_shape = jax.ShapeDtypeStruct((spans, *k.shape), k.dtype if spans == 1 else jnp.float32)

    dq, dk, dv = pl.pallas_call(
        functools.partial(
            _backward_kernel, at=at, scale=scale, heads=heads, kv_heads=kv_heads, prefix=mask.prefix,
            transposed_dq=blocks.transposed_dq,
        ),
        name="interval_attention_backward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(H // group, tiles.count, turns),
            in_specs=[q_spec, k_spec, k_spec, q_spec, row_spec, row_spec, start_spec, stop_spec],
            out_specs=[dq_spec, dk_spec, dk_spec],
            scratch_shapes=[pltpu.VMEM(dq_shape, jnp.float32), keys, keys],
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


def _backward_kernel(
    codes, q_ref, k_ref, v_ref, dout_ref, lse_ref, mean_ref, start_ref, stop_ref, dq_ref, dk_ref, dv_ref,
    dq_sum, dk_sum, dv_sum,
    *, at: TileCode, scale: float, heads: int, kv_heads: int, prefix: int, transposed_dq: bool,
) -> None:  # fmt: skip
    code, turn = codes[pl.program_id(1)], pl.program_id(2)
    first_turn, last_turn = turn == 0, turn == pl.num_programs(2) - 1
    bq, bk = q_ref.shape[0], k_ref.shape[0]
    width = q_ref.shape[1] // heads
    blocks_of_span = dq_ref.shape[0] // bq
    rows = pl.ds(pl.multiple_of(lax.rem(at.query_block(code), blocks_of_span) * bq, bq), bq)

    @pl.when((code & TileCode.OPEN != 0) & first_turn)
    def open_span() -> None:
        dq_sum[...] = jnp.zeros_like(dq_sum)

    @pl.when((code & TileCode.FIRST != 0) & first_turn)
    def open_block() -> None:
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def accumulate(
        visible: jax.Array | None, seeing: jax.Array | None = None, seen: jax.Array | None = None
    ) -> None:
        for h in range(heads):
            head, kv = part(h, width), part(h * kv_heads // heads, width)
            q, k, dout = only(seeing, q_ref[:, head]), only(seen, k_ref[:, kv]), only(seeing, dout_ref[:, head])
            scores = product(k, q, ((1,), (1,))) * (scale * LOG2_E)
            if visible is not None:
                scores = jnp.where(visible, scores, HIDDEN)
            weights = jnp.exp2(scores - lse_ref[h])
            dv_sum[:, kv] += product(weights.astype(dout.dtype), dout, ((1,), (0,)))
            dweights = product(v_ref[:, kv], dout, ((1,), (1,)))
            dscores = weights * (dweights - mean_ref[h])
            if visible is not None and seen is not None:  # what nobody sees is in `dweights` and `mean_ref` too
                dscores = jnp.where(visible, dscores, 0.0)
            dscores = dscores.astype(q.dtype)
            dk_sum[:, kv] += product(dscores, q, ((1,), (0,)))
            if transposed_dq:
                dq_sum[turn, head, rows] += product(k, dscores, ((0,), (0,)))
            else:
                dq_sum[turn, rows, head] += product(dscores, k, ((0,), (0,)))

    @pl.when(code & TileCode.KIND == FULL)
    def full_tile() -> None:
        accumulate(None)

    def visible() -> jax.Array:
        i = prefix + at.query_block(code) * bq + lax.broadcasted_iota(jnp.int32, (bk, bq), 1)
        j = at.key_block(code) * bk + lax.broadcasted_iota(jnp.int32, (bk, bq), 0)
        return (start_ref[...] <= j) & (j <= i) & (i < widened(stop_ref[...], bq))

    @pl.when(code & TileCode.KIND == PARTIAL)
    def partial_tile() -> None:
        accumulate(visible())

    @pl.when(code & TileCode.KIND == DIRTY)
    def dirty_tile() -> None:
        pairs = visible()
        accumulate(pairs, seeing=any_of(pairs, of_rows=False), seen=any_of(pairs, of_rows=True))

    @pl.when((code & TileCode.LAST != 0) & last_turn)
    def close_block() -> None:
        dk_ref[...] = (dk_sum[...] * scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)

    @pl.when((code & TileCode.CLOSE != 0) & last_turn)
    def close_span() -> None:
        for r in range(dq_sum.shape[0]):
            dq = dq_sum[r].T if transposed_dq else dq_sum[r]
            dq_ref[:, part(r, heads * width)] = (dq * scale).astype(dq_ref.dtype)


def _mean_gradient(out: jax.Array, dout: jax.Array, heads: int, block_q: int, interpret: bool) -> jax.Array:
    """`[B, H, 1, S]`, float32: by its softmax weights, the mean of a query's gradients with respect to them, which is
    the product of its output and the output's gradient, `[B, S, heads * width]` both."""
    B, S, columns = out.shape
    width = columns // heads
    at_once = heads_per_step(heads, max(1, MEAN_COLUMNS // width), 1)
    operand = pl.BlockSpec((None, block_q, at_once * width), lambda b, h, t: (b, t, h))
    return pl.pallas_call(
        functools.partial(_mean_kernel, width=width),
        name="interval_attention_mean",
        grid=(B, heads // at_once, S // block_q),
        in_specs=[operand, operand],
        out_specs=pl.BlockSpec((None, at_once, 1, block_q), lambda b, h, t: (b, h, 0, t)),
        out_shape=jax.ShapeDtypeStruct((B, heads, 1, S), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        cost_estimate=pl.CostEstimate(flops=2 * out.size, transcendentals=0, bytes_accessed=2 * out.nbytes),
        interpret=interpret,
    )(out, dout)


def _mean_kernel(out_ref, dout_ref, mean_ref, *, width: int) -> None:
    for h in range(mean_ref.shape[0]):
        out, dout = (ref[:, part(h, width)].astype(jnp.float32) for ref in (out_ref, dout_ref))
        # Multiplied and summed, not a matrix product: those may round float32 operands.
        mean = (out * dout).sum(axis=1, keepdims=True)
        mean_ref[h] = along_lanes(jnp.broadcast_to(mean, (mean.shape[0], LANES)))


def heads_per_step(heads: int, most: int, repeats: int) -> int:
    """The largest number of query heads <= `most` per step that is whole groups or divides one group."""
    fits = lambda n: heads % n == 0 and (n % repeats == 0 or repeats % n == 0)
    return next(n for n in range(max(1, min(most, heads)), 0, -1) if fits(n))


def backward_plan(
    Q: int, H: int, repeats: int, width: int, blocks: Blocks, itemsize: int, dq_bytes: int
) -> tuple[int, int]:
    """-> query heads per step, and the number of spans that keeps one span's dq within `dq_bytes`.

    dq takes a float32 sum and two buffers of the result for all heads of a group. Fewer heads cost a little of every
    tile, more spans cost a partial sum of dk and dv each, so spans are the last resort.
    """
    for most in range(max(1, blocks.columns // width), 0, -1):
        heads = heads_per_step(H, most, repeats)
        per_block = blocks.q * max(heads, repeats) * width * (4 + 2 * itemsize)
        fit = max(1, dq_bytes // per_block)
        if fit * blocks.q >= Q:
            break
    return heads, math.ceil(math.ceil(Q / blocks.q) / fit)


def _cost(products: int, B: int, H: int, Q: int, K: int, D: int, moved: list[Any]) -> pl.CostEstimate:
    """An upper bound for XLA's scheduler: a causal square without a hole."""
    pairs = B * H * Q * (K - Q // 2)
    return pl.CostEstimate(
        flops=2 * products * pairs * D,
        transcendentals=pairs,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved),
    )
