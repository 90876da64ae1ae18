"""Rotary positions for TPU: one pass over the heads as `[tokens, heads * width]`.

This is the layout in which the products before leave the heads and attention's kernel takes them. Rotations of the
lanes bring the other element of each pair.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
BLOCK_BYTES = 3 << 20  # of x, the result and the tables in VMEM, which holds each twice: v4 has 16 MiB
ROWS = 16  # of a bfloat16 tile


def takes(heads: int, width: int) -> bool:
    """Returns whether the kernel takes such heads: each fills whole registers, or several fill one."""
    return width % LANES == 0 or (LANES % width == 0 and heads * width % LANES == 0)


def rotate(
    x_BSHD: jax.Array, cos_BSD: jax.Array, sin_BSD: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array]:
    """Rotates heads, in the dtype of x.

    Args:
      x_BSHD: heads that the kernel `takes`.
      cos_BSD: of `Rotation`, for every token of x.
      sin_BSD: likewise.
      interpret: without a TPU, for tests.
    """
    B, S, H, D = x_BSHD.shape
    width = max(D, LANES)
    tokens = lambda x: x.reshape(B * S, -1)
    cos, sin = (jnp.tile(tokens(table), width // D) for table in (cos_BSD, sin_BSD))
    row_bytes = 2 * H * D * x_BSHD.dtype.itemsize + 2 * width * cos.dtype.itemsize
    rows = max(ROWS, BLOCK_BYTES // row_bytes // ROWS * ROWS)
    rows = min(rows, -(-B * S // ROWS) * ROWS)
    heads, table = (pl.BlockSpec((rows, columns), lambda at: (at, 0)) for columns in (H * D, width))
    rotated = pl.pallas_call(
        functools.partial(_kernel, half=D // 2),
        name="rotary",
        grid=(-(-B * S // rows),),
        in_specs=[heads, table, table],
        out_specs=heads,
        out_shape=jax.ShapeDtypeStruct((B * S, H * D), x_BSHD.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=3 * x_BSHD.size, transcendentals=0, bytes_accessed=2 * x_BSHD.nbytes + cos.nbytes + sin.nbytes
        ),
        interpret=interpret,
    )(tokens(x_BSHD), cos, sin)
    return (rotated.reshape(B, S, H, D),)


def _kernel(x_ref, cos_ref, sin_ref, out_ref, *, half: int) -> None:
    cos, sin = cos_ref[...], sin_ref[...]
    width = cos.shape[1]
    for at in range(0, x_ref.shape[1], width):
        x = x_ref[:, at : at + width].astype(jnp.float32)
        others = pltpu.roll(x, half, axis=1)
        if 2 * half < width:  # several heads: the first elements of pairs come from the other side
            is_first = lax.broadcasted_iota(jnp.int32, x.shape, 1) % (2 * half) < half
            others = jnp.where(is_first, pltpu.roll(x, width - half, axis=1), others)
        out_ref[:, at : at + width] = (x * cos + others * sin).astype(out_ref.dtype)
