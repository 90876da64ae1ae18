"""The bodies of the TPU kernels: what one grid step does with the tile that it sees.

Code of a tile, full, partial or dirty (see `block_info`), decides how it is computed. A full tile runs without any mask
arithmetic; a partial one builds its mask in registers from the vectors. A dirty one also replaces what nobody sees
before its products, because 0 * NaN would carry it into every sum: around the kernels that would take a pass over each
operand.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from vocojax.kernels.interval_attention.block_info import DIRTY, FULL, PARTIAL, TileCode
from vocojax.kernels.interval_attention.tpu_blocks import LANES
from vocojax.kernels.interval_attention.tpu_tiles import along_lanes, any_of, only, part, product, turned, widened

HIDDEN = -2.0e38  # the score of an invisible pair
LOWEST = -1.0e30  # where running maxima begin: far above HIDDEN, so that exp2(HIDDEN - maximum) is exactly 0
LOG2_E = math.log2(math.e)


def forward_kernel(
    codes, q_ref, k_ref, v_ref, start_ref, stop_ref, out_ref, lse_ref, highest_ref, total_ref, sum_ref,
    *, at: TileCode, scale: float, heads: int, kv_heads: int, prefix: int,
) -> None:  # fmt: skip
    """Adds one tile to the running softmax of its query block, for the heads of the step.

    Scores are computed transposed, keys by queries. So maxima and sums run down the rows, which the vector units do,
    and a statistic of a query is one lane. Along lanes the transpose unit would be busier than the matrix units.

    Args:
      codes: int32 [T] in scalar memory, the list of tiles.
      q_ref: [bq, heads * width].
      k_ref: [bk, kv_heads * width].
      v_ref: [bk, kv_heads * width].
      start_ref: int32 [1, bq].
      stop_ref: int32 [bk, 128] with equal lanes.
      out_ref: [bq, heads * width], written with the last tile of the query block.
      lse_ref: fp32 [heads, 1, bq], likewise.
      highest_ref: fp32 [heads, 1, bq], the running maxima.
      total_ref: fp32 [heads, 1, bq], the running sums of weights.
      sum_ref: fp32 [heads * width, bq], the running sums of weighted values.
      at: how tiles are coded.
      scale: of the scores, for a base-2 softmax.
      heads: query heads of the step.
      kv_heads: key/value heads that they read.
      prefix: keys before the first query.
    """
    code = codes[pl.program_id(1)]
    bq, bk = q_ref.shape[0], k_ref.shape[0]
    width = q_ref.shape[1] // heads

    @pl.when(code & TileCode.FIRST != 0)
    def open_block() -> None:
        highest_ref[...] = jnp.full_like(highest_ref, LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def accumulate(visible: jax.Array | None, seen: jax.Array | None = None) -> None:
        kv_of = lambda h: part(h * kv_heads // heads, width)

        def scores_of(h: int) -> jax.Array:
            scores = product(k_ref[:, kv_of(h)], q_ref[:, part(h, width)], ((1,), (1,))) * scale
            return scores if visible is None else jnp.where(visible, scores, HIDDEN)

        def weigh(h: int, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
            before = highest_ref[h]
            highest = jnp.maximum(before, scores.max(axis=0, keepdims=True))
            weights, decay = jnp.exp2(scores - highest), jnp.exp2(before - highest)
            highest_ref[h] = highest
            total_ref[h] = total_ref[h] * decay + weights.sum(axis=0, keepdims=True)
            return weights.astype(v_ref.dtype), decay

        def gather(h: int, weights: jax.Array, decay: jax.Array) -> None:
            v = turned(only(seen, v_ref[:, kv_of(h)]))
            head = part(h, width)
            sum_ref[head] = sum_ref[head] * decay + product(v, weights, ((1,), (0,)))

        # The compiler's scheduler moves little past a head. So the order in the program is that of a pipeline: scores
        # of two heads ahead keep the matrix units busy during a softmax. Its weights are used a head later, where a
        # block is small enough that a head alone does not fill the units.
        lag = 1 if bq <= 256 else 0
        scores, weighed = {}, {}
        for step in range(heads + 2 + lag):
            if step < heads:
                scores[step] = scores_of(step)
            if 0 <= step - 2 < heads:
                weighed[step - 2] = weigh(step - 2, scores.pop(step - 2))
            if step >= 2 + lag:
                gather(step - 2 - lag, *weighed.pop(step - 2 - lag))

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
        accumulate(pairs, seen=any_of(pairs, of_rows=True))

    @pl.when(code & TileCode.LAST != 0)
    def close_block() -> None:
        for h in range(heads):
            total = total_ref[h]
            divisor = jnp.where(total > 0, total, 1.0)
            out_ref[:, part(h, width)] = turned((sum_ref[part(h, width)] * (1 / divisor)).astype(out_ref.dtype))
            lse_ref[h] = jnp.where(total > 0, highest_ref[h] + jnp.log2(divisor), 0.0)


def backward_kernel(
    codes, q_ref, k_ref, v_ref, dout_ref, lse_ref, mean_ref, start_ref, stop_ref, dq_ref, dk_ref, dv_ref,
    dq_sum, dk_sum, dv_sum,
    *, at: TileCode, scale: float, heads: int, kv_heads: int, prefix: int, together: int,
    transposed_dq: bool,
) -> None:  # fmt: skip
    """Adds one tile to the three gradients, for the heads of the step. Scores are computed transposed, keys by queries.

    Args:
      codes: int32 [T] in scalar memory, the list of tiles.
      q_ref: [bq, heads * width].
      k_ref: [bk, kv_heads * width].
      v_ref: [bk, kv_heads * width].
      dout_ref: [bq, heads * width].
      lse_ref: fp32 [heads, 1, bq], base-2 log-sum-exp.
      mean_ref: fp32 [heads, 1, bq], see `mean_kernel`.
      start_ref: int32 [1, bq].
      stop_ref: int32 [bk, 128] with equal lanes.
      dq_ref: [span, group * width], written with the last tile of the span of queries.
      dk_ref: [bk, kv_heads * width], written with the last tile of the key block.
      dv_ref: [bk, kv_heads * width], likewise.
      dq_sum: fp32 [turns, span, heads * width], or with `transposed_dq` [turns, heads * width, span].
      dk_sum: fp32 [bk, kv_heads * width].
      dv_sum: fp32 [bk, kv_heads * width].
      at: how tiles are coded.
      scale: of the scores.
      heads: query heads of the step.
      kv_heads: key/value heads that they read.
      prefix: keys before the first query.
      together: see `tpu_blocks.Blocks`.
      transposed_dq: see `tpu_blocks.Blocks`.
    """
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
        kv_of = lambda h: part(h * kv_heads // heads, width)

        def operands(h: int) -> tuple[jax.Array, jax.Array, jax.Array]:
            head = part(h, width)
            return only(seeing, q_ref[:, head]), only(seen, k_ref[:, kv_of(h)]), only(seeing, dout_ref[:, head])

        def weigh(h: int, scores: jax.Array, dweights: jax.Array) -> tuple[jax.Array, jax.Array]:
            scores = scores * (scale * LOG2_E)
            if visible is not None:
                scores = jnp.where(visible, scores, HIDDEN)
            weights = jnp.exp2(scores - lse_ref[h])
            dscores = weights * (dweights - mean_ref[h])
            if visible is not None and seen is not None:  # what nobody sees is in `dweights` and `mean_ref` too
                dscores = jnp.where(visible, dscores, 0.0)
            return weights.astype(q_ref.dtype), dscores.astype(q_ref.dtype)

        # The compiler's scheduler moves little past a product. So a few heads take every stage together, and the matrix
        # units work on one of them while the vector units work on another.
        for first in range(0, heads, together):
            some = range(first, min(first + together, heads))
            q, k, dout = zip(*map(operands, some), strict=True)
            pairs = [
                (product(k_h, q_h, ((1,), (1,))), product(v_ref[:, kv_of(h)], dout_h, ((1,), (1,))))
                for h, q_h, k_h, dout_h in zip(some, q, k, dout, strict=True)
            ]
            weights, dscores = zip(*(weigh(h, *pair) for h, pair in zip(some, pairs, strict=True)), strict=True)
            for h, weights_h, dout_h in zip(some, weights, dout, strict=True):
                dv_sum[:, kv_of(h)] += product(weights_h, dout_h, ((1,), (0,)))
            for h, dscores_h, q_h in zip(some, dscores, q, strict=True):
                dk_sum[:, kv_of(h)] += product(dscores_h, q_h, ((1,), (0,)))
            for h, dscores_h, k_h in zip(some, dscores, k, strict=True):
                if transposed_dq:
                    dq_sum[turn, part(h, width), rows] += product(k_h, dscores_h, ((0,), (0,)))
                else:
                    dq_sum[turn, rows, part(h, width)] += product(dscores_h, k_h, ((0,), (0,)))

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


def mean_kernel(out_ref, dout_ref, mean_ref, *, width: int) -> None:
    """Writes `[heads, 1, rows]`: the product of a query's output and the output's gradient, for the heads of the step.

    By its softmax weights, it is the mean of the query's gradients with respect to its weights.
    """
    for h in range(mean_ref.shape[0]):
        out, dout = (ref[:, part(h, width)].astype(jnp.float32) for ref in (out_ref, dout_ref))
        # Multiplied and summed, not a matrix product: those may round float32 operands.
        mean = (out * dout).sum(axis=1, keepdims=True)
        mean_ref[h] = along_lanes(jnp.broadcast_to(mean, (mean.shape[0], LANES)))
