"""Interval attention for NVIDIA GPUs (Ampere, Hopper) with Pallas-Triton: forward, dq, and dk with dv.

A program owns one output block and loops over the blocks that it shares a visible pair with, which it reads from a
list made on the device (`block_info.block_kinds`). The full blocks come first on the list and run in a loop without
mask arithmetic; a second loop takes the partial ones. The method is FlashAttention-2's (arXiv 2307.08691).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from vocojax.kernels.interval_attention import gpu_blocks
from vocojax.kernels.interval_attention.block_info import EMPTY, FULL, block_kinds, padded_vectors
from vocojax.kernels.interval_attention.gpu_blocks import Blocks
from vocojax.kernels.interval_attention.mask import IntervalMask

HIDDEN = -2.0e38  # the score of an invisible pair
LOWEST = -1.0e30  # where running maxima begin: far above HIDDEN, so that exp2(HIDDEN - maximum) is exactly 0
LOG2_E = math.log2(math.e)


def forward(
    q_BQHD: jax.Array,
    k_BKGD: jax.Array,
    v_BKGD: jax.Array,
    mask: IntervalMask,
    scale: float,
    *,
    architecture: str,
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
      architecture: a key of `gpu_blocks.ARCHITECTURES`.
      blocks: in place of that table's.
      interpret: without a GPU, for tests.

    Returns:
      `out_BQHD` in the dtype of q and `lse_BHQ`, float32, the base-2 log-sum-exp (0 for rows that see nothing).
    """
    B, Q, H, D = q_BQHD.shape
    blocks = blocks or gpu_blocks.chosen(architecture, D * q_BQHD.dtype.itemsize).forward
    q, k, v = _in_blocks(q_BQHD, blocks.q), _in_blocks(k_BKGD, blocks.k), _in_blocks(v_BKGD, blocks.k)
    start, stop, kinds = _block_map(mask, blocks)
    repeats = H // k.shape[2]
    q_spec = _heads_spec(q, lambda n, h, b: (b, n, h, 0), blocks.q)
    k_spec = _heads_spec(k, lambda n, h, b: (b, 0, lax.div(h, repeats), 0))
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, bk=blocks.k, scale=scale * LOG2_E, prefix=mask.prefix, width=D),
        name="interval_attention_forward",
        grid=(q.shape[1] // blocks.q, H, B),
        in_specs=[
            *_list_specs(kinds),
            *(q_spec, k_spec, k_spec),
            pl.BlockSpec((None, blocks.q), lambda n, h, b: (b, n)),
            pl.BlockSpec((None, stop.shape[1]), lambda n, h, b: (b, 0)),
        ],
        out_specs=[q_spec, pl.BlockSpec((None, None, blocks.q), lambda n, h, b: (b, h, n))],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, H, q.shape[1]), jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
    )(*_lists(kinds), q, k, v, start, stop)
    return out[:, :Q], lse[:, :, :Q]


