"""The view of one grid step of the TPU kernels: its heads, and the window of every array (the index maps).

A step of the tile kernels is one tile of several heads. The list of tiles (`codes`, in scalar memory) says which tile:
its row of the batch, query block and key block. Arrays are `[B, S, heads * width]`, so a block of columns is a group of
heads. The index maps below take the step's place in the grid and return, for each axis of an array, which block of it
the step sees.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from jax import lax
from jax.experimental import pallas as pl

from vocojax.kernels.interval_attention.block_info import TileCode
from vocojax.kernels.interval_attention.tpu_blocks import LANES, Blocks


class StepHeads(NamedTuple):
    """The heads of one grid step.

    Attributes:
      query: query heads.
      kv: key/value heads that they read.
      turns: steps that take turns on the same tile and key/value heads, each with other query heads. More than 1 only
        in the backward pass of grouped attention, where a step has fewer query heads than share a key/value head.
      width: of a head, padded to whole lanes.
    """

    query: int
    kv: int
    turns: int
    width: int

    @property
    def group(self) -> int:
        """Query heads of all turns; their gradients accumulate together."""
        return self.turns * self.query


def forward_heads(H: int, G: int, width: int, blocks: Blocks) -> StepHeads:
    """Returns the heads of a step of the forward pass, for H query and G key/value heads of a padded width."""
    query = heads_per_step(H, blocks.columns // width, H // G)
    return StepHeads(query, max(1, query * G // H), 1, width)


def backward_heads(
    Q: int, H: int, G: int, width: int, blocks: Blocks, itemsize: int, dq_bytes: int
) -> tuple[StepHeads, int]:
    """Returns the heads of a step of the backward pass, and the number of spans, see `backward_plan`."""
    repeats = H // G
    query, spans = backward_plan(Q, H, repeats, width, blocks, itemsize, dq_bytes)
    return StepHeads(query, max(1, query // repeats), max(1, repeats // query), width), spans


def heads_per_step(heads: int, most: int, repeats: int) -> int:
    """Returns the largest number of query heads <= `most` per step that is whole groups or divides one group.

    Args:
      heads: query heads in all.
      most: of a step.
      repeats: query heads that share one key/value head: a group.
    """
    fits = lambda n: heads % n == 0 and (n % repeats == 0 or repeats % n == 0)
    return next(n for n in range(max(1, min(most, heads)), 0, -1) if fits(n))


def backward_plan(
    Q: int, H: int, repeats: int, width: int, blocks: Blocks, itemsize: int, dq_bytes: int
) -> tuple[int, int]:
    """Returns the query heads per step, and the number of spans that keeps one span's dq within `dq_bytes`.

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


class ForwardWindows(NamedTuple):
    """Windows of a forward step.

    Attributes:
      q: of queries, and of the output, `[B, S, H * width]`.
      k: of keys, and of values, `[B, S, G * width]`.
      start: of `start`, `[B, 1, S]`.
      stop: of `stop`, `[B, S, 128]` with equal lanes.
      lse: of the log-sum-exp, `[B, H, 1, S]`.
    """

    q: pl.BlockSpec
    k: pl.BlockSpec
    start: pl.BlockSpec
    stop: pl.BlockSpec
    lse: pl.BlockSpec


def forward_windows(at: TileCode, blocks: Blocks, heads: StepHeads, repeats: int) -> ForwardWindows:
    """Returns the windows of the forward pass, whose grid is (h: group of heads, t: tile)."""

    def queries(h: Any, t: Any, codes: Any) -> tuple[Any, ...]:
        return at.row(codes[t]), at.query_block(codes[t]), h

    def group_of_kv_heads(h: Any) -> Any:
        return lax.div(h * heads.query, heads.kv * repeats)

    def keys(h: Any, t: Any, codes: Any) -> tuple[Any, ...]:
        return at.row(codes[t]), at.key_block(codes[t]), group_of_kv_heads(h)

    def start(h: Any, t: Any, codes: Any) -> tuple[Any, ...]:
        return at.row(codes[t]), 0, at.query_block(codes[t])

    def stop(h: Any, t: Any, codes: Any) -> tuple[Any, ...]:
        return at.row(codes[t]), at.key_block(codes[t]), 0

    def lse(h: Any, t: Any, codes: Any) -> tuple[Any, ...]:
        return at.row(codes[t]), h, 0, at.query_block(codes[t])

    return ForwardWindows(
        q=pl.BlockSpec((None, blocks.q, heads.query * heads.width), queries),
        k=pl.BlockSpec((None, blocks.k, heads.kv * heads.width), keys),
        start=pl.BlockSpec((None, 1, blocks.q), start),
        stop=pl.BlockSpec((None, blocks.k, LANES), stop),
        lse=pl.BlockSpec((None, heads.query, 1, blocks.q), lse),
    )


