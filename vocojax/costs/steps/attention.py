"""Seconds of a step's kernels on typical rows of a stage, by the static cost of the kernels' own code."""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from vocojax.costs.kernels import gpu, report, tpu
from vocojax.costs.kernels.layouts import Layout
from vocojax.costs.kernels.tpu import Job
from vocojax.costs.rows import LetterTokenizer, Rows, typical_rows
from vocojax.devices import GPUS
from vocojax.kernels.interval_attention import IntervalMask, gpu_blocks
from vocojax.kernels.interval_attention.block_info import FULL, PARTIAL, block_kinds, padded_vectors
from vocojax.kernels.rotary import pallas_tpu as rotary_tpu
from vocojax.layout import Visibility, lay_out_unit, unit_shape
from vocojax.models.image_chunks import chunk_size
from vocojax.parallel.mesh import MeshConfig
from vocojax.training import objectives
from vocojax.training.config import StageConfig
from vocojax.training.flops import visible_pairs

ROWS = 64  # typical rows whose mean stands for all
COMPILED_ROWS = 8  # rows that a kernel is compiled for; its code is the same for any number
MXU_SHARE = 0.4  # of the peak that attention is taken to reach if there is no static cost


def stage_rows(config: StageConfig, visibility: Visibility) -> Rows:
    """Returns typical rows of a stage's shape."""
    data = config.data
    return typical_rows(
        ROWS, data.row_length, data.images_per_row, unit_shape(config.model), visibility, data.pack_window)


def stage_targets(config: StageConfig, rows: Rows) -> float:
    """Returns the targets of a mean row: its text, which is the most that a conversation has, if there are slots."""
    return min(config.data.target_slots, rows.text)


def head_chunks(config: StageConfig, rows: int) -> tuple[int, int]:
    """Returns how many chunks of target slots the typical rows of one device fill, and how many there are."""
    slots = (row_counts(config).targets, config.data.target_slots)
    filled, all_of_them = (math.ceil(rows * each / objectives.CHUNK) for each in slots)
    return filled, all_of_them


def image_chunks(config: StageConfig, rows: int, kind: str) -> tuple[int, int]:
    """Returns how many chunks of images the typical rows of one device of this kind fill, and how many there are."""
    slots = config.data.images_per_row
    size = chunk_size(rows, slots, kind)
    filled = rows * (row_counts(config).images if config.plan == "single_pass" else slots)
    return math.ceil(filled / size), rows * slots // size


class RowCounts(NamedTuple):
    """The contents of a mean row, units included, whichever plan runs it.

    Attributes:
      tokens: padding counts where rows hold whole samples.
      targets: of its text.
      images: its units.
      pairs: of a query and a key that it sees.
      teacher_pairs: the same through the causal mask.
    """

    tokens: float
    targets: float
    images: float
    pairs: float
    teacher_pairs: float


def row_counts(config: StageConfig) -> RowCounts:
    """Returns the counts of a stage's rows: one video and its text per row in a stage of videos, else typical rows."""
    if is_of_videos(config):
        return _video_counts(config)
    rows, causal = stage_rows(config, config.visibility), stage_rows(config, "causal")
    mean_pairs = lambda rows: visible_pairs(rows.start, rows.stop) / len(rows.start)
    return RowCounts(config.data.row_length, stage_targets(config, rows), rows.images, mean_pairs(rows),
                     mean_pairs(causal))


def is_of_videos(config: StageConfig) -> bool:
    """Returns whether any of a stage's sources has videos."""
    sources = {config.data.source} if not config.data.mixture else {part.source for part in config.data.mixture}
    return bool(sources & {"webvid", "video_chatgpt"})


def _video_counts(config: StageConfig) -> RowCounts:
    """Returns the counts of a row that `data.images_per_row` frames and one text of the remaining tokens fill."""
    units, unit = config.data.images_per_row, unit_length(config)
    text = config.data.row_length - (units * unit if config.plan == "single_pass" else 0)
    tokens = units * unit + text
    seen = units * unit_shape(config.model).vocos
    pairs = units * unit * (unit + 1) / 2 + text * seen + text * (text + 1) / 2
    causal = tokens * (tokens + 1) / 2
    targets = min(config.data.target_slots, text)
    return RowCounts(tokens, targets, units, causal if config.visibility == "causal" else pairs, causal)