def _forward_kernel(
    list_ref, counts_ref, q_ref, k_ref, v_ref, start_ref, stop_ref, out_ref, lse_ref,
    *, bk: int, scale: float, prefix: int, width: int,
) -> None:  # fmt: skip
    bq = q_ref.shape[0]
    q, start = _load(q_ref, width), start_ref[...]
    i = prefix + pl.program_id(0) * bq + jnp.arange(bq)

    def key_block(block: jax.Array, partial: bool, state: Any) -> Any:
        highest, total, out = state
        keys = pl.ds(block * bk, bk)
        scores = _product(q, _load(k_ref.at[keys], width).T) * scale
        if partial:
            j = block * bk + jnp.arange(bk)
            visible = _visible(i[:, None], start[:, None], j, stop_ref[keys])
            scores = jnp.where(visible, scores, HIDDEN)
        raised = jnp.maximum(highest, scores.max(axis=1))
        weights = jnp.exp2(scores - raised[:, None])
        decay = jnp.exp2(highest - raised)
        v = _load(v_ref.at[keys], width)
        out = out * decay[:, None] + _product(weights.astype(v.dtype), v)
        return raised, total * decay + weights.sum(axis=1), out

    state = (jnp.full(bq, LOWEST), jnp.zeros(bq), jnp.zeros((bq, q.shape[1])))
    highest, total, out = _over_list(list_ref, counts_ref, key_block, state)
    divisor = jnp.where(total > 0, total, 1.0)
    _store(out_ref, out / divisor[:, None], width)
    lse_ref[...] = jnp.where(total > 0, highest + jnp.log2(divisor), 0.0)


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
    architecture: str,
    dq_blocks: Blocks | None = None,
    dkv_blocks: Blocks | None = None,
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
      architecture: a key of `gpu_blocks.ARCHITECTURES`.
      dq_blocks: in place of that table's.
      dkv_blocks: in place of that table's.
      interpret: without a GPU, for tests.

    Returns:
      The gradients of q, k and v, each in the shape and dtype of its operand.
    """
    table = gpu_blocks.chosen(architecture, q_BQHD.shape[3] * q_BQHD.dtype.itemsize)
    # Multiplied and summed, not a matrix product: those may round float32 operands.
    mean_BHQ = (out_BQHD.astype(jnp.float32) * dout_BQHD.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    arguments = (q_BQHD, k_BKGD, v_BKGD, dout_BQHD, lse_BHQ, mean_BHQ, mask, scale)
    dq = _backward_q(*arguments, dq_blocks or table.dq, interpret)
    dk, dv = _backward_kv(*arguments, dkv_blocks or table.dkv, interpret)
    return dq, dk, dv


def _backward_q(q_BQHD, k_BKGD, v_BKGD, dout_BQHD, lse_BHQ, mean_BHQ, mask, scale, blocks, interpret) -> jax.Array:
    B, Q, H, D = q_BQHD.shape
    q, dout, k, v, lse, mean = _backward_operands(q_BQHD, dout_BQHD, k_BKGD, v_BKGD, lse_BHQ, mean_BHQ, blocks)
    start, stop, kinds = _block_map(mask, blocks)
    repeats = H // k.shape[2]
    q_spec = _heads_spec(q, lambda n, h, b: (b, n, h, 0), blocks.q)
    k_spec = _heads_spec(k, lambda n, h, b: (b, 0, lax.div(h, repeats), 0))
    row_spec = pl.BlockSpec((None, None, blocks.q), lambda n, h, b: (b, h, n))
    dq = pl.pallas_call(
        functools.partial(_dq_kernel, bk=blocks.k, scale=scale, prefix=mask.prefix, width=D),
        name="interval_attention_dq",
        grid=(q.shape[1] // blocks.q, H, B),
        in_specs=[
            *_list_specs(kinds),
            *(q_spec, k_spec, k_spec, q_spec, row_spec, row_spec),
            pl.BlockSpec((None, blocks.q), lambda n, h, b: (b, n)),
            pl.BlockSpec((None, stop.shape[1]), lambda n, h, b: (b, 0)),
        ],
        out_specs=q_spec,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
    )(*_lists(kinds), q, k, v, dout, lse, mean, start, stop)
    return dq[:, :Q]


def _dq_kernel(
    list_ref, counts_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, mean_ref, start_ref, stop_ref, dq_ref,
    *, bk: int, scale: float, prefix: int, width: int,
) -> None:  # fmt: skip
    bq = q_ref.shape[0]
    q, dout, start = _load(q_ref, width), _load(dout_ref, width), start_ref[...]
    lse, mean = lse_ref[...][:, None], mean_ref[...][:, None]
    i = prefix + pl.program_id(0) * bq + jnp.arange(bq)

    def key_block(block: jax.Array, partial: bool, dq: jax.Array) -> jax.Array:
        keys = pl.ds(block * bk, bk)
        k = _load(k_ref.at[keys], width)
        scores = _product(q, k.T) * (scale * LOG2_E)
        if partial:
            j = block * bk + jnp.arange(bk)
            visible = _visible(i[:, None], start[:, None], j, stop_ref[keys])
            scores = jnp.where(visible, scores, HIDDEN)
        weights = jnp.exp2(scores - lse)
        dweights = _product(dout, _load(v_ref.at[keys], width).T)
        return dq + _product((weights * (dweights - mean)).astype(k.dtype), k)

    dq = _over_list(list_ref, counts_ref, key_block, jnp.zeros(q.shape))
    _store(dq_ref, dq * scale, width)


def _backward_kv(
    q_BQHD, k_BKGD, v_BKGD, dout_BQHD, lse_BHQ, mean_BHQ, mask, scale, blocks, interpret
) -> tuple[jax.Array, jax.Array]:
    B, K, G, D = k_BKGD.shape
    q, dout, k, v, lse, mean = _backward_operands(q_BQHD, dout_BQHD, k_BKGD, v_BKGD, lse_BHQ, mean_BHQ, blocks)
    start, stop, kinds = _block_map(mask, blocks)
    kinds = kinds.mT
    repeats = q.shape[2] // G
    q_spec = pl.BlockSpec((None, q.shape[1], repeats, _padded_width(D)), lambda n, g, b: (b, 0, g, 0))
    k_spec = _heads_spec(k, lambda n, g, b: (b, n, g, 0), blocks.k)
    row_spec = pl.BlockSpec((None, repeats, q.shape[1]), lambda n, g, b: (b, g, 0))
    dk, dv = pl.pallas_call(
        functools.partial(_dkv_kernel, bq=blocks.q, scale=scale, prefix=mask.prefix, width=D),
        name="interval_attention_dkv",
        grid=(k.shape[1] // blocks.k, G, B),
        in_specs=[
            *_list_specs(kinds),
            *(q_spec, k_spec, k_spec, q_spec, row_spec, row_spec),
            pl.BlockSpec((None, start.shape[1]), lambda n, g, b: (b, 0)),
            pl.BlockSpec((None, blocks.k), lambda n, g, b: (b, n)),
        ],
        out_specs=[k_spec, k_spec],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
    )(*_lists(kinds), q, k, v, dout, lse, mean, start, stop)
    return dk[:, :K], dv[:, :K]


def _dkv_kernel(
    list_ref, counts_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, mean_ref, start_ref, stop_ref, dk_ref, dv_ref,
    *, bq: int, scale: float, prefix: int, width: int,
) -> None:  # fmt: skip
    bk = k_ref.shape[0]
    k, v, stop = _load(k_ref, width), _load(v_ref, width), stop_ref[...][:, None]
    j = (pl.program_id(0) * bk + jnp.arange(bk))[:, None]

    def query_block(head: jax.Array, block: jax.Array, partial: bool, sums: Any) -> Any:
        dk, dv = sums
        rows = pl.ds(block * bq, bq)
        q = _load(q_ref.at[rows, head], width)
        scores = _product(k, q.T) * (scale * LOG2_E)
        if partial:
            i = prefix + block * bq + jnp.arange(bq)
            scores = jnp.where(_visible(i, start_ref[rows], j, stop), scores, HIDDEN)
        weights = jnp.exp2(scores - lse_ref[head, rows])
        dout = _load(dout_ref.at[rows, head], width)
        dv = dv + _product(weights.astype(dout.dtype), dout)
        dweights = _product(v, dout.T)
        dscores = (weights * (dweights - mean_ref[head, rows])).astype(q.dtype)
        return dk + _product(dscores, q), dv

    def query_head(head: jax.Array, sums: Any) -> Any:
        return _over_list(list_ref, counts_ref, functools.partial(query_block, head), sums)

    sums = (jnp.zeros(k.shape), jnp.zeros(k.shape))
    dk, dv = lax.fori_loop(0, q_ref.shape[1], query_head, sums)
    _store(dk_ref, dk * scale, width)
    _store(dv_ref, dv, width)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a matrix product accumulated in float32; float32 operands are not rounded to TF32 on the way."""
    return plgpu.dot(a, b, precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None)


