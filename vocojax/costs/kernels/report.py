"""The project's TPU attention compared with JAX's splash attention on four layouts (`launch/kernel_report.py`)."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vocojax.costs.kernels import tpu
from vocojax.costs.kernels.layouts import Layout, layouts
from vocojax.costs.kernels.tpu import Compiled, Job, TileCosts
from vocojax.devices import known_tpu
from vocojax.kernels.interval_attention import IntervalMask, tpu_blocks, tpu_tiles, tpu_windows
from vocojax.kernels.interval_attention.block_info import DIRTY, EMPTY, FULL, PARTIAL, TileCode, padded_vectors
from vocojax.kernels.interval_attention.tpu_blocks import LANES
from vocojax.training.flops import visible_pairs

HEADS, WIDTH = 32, 128
SPLASH_BLOCKS = ((256, 0), (512, 0), (1024, 0), (1024, 512))  # (block, block of one inner step)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one pass costs on one layout.

    Attributes:
      block: queries and keys of its tiles.
      seconds: for all rows and heads.
      matrix_seconds: of them, those that the matrix units are busy.
      full_tile_cycles: of a full tile of one head.
      partial_tile_cycles: of a partial one.
      dirty_tile_cycles: of a dirty one.
      spills: registers stored for want of room, per full tile and head.
      vmem_bytes: of windows and scratch.
    """

    block: tuple[int, int]
    seconds: float
    matrix_seconds: float
    full_tile_cycles: float
    partial_tile_cycles: float
    dirty_tile_cycles: float
    spills: float
    vmem_bytes: int


def tpu_report(topologies: list[str]) -> dict[str, Any]:
    """Compares both kernels on every layout: forward plus backward of all its rows, 32 heads of 128 in bfloat16.

    Splash gets the best of `SPLASH_BLOCKS` for each pass, ours the blocks of its table. Ours includes the products of
    outputs and their gradients, which splash leaves to XLA.

    Returns:
      `{layout: {"live_tiles", "tiles_with_a_visible_pair", topology: {"ours", "splash", "ratio"}}}`. `ratio` is
      splash's seconds over ours, `visible_share` of a pass is `visible_seconds` over its seconds. The tile counts are
      those of the forward pass on the first topology.
    """
    report: dict[str, Any] = {}
    for topology in topologies:
        jobs = [Job("ours", x.length, x.rows, HEADS, WIDTH) for x in layouts().values()]
        jobs += [Job("splash", 4096, 1, HEADS, WIDTH, *blocks) for blocks in SPLASH_BLOCKS]
        with tempfile.TemporaryDirectory() as folder:
            compiled = tpu.compile_jobs(topology, jobs, folder)
            splash = [[(k, tpu.tile_costs(k)) for k in job.values()] for job in compiled[len(layouts()) :]]
            ours_by_layout = [ours_costs(x, job) for x, job in zip(layouts().values(), compiled, strict=False)]
            kind = next(iter(compiled[0].values())).device_kind
        for (name, layout), ours in zip(layouts().items(), ours_by_layout, strict=True):
            entry = report.setdefault(name, {"title": layout.title} | live_tiles(layout, kind))
            theirs = [best_splash(layout, [job[i] for job in splash]) for i in range(2)]
            visible = [visible_seconds(layout, kind, backward=backward) for backward in (False, True)]
            entry[topology] = {"ours": _entry(ours, visible), "splash": _entry(theirs, visible)}
            entry[topology]["ratio"] = entry[topology]["splash"]["seconds"] / entry[topology]["ours"]["seconds"]
    return report


def visible_seconds(layout: Layout, device_kind: str, *, backward: bool) -> float:
    """Returns the seconds that a pass would take if its matrix units did, at their full rate, the products of visible
    pairs and nothing else: two products of a pair forward, five backward."""
    chip = known_tpu(device_kind)
    flops = 2 * (5 if backward else 2) * WIDTH * HEADS * visible_pairs(layout.start, layout.stop)
    return flops / chip.flops


def _entry(passes: Sequence[Cost], visible: Sequence[float]) -> dict[str, Any]:
    seconds = sum(x.seconds for x in passes)
    return {
        "seconds": seconds,
        "mxu_util": sum(x.matrix_seconds for x in passes) / seconds,
        "spills": sum(x.spills for x in passes),
        "vmem_bytes": max(x.vmem_bytes for x in passes),
        **{name: {**dataclasses.asdict(x), "visible_share": least / x.seconds}
           for name, x, least in zip(("forward", "backward"), passes, visible, strict=True)},
    }


def live_tiles(layout: Layout, device_kind: str) -> dict[str, int]:
    """Counts the tiles that the forward kernel computes, and those that hold a visible pair."""
    table = tpu_blocks.GENERATIONS[tpu_blocks.generation(device_kind)]
    blocks = tpu_blocks.fitted(table.forward_of(layout.length), layout.length, layout.length)
    kinds = tile_codes(layout, blocks.q, blocks.k, None) & TileCode.KIND
    return {
        "live_tiles": int((kinds != EMPTY).sum()),
        "tiles_with_a_visible_pair": layout.tiles_with_a_visible_pair(blocks.q, blocks.k),
    }


def ours_costs(layout: Layout, kernels: dict[str, Compiled]) -> tuple[Cost, Cost]:
    """Returns the costs of both passes; the backward one includes the mean gradients, which come before its tiles."""
    forward, backward = tile_costs(layout, kernels)
    before = tpu.streaming_seconds(kernels["interval_attention_mean"])
    return forward, dataclasses.replace(backward, seconds=backward.seconds + before)


