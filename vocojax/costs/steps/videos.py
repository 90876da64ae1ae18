"""The memory and time of a stage of videos by the number of frames, for both plans: `compile_report.py --frames`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, get_args

from vocojax.config import ConfigError
from vocojax.costs.steps.attention import is_of_videos, unit_length
from vocojax.costs.steps.report import compile_report
from vocojax.costs.topologies import Topology
from vocojax.data.config import Plan
from vocojax.training.config import StageConfig

LANES = 128  # rows of whole samples are a multiple of this, so that kernels have no ragged block
MB = 1e6


def frames_report(
    config: StageConfig, topology: Topology, frames: Sequence[int], *, fast: bool = False
) -> list[dict[str, Any]]:
    """Compiles a stage for each number of frames per row, in both plans.

    Args:
      config: of the stage; `data.row_length` is the text of a row.
      topology: the machine.
      frames: numbers of frames, rising. Larger ones than the first that does not fit are not compiled.
      fast: stop at the scheduled program, see `compile_step`.

    Returns:
      What `compile_report` returns, and `plan` and `frames`.

    Raises:
      ConfigError: the stage is not one of videos.
    """
    if not is_of_videos(config):
        raise ConfigError("data.source", f"must be a source of videos for --frames, got {config.data.source!r}")
    reports = []
    for plan in get_args(Plan):
        for count in sorted(frames):
            report = compile_report(with_frames(config, plan, count), topology, fast=fast)
            reports.append({"plan": plan, "frames": count, **report})
            if not report["fits"]:
                break
    return reports


def with_frames(config: StageConfig, plan: Plan, frames: int) -> StageConfig:
    """Returns a stage whose rows hold one video of this many frames and its text."""
    length = config.data.row_length
    if plan == "single_pass":
        length = math.ceil((length + frames * unit_length(config)) / LANES) * LANES
    data = dataclasses.replace(config.data, frames=frames, images_per_row=frames, row_length=length,
                               max_targets=config.data.target_slots)
    return dataclasses.replace(config, plan=plan, data=data)


def kept_per_frame(config: StageConfig) -> float:
    """Returns the bytes that a frame must have: its VoCo tokens' keys and values, and its pixels."""
    decoder, side = config.model.decoder, config.model.vision.image_size
    item = 2 if config.dtype == "bfloat16" else 4
    keys = 2 * decoder.depth * decoder.num_kv_heads * decoder.head_width * config.model.unit_vocos * item
    return keys + 3 * side * side


def frames_table(config: StageConfig, reports: Sequence[dict[str, Any]]) -> str:
    """Returns the reports as a table, with what each row adds per frame to the row before it."""
    lines = [f"{'plan':12} {'frames':>7} {'arguments GB':>13} {'temporary GB':>13} {'MB per frame':>13} {'s/step':>8}"]
    before: dict[str, Any] | None = None
    for report in reports:
        kinds = report["hbm_bytes_per_device"]
        arguments = sum(size for kind, size in kinds.items() if kind != "temporaries")
        name = f"{report['plan']:12} {report['frames']:7,} {arguments / 1e9:13.2f}"
        if report["peak_bytes"] is None:
            lines.append(f"{name} {'does not fit':>13}: {report['error'][:200]}")
        else:
            same_plan = before is not None and before["plan"] == report["plan"]
            grown = f"{growth(before, report) / MB:13.2f}" if before is not None and same_plan else f"{'':13}"
            seconds = "" if report["estimated_seconds"] is None else f"{report['estimated_seconds']:8.2f}"
            fits = "" if report["fits"] else "  does not fit"
            lines.append(f"{name} {kinds['temporaries'] / 1e9:13.2f} {grown} {seconds:>8}{fits}")
        before = report
    lines.append(f"a frame's VoCo keys and values and uint8 pixels: {kept_per_frame(config) / MB:.2f} MB")
    lines.append("collectives of a step, two_stage, GB by kind")
    lines += [f"{report['frames']:7,}   " + ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in
                                                     report["collective_bytes"].items())
              for report in reports if report["plan"] == "two_stage"]
    return "\n".join(lines)


def growth(fewer: dict[str, Any], more: dict[str, Any]) -> float:
    """Returns the bytes per device that each further frame of a row takes, between two reports of a plan."""
    return float(more["peak_bytes"] - fewer["peak_bytes"]) / (more["frames"] - fewer["frames"])