def _visible(i: jax.Array, start: jax.Array, j: jax.Array, stop: jax.Array) -> jax.Array:
    """Returns the mask of a tile, by one comparison per pair.

    The distance from the key to the query, as an unsigned number (keys of the future become very distant), has to be
    less than how far the query looks back and how far the key is seen.
    """
    reach = jnp.minimum(jnp.maximum(i - start + 1, 0), jnp.maximum(stop - j, 0))
    return (i - j).astype(jnp.uint32) < reach.astype(jnp.uint32)


def _over_list(list_ref: Any, counts_ref: Any, tile: Callable[[jax.Array, bool, Any], Any], state: Any) -> Any:
    """Runs `tile(block, partial, state)` over the full blocks of a list, then over the partial ones."""
    full, live = counts_ref[0], counts_ref[1]
    state = lax.fori_loop(0, full, lambda t, x: tile(list_ref[t], False, x), state)
    return lax.fori_loop(full, live, lambda t, x: tile(list_ref[t], True, x), state)


def _block_map(mask: IntervalMask, blocks: Blocks) -> tuple[jax.Array, jax.Array, jax.Array]:
    start, stop = padded_vectors(mask, blocks.q, blocks.k)
    return start, stop, block_kinds(start, stop, mask.prefix, blocks.q, blocks.k)


