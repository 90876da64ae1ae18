"""Tiles of the TPU kernels: which ones a pass walks, and the operations that its kernel computes them with.

A vector with a value per row of a tile lies as `[rows, 128]` with equal lanes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from vocojax.kernels.interval_attention.block_info import TileList, block_kinds, tile_list, with_dirty
from vocojax.kernels.interval_attention.tpu_blocks import LANES


def tiles_to_walk(
    start: jax.Array, stop: jax.Array, prefix: int, block_q: int, block_k: int, spans: int | None = None
) -> TileList:
    """Lists the tiles of padded vectors in the order of a pass: forward without `spans`, else backward."""
    cut = prefix, block_q, block_k
    kinds = with_dirty(block_kinds(start, stop, *cut), start, stop, *cut)
    return tile_list(kinds, *cut, spans)


def product(a: jax.Array, b: jax.Array, contract: tuple[tuple[int], tuple[int]]) -> jax.Array:
    """Returns a matrix product accumulated in float32; float32 operands are not rounded to bfloat16 on the way."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def part(index: int, width: int) -> slice:
    """Returns the columns of the head (or group of heads) with that index."""
    return slice(index * width, (index + 1) * width)


def widened(x: jax.Array, width: int) -> jax.Array:
    """Repeats the registers of `[rows, 128]` with equal lanes: -> `[rows, width]`."""
    return jnp.tile(x, (1, width // LANES))


def turned(x: jax.Array) -> jax.Array:
    """Transposes a matrix whose sides are multiples of 128, in the transpose unit.

    The compiler transposes some 16-bit matrices in the matrix units, but no 32-bit ones.
    """
    return x.astype(jnp.float32).T.astype(x.dtype)


def only(live: jax.Array | None, x: jax.Array) -> jax.Array:
    """Returns the rows of x where `live` `[rows, 128]` is set, and zeros in the others."""
    if live is None:
        return x
    return jnp.where(widened(live, x.shape[1]), x.astype(jnp.float32), 0.0).astype(x.dtype)


def any_of(pairs: jax.Array, *, of_rows: bool) -> jax.Array:
    """Returns whether any pair is set, for every row (or column) of pairs: bool `[rows or columns, 128]`.

    The matrix unit counts them, which needs no transposition.
    """
    pairs = pairs.astype(jnp.float32).astype(jnp.bfloat16)
    ones = jnp.ones((pairs.shape[1 if of_rows else 0], LANES), jnp.bfloat16)
    return product(pairs, ones, ((1 if of_rows else 0,), (0,))) > 0


def along_lanes(x: jax.Array) -> jax.Array:
    """Turns rows into lanes by picking the diagonal: `[rows, 128]` with equal lanes -> `[1, rows]`."""
    row, lane = (lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    squares = (jnp.where(row == lane, x[r : r + LANES], 0.0) for r in range(0, x.shape[0], LANES))
    return jnp.concatenate([square.sum(axis=0, keepdims=True) for square in squares], axis=1)


def along_rows(x_BS: jax.Array) -> jax.Array:
    """Returns `[B, S, 128]` with equal lanes: how a vector lies when positions run down the rows of a tile."""
    return jnp.broadcast_to(x_BS[..., None], (*x_BS.shape, LANES))


def columns_of(x_BSHD: jax.Array, multiple: int, width: int) -> jax.Array:
    """Returns `[B, S', heads * width]`, with zeros up to a multiple of the block and of the lanes."""
    B, S, H, D = x_BSHD.shape
    x = jnp.pad(x_BSHD, ((0, 0), (0, -S % multiple), (0, 0), (0, width - D)))
    return x.reshape(B, -1, H * width)
