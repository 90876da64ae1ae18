"""Seconds of the attention kernels on rows as a stage packs them, by the static cost of the kernels' own code."""

from __future__ import annotations

import dataclasses
import functools
import tempfile

import jax.numpy as jnp
import numpy as np

from vocojax.costs.kernels import gpu, report, tpu
from vocojax.costs.kernels.gpu_targets import TARGETS
from vocojax.costs.kernels.layouts import Layout
from vocojax.costs.kernels.tpu import Job
from vocojax.kernels.interval_attention import IntervalMask, gpu_blocks
from vocojax.kernels.interval_attention.block_info import FULL, PARTIAL, block_kinds, padded_vectors
from vocojax.kernels.rotary import pallas_tpu as rotary_tpu
from vocojax.parallel.mesh import MeshConfig
from vocojax.training.config import StageConfig

ROWS = 8  # rows of a layout whose mean stands for all
TEXT = (64, 400)  # tokens of a sample's text, as LLaVA's instructions have them
MXU_SHARE = 0.4  # of the peak that attention reaches where no static cost is to be had


def typical_rows(config: StageConfig) -> Layout:
    """Rows of samples with one image and 64 to 400 tokens of text, as many as fit."""
    return _packed(config)[0]


def typical_images(config: StageConfig) -> float:
    """Images of the mean row."""
    return _packed(config)[1] / ROWS


def typical_targets(config: StageConfig) -> float:
    """Target slots of the mean row that are taken, if all its text is learnt, as of a conversation's at most is."""
    return min(config.data.target_slots, _packed(config)[2] / ROWS)


def _packed(config: StageConfig) -> tuple[Layout, int, int]:
    """The rows, their images and tokens of text."""
    length, model = config.data.row_length, config.model
    unit = 2 + model.unit_tokens + model.unit_vocos
    rng = np.random.default_rng(0)
    starts, stops, total, texts = [], [], 0, 0
    for _ in range(ROWS):
        start, stop = np.arange(length, dtype=np.int32), np.arange(length, dtype=np.int32)  # padding
        at = images = 0
        while at + unit + (text := int(rng.integers(*TEXT))) <= length and images < config.data.images_per_row:
            end, middle = at + unit + text, at + unit
            start[at:end], stop[at:end] = at, end
            if config.visibility == "voco":
                stop[at : middle - model.unit_vocos] = middle
            at, images, texts = end, images + 1, texts + text
        starts.append(start)
        stops.append(stop)
        total += images
    return Layout("rows as packed", np.stack(starts), np.stack(stops)), total, texts


def gpu_kernel_seconds(config: StageConfig, kind: str, rows: int) -> dict[str, float]:
    """Seconds of one call of each kernel on `rows` rows of a GPU, by the kernel's name: every tile costs what bounds
    the loop over its kind, spread evenly over the cores. Latency and the tail are left out, so it is a lower bound.

    Raises:
      FileNotFoundError: ptxas or nvdisasm is not installed.
    """
    decoder, layout, target = config.model.decoder, typical_rows(config), TARGETS[kind]
    architecture = gpu_blocks.architecture(target.description)
    table = gpu_blocks.chosen(architecture, 2 * decoder.head_width)
    mask = IntervalMask(jnp.asarray(layout.start), jnp.asarray(layout.stop))
    loops = _gpu_loops(kind)
    width = decoder.head_width / gpu.WIDTH  # of what was compiled
    heads = rows * decoder.num_heads / config.mesh.tensor
    seconds = {}
    for name, blocks in (("forward", table.forward), ("dq", table.dq), ("dkv", table.dkv)):
        padded = padded_vectors(mask, blocks.q, blocks.k)
        kinds = np.asarray(block_kinds(*padded, 0, blocks.q, blocks.k))
        full, partial = (loop.bound for loop in loops[f"interval_attention_{name}"][:2])
        cycles = ((kinds == FULL).sum() * full + (kinds == PARTIAL).sum() * partial) / layout.rows
        seconds[f"interval_attention_{name}"] = float(heads * width * cycles / target.cores / target.ghz / 1e9)
    return seconds


@functools.cache
def _gpu_loops(kind: str) -> dict[str, list[gpu.Loop]]:
    gpu.tool("ptxas"), gpu.tool("nvdisasm")  # before anything is compiled
    return {name: kernel.loops for name, kernel in gpu.kernels(kind, "ours").items()}


def kernel_seconds(config: StageConfig, topology: str, rows: int) -> dict[str, float]:
    """Seconds of one call of each kernel on `rows` rows of a TPU, by the kernel's name. `rotary` is the mean of a call
    on queries and one on keys, of which there are as many; its tables count as if `tensor` cut them like the heads."""
    decoder = config.model.decoder
    alike = dataclasses.replace(config, remat="full", accumulate=1, mesh=MeshConfig())  # same rows for all
    share = rows * decoder.num_heads / config.mesh.tensor / report.HEADS
    mean_call = {"rotary": (1 + decoder.num_kv_heads / decoder.num_heads) / 2}
    each = _mean_row(alike, topology.partition(":")[0])
    return {name: seconds * share * mean_call.get(name, 1) for name, seconds in each.items()}


@functools.cache
def _mean_row(config: StageConfig, kind: str) -> dict[str, float]:
    layout = typical_rows(config)
    alone = f"{kind}:1x1" if kind in ("v5e", "v6e") else f"{kind}:1x1x1"
    shape = layout.length, layout.rows, report.HEADS, config.model.decoder.head_width
    jobs = [Job("ours", *shape)] + [Job("rotary", *shape)] * rotary_tpu.takes(*shape[2:])
    with tempfile.TemporaryDirectory() as folder:
        passes, *rotary = tpu.compile_jobs(alone, jobs, folder)
        kernels = functools.reduce(dict.__or__, rotary, passes)
        seconds = {name: tpu.streaming_seconds(kernel) for name, kernel in kernels.items() if kernel.steps}
        walks = zip(("forward", "backward"), report.tile_costs(layout, passes), strict=True)
        seconds |= {f"interval_attention_{name}": cost.seconds for name, cost in walks}
    return {name: value / layout.rows for name, value in seconds.items()}