def _lists(kinds_BNM: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns for every block N its blocks M, full before partial ones, and how many are (full, not empty): int32."""
    order = jnp.argsort(-kinds_BNM, axis=-1, stable=True).astype(jnp.int32)
    counts = [(kinds_BNM == FULL).sum(-1), (kinds_BNM != EMPTY).sum(-1)]
    return order, jnp.stack(counts, axis=-1).astype(jnp.int32)


def _list_specs(kinds_BNM: jax.Array) -> list[pl.BlockSpec]:
    at = lambda n, h, b: (b, n, 0)
    return [pl.BlockSpec((None, None, kinds_BNM.shape[-1]), at), pl.BlockSpec((None, None, 2), at)]


def _in_blocks(x_BSHD: jax.Array, block: int) -> jax.Array:
    return jnp.pad(x_BSHD, ((0, 0), (0, -x_BSHD.shape[1] % block), (0, 0), (0, 0)))


def _backward_operands(q, dout, k, v, lse_BHQ, mean_BHQ, blocks: Blocks) -> tuple[jax.Array, ...]:
    rows = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % blocks.q)))
    queries, keys = (_in_blocks(x, blocks.q) for x in (q, dout)), (_in_blocks(x, blocks.k) for x in (k, v))
    return *queries, *keys, rows(lse_BHQ), rows(mean_BHQ)


def _padded_width(width: int) -> int:
    """Returns the width of a tile: Triton's are powers of two, and its products at least 16 deep."""
    return max(16, pl.next_power_of_2(width))


def _heads_spec(x_BSHD: jax.Array, index_map: Callable[..., Any], block: int | None = None) -> pl.BlockSpec:
    """Returns the window of one head of `x`: a block of positions, or all of them."""
    return pl.BlockSpec((None, block or x_BSHD.shape[1], None, _padded_width(x_BSHD.shape[3])), index_map)


def _load(ref: Any, width: int) -> jax.Array:
    """Loads `[rows, padded width]`, with zeros beyond the width of the head."""
    if ref.shape[-1] == width:
        return plgpu.load(ref)
    return plgpu.load(ref, mask=(jnp.arange(ref.shape[-1]) < width)[None], other=0.0)


def _store(ref: Any, x: jax.Array, width: int) -> None:
    inside = None if ref.shape[-1] == width else (jnp.arange(ref.shape[-1]) < width)[None]
    plgpu.store(ref, x.astype(ref.dtype), mask=inside)