class BackwardWindows(NamedTuple):
    """Windows of a backward step.

    Attributes:
      q: of queries, and of the output's gradient, `[B, S, H * width]`.
      k: of keys, and of values, `[B, S, G * width]`.
      row: of the log-sum-exp, and of the mean gradient, `[B, H, 1, S]`.
      start: of `start`, `[B, 1, S]`.
      stop: of `stop`, `[B, S, 128]` with equal lanes.
      dq: of the gradient of q, `[B, S, H * width]`: a whole span.
      dk: of the gradients of k and v, `[spans, B, S, G * width]`: a part for every span.
    """

    q: pl.BlockSpec
    k: pl.BlockSpec
    row: pl.BlockSpec
    start: pl.BlockSpec
    stop: pl.BlockSpec
    dq: pl.BlockSpec
    dk: pl.BlockSpec


def backward_windows(at: TileCode, blocks: Blocks, heads: StepHeads, span: int) -> BackwardWindows:
    """Returns the windows of the backward pass, whose grid is (h: group of heads, t: tile, r: turn).

    Args:
      at: how tiles are coded.
      blocks: of the pass.
      heads: of a step.
      span: queries whose dq is kept at a time.
    """

    def queries(h: Any, t: Any, r: Any, codes: Any) -> tuple[Any, ...]:
        return at.row(codes[t]), at.query_block(codes[t]), h * heads.turns + r

    def keys(h: Any, t: Any, r: Any, codes: Any) -> tuple[Any, ...]:
        return at.row(codes[t]), at.key_block(codes[t]), h

    def row(h: Any, t: Any, r: Any, codes: Any) -> tuple[Any, ...]:
        return at.row(codes[t]), h * heads.turns + r, 0, at.query_block(codes[t])

    def start(h: Any, t: Any, r: Any, codes: Any) -> tuple[Any, ...]:
        return at.row(codes[t]), 0, at.query_block(codes[t])

    def stop(h: Any, t: Any, r: Any, codes: Any) -> tuple[Any, ...]:
        return at.row(codes[t]), at.key_block(codes[t]), 0

    def number_of_span(code: Any) -> Any:
        return lax.div(at.query_block(code), span // blocks.q)

    def dq(h: Any, t: Any, r: Any, codes: Any) -> tuple[Any, ...]:
        return at.row(codes[t]), number_of_span(codes[t]), h

    def dk(h: Any, t: Any, r: Any, codes: Any) -> tuple[Any, ...]:
        return number_of_span(codes[t]), at.row(codes[t]), at.key_block(codes[t]), h

    return BackwardWindows(
        q=pl.BlockSpec((None, blocks.q, heads.query * heads.width), queries),
        k=pl.BlockSpec((None, blocks.k, heads.kv * heads.width), keys),
        row=pl.BlockSpec((None, heads.query, 1, blocks.q), row),
        start=pl.BlockSpec((None, 1, blocks.q), start),
        stop=pl.BlockSpec((None, blocks.k, LANES), stop),
        dq=pl.BlockSpec((None, span, heads.group * heads.width), dq),
        dk=pl.BlockSpec((None, None, blocks.k, heads.kv * heads.width), dk),
    )


class MeanWindows(NamedTuple):
    """Windows of a step of the mean gradient.

    Attributes:
      operand: of the output, and of its gradient, `[B, S, H * width]`.
      mean: of the result, `[B, H, 1, S]`.
    """

    operand: pl.BlockSpec
    mean: pl.BlockSpec


def mean_windows(block_q: int, heads: int, width: int) -> MeanWindows:
    """Returns the windows of the mean gradient, whose grid is (b: row, h: group of heads, t: block of queries)."""

    def operand(b: Any, h: Any, t: Any) -> tuple[Any, ...]:
        return b, t, h

    def mean(b: Any, h: Any, t: Any) -> tuple[Any, ...]:
        return b, h, 0, t

    return MeanWindows(
        operand=pl.BlockSpec((None, block_q, heads * width), operand),
        mean=pl.BlockSpec((None, heads, 1, block_q), mean),
    )
