"""Rotary positions for TPU: one pass over the heads where they lie, `[tokens, heads * width]`, as the products before
it leave them and attention's kernel takes them. A pair's other half comes by a rotation of the lanes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BLOCK_BYTES = 1 << 20  # of one operand in VMEM, which holds four blocks of them: v4 has 16 MiB
ROWS = 16  # of a bfloat16 tile


def rotate(
    x_BSHD: jax.Array, cos_BSD: jax.Array, sin_BSD: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array]:
    """-> the heads rotated, in the dtype of x; `D` is a multiple of 128 and the tables are those of `Rotation`."""
    B, S, H, D = x_BSHD.shape
    tokens = lambda x: x.reshape(B * S, -1)
    rows = max(ROWS, BLOCK_BYTES // (H * D * x_BSHD.dtype.itemsize) // ROWS * ROWS)
    rows = min(rows, -(-B * S // ROWS) * ROWS)
    heads, table = (pl.BlockSpec((rows, width), lambda at: (at, 0)) for width in (H * D, D))
    rotated = pl.pallas_call(
        functools.partial(_kernel, width=D),
        name="rotary",
        grid=(-(-B * S // rows),),
        in_specs=[heads, table, table],
        out_specs=heads,
        out_shape=jax.ShapeDtypeStruct((B * S, H * D), x_BSHD.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=3 * x_BSHD.size, transcendentals=0,
            bytes_accessed=2 * x_BSHD.nbytes + cos_BSD.nbytes + sin_BSD.nbytes,
        ),
        interpret=interpret,
    )(tokens(x_BSHD), tokens(cos_BSD), tokens(sin_BSD))
    return (rotated.reshape(B, S, H, D),)


def _kernel(x_ref, cos_ref, sin_ref, out_ref, *, width: int) -> None:
    cos, sin = cos_ref[...], sin_ref[...]
    for at in range(0, x_ref.shape[1], width):
        x = x_ref[:, at : at + width].astype(jnp.float32)
        others = pltpu.roll(x, width // 2, axis=1)
        out_ref[:, at : at + width] = (x * cos + others * sin).astype(out_ref.dtype)