def unit_length(config: StageConfig) -> int:
    """Returns the tokens of a unit, with a newline of one token."""
    return len(lay_out_unit("unit", LetterTokenizer(config.model.voco.token_id), unit_shape(config.model)))


def gpu_kernel_seconds(config: StageConfig, kind: str, rows: int) -> dict[str, float]:
    """Returns the seconds of one call of each kernel on `rows` rows, by the kernel's name, for a GPU.

    A tile costs what bounds the loop over tiles of its kind, and tiles are spread evenly over the cores. Latency and
    the tail are left out, so this is a lower bound.

    Args:
      config: the stage.
      kind: a key of `devices.GPUS`.
      rows: per device.

    Raises:
      FileNotFoundError: ptxas or nvdisasm is not installed.
    """
    decoder, layout, target = config.model.decoder, stage_rows(config, config.visibility), GPUS[kind]
    architecture = gpu_blocks.architecture(target.device_kind)
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
        cycles = ((kinds == FULL).sum() * full + (kinds == PARTIAL).sum() * partial) / ROWS
        seconds[f"interval_attention_{name}"] = float(heads * width * cycles / target.cores / target.ghz / 1e9)
    return seconds


@functools.cache
def _gpu_loops(kind: str) -> dict[str, list[gpu.Loop]]:
    gpu.tool("ptxas"), gpu.tool("nvdisasm")  # before anything is compiled
    return {name: kernel.loops for name, kernel in gpu.kernels(kind, "ours").items()}


def kernel_seconds(config: StageConfig, topology: str, rows: int) -> dict[str, float]:
    """Returns the seconds of one call of each kernel on `rows` rows, by the kernel's name, for a TPU.

    `rotary` is the mean of a call on queries and a call on keys, of which there are as many. Its tables count as if
    `tensor` cut them like the heads.

    Args:
      config: the stage.
      topology: its generation counts.
      rows: per device.
    """
    decoder = config.model.decoder
    # Whatever makes no difference to a row of one head has one value, so that it is compiled once.
    per_head = dataclasses.replace(config.model, decoder=dataclasses.replace(decoder, num_kv_heads=decoder.num_heads))
    alike = dataclasses.replace(config, model=per_head, remat="full", accumulate=1, mesh=MeshConfig())
    mean_call = {"rotary": (1 + decoder.num_kv_heads / decoder.num_heads) / 2}
    each = _mean_row(alike, topology.partition(":")[0], decoder.num_heads // config.mesh.tensor)
    return {name: seconds * rows * mean_call.get(name, 1) for name, seconds in each.items()}


@functools.cache
def _mean_row(config: StageConfig, kind: str, heads: int) -> dict[str, float]:
    """Returns the seconds per typical row of each kernel with so many heads, on one chip."""
    layout = Layout.of("typical rows", stage_rows(config, config.visibility))
    alone = f"{kind}:1x1" if kind in ("v5e", "v6e") else f"{kind}:1x1x1"
    shape = layout.length, COMPILED_ROWS, heads, config.model.decoder.head_width
    jobs = [Job("ours", *shape)] + [Job("rotary", *shape)] * rotary_tpu.takes(*shape[2:])
    with tempfile.TemporaryDirectory() as folder:
        passes, *rotary = tpu.compile_jobs(alone, jobs, folder)
        kernels = functools.reduce(dict.__or__, rotary, passes)
        seconds = {name: tpu.streaming_seconds(kernel) / COMPILED_ROWS
                   for name, kernel in kernels.items() if kernel.steps}
        walks = zip(("forward", "backward"), report.tile_costs(layout, passes, heads), strict=True)
        return seconds | {f"interval_attention_{name}": cost.seconds / ROWS for name, cost in walks}