def tile_costs(layout: Layout, kernels: dict[str, Compiled], heads: int = HEADS) -> tuple[Cost, Cost]:
    """Returns the costs of the kernels that walk tiles, forward and backward, compiled for so many heads."""
    forward, backward = (kernels[f"interval_attention_{name}"] for name in ("forward", "backward"))
    return (
        _tile_cost(layout, forward, tpu.tile_costs(forward), heads, backward=False),
        _tile_cost(layout, backward, tpu.tile_costs(backward), heads, backward=True),
    )


def _tile_cost(layout: Layout, kernel: Compiled, costs: TileCosts, heads: int, *, backward: bool) -> Cost:
    """Walks the kernel's own tile list: a step costs what its tile and flags say, or its DMA if that takes longer."""
    generation = tpu_blocks.generation(kernel.device_kind)
    table = tpu_blocks.GENERATIONS[generation]
    chosen = table.backward_of(layout.length) if backward else table.forward_of(layout.length)
    blocks = tpu_blocks.fitted(chosen, layout.length, layout.length)
    blocks = tpu_blocks.shared_by_cores(blocks, generation, heads * WIDTH)
    of_step, spans = tpu_windows.heads_per_step(heads, blocks.columns // WIDTH, 1), None
    if backward:
        of_step, spans = tpu_windows.backward_plan(layout.length, heads, 1, WIDTH, blocks, 2, table.dq_bytes)
    codes = tile_codes(layout, blocks.q, blocks.k, spans)
    kinds = codes & TileCode.KIND
    full, partial, dirty = costs.tiles
    which = [kinds == kind for kind in (FULL, PARTIAL, DIRTY)]
    cycles = np.select(which, costs.tiles, costs.idle).astype(float)
    inner, outer = (TileCode.FIRST, TileCode.LAST), (TileCode.OPEN, TileCode.CLOSE)
    flags = (outer[0], *inner, outer[1]) if backward else inner
    for flag, extra in zip(flags, (*costs.before, *costs.after), strict=True):
        cycles += extra * (codes & flag != 0)

    chip = known_tpu(kernel.device_kind)
    cores = kernel.cores if kernel.parallel else 1
    per_cycle = chip.bandwidth / chip.cores / chip.ghz / 1e9  # bytes per cycle of one core's share of HBM
    # Every step reads two operands on the side that it walks. On the other side a group reads and writes arrays once: q
    # and out in the forward pass, k, v, dk and dv in the backward pass.
    walked, kept = (blocks.q, 4 * blocks.k) if backward else (blocks.k, 2 * blocks.q)
    first = codes & TileCode.FIRST != 0
    stop = blocks.k * LANES * 4 * (first if backward else 1)  # a register row for every key
    dma = ((2 * walked + kept * first) * 2 * of_step * WIDTH + stop) / per_cycle
    turns = math.ceil(heads // of_step / cores)  # the cores share the groups of heads
    matrix = np.select(which, costs.matrix, 0.0)
    to_seconds = turns / chip.ghz / 1e9
    return Cost(
        block=(blocks.q, blocks.k),
        seconds=float(np.maximum(cycles, dma).sum() * to_seconds),
        matrix_seconds=float(matrix.sum() * to_seconds),
        full_tile_cycles=full / of_step,
        partial_tile_cycles=partial / of_step,
        dirty_tile_cycles=dirty / of_step,
        spills=costs.spills[0] / of_step,
        vmem_bytes=costs.vmem_bytes,
    )


def best_splash(layout: Layout, measured: list[tuple[Compiled, TileCosts]]) -> Cost:
    """Returns the cheapest of `SPLASH_BLOCKS` for one pass on one layout."""
    blocks = [block for block, _ in SPLASH_BLOCKS]
    costs = [splash_cost(layout, *kernel, block) for kernel, block in zip(measured, blocks, strict=True)]
    return min(costs, key=lambda cost: cost.seconds)


def splash_cost(layout: Layout, kernel: Compiled, costs: TileCosts, block: int) -> Cost:
    """Returns the cost of splash: it computes every tile of the causal triangle, and every other tile is a step of the
    grid. DMA is not counted."""
    n = -(-layout.length // block)
    live = n * (n + 1) // 2
    cycles = live * costs.tiles[0] + (n * n - live) * costs.idle + n * (sum(costs.before) + sum(costs.after))
    cores = kernel.cores if kernel.parallel else 1
    to_seconds = layout.rows * HEADS / cores / known_tpu(kernel.device_kind).ghz / 1e9
    return Cost(
        block=(block, block),
        seconds=cycles * to_seconds,
        matrix_seconds=live * costs.matrix[0] * to_seconds,
        full_tile_cycles=costs.tiles[0],
        partial_tile_cycles=costs.tiles[0],
        dirty_tile_cycles=costs.tiles[0],
        spills=costs.spills[0],
        vmem_bytes=costs.vmem_bytes,
    )


def tile_codes(layout: Layout, block_q: int, block_k: int, spans: int | None) -> np.ndarray:
    """Returns the list of tiles that the kernel would walk for a layout."""

    @jax.jit
    def made(start: jax.Array, stop: jax.Array) -> tuple[jax.Array, jax.Array]:
        start, stop = padded_vectors(IntervalMask(start, stop), (spans or 1) * block_q, block_k)
        tiles = tpu_tiles.tiles_to_walk(start, stop, 0, block_q, block_k, spans)
        return tiles.codes, tiles.count

    codes, count = made(layout.start, layout.stop)
    return np.asarray(codes)[: int(count)]
