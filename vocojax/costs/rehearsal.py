"""A rehearsal of a run on a machine that is not there: data, step, memory, input, checkpoints, hours and cost."""

from __future__ import annotations

import dataclasses
import os
import secrets
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vocojax.costs.prices import costs_line, run_costs
from vocojax.costs.steps.attention import row_counts
from vocojax.costs.steps.report import compile_report
from vocojax.costs.topologies import Topology
from vocojax.data.checking import check
from vocojax.data.loader import BatchStream
from vocojax.files import is_remote
from vocojax.parallel.mesh import MeshConfig, make_mesh
from vocojax.runs.directory import run_path
from vocojax.training.config import StageConfig
from vocojax.training.plan import views
from vocojax.training.program import make_program

GB = 1e9
WRITTEN = 256 * 2**20  # bytes that are written to measure a directory
DRAINED = 0.2  # share of the measurement in which batches that were made ahead are taken and not counted


@dataclasses.dataclass(frozen=True)
class MeanRow:
    """The contents of a packed row on average.

    Attributes:
      origin: where the figures are from.
      records: of the data; 0 if it was not read.
      samples: of a row; 0 if the data was not read.
      images: of a row: images, tiles and frames.
      fill: share of a row's tokens that is no padding; 0 if that is not known.
      bad: share of the records looked at that can't be used.
    """

    origin: str
    records: int
    samples: float
    images: float
    fill: float
    bad: float = 0.0


def rehearse(
    config: StageConfig, topology: Topology, *, has_data: bool, price: float = 0.0, gb_per_second: float = 0.0,
    fast: bool = False, records: int = 2000, seconds: float = 10.0,
) -> dict[str, Any]:
    """Returns the figures of a run, as a dict that JSON can hold; `page` shows them.

    Args:
      config: of the stage.
      topology: the machine.
      has_data: whether the stage's data and tokenizer are there, to be packed and read. Typical rows stand for them
        where they are not.
      price: dollars per chip and hour; 0 if it is not known.
      gb_per_second: at which checkpoints are written; 0 if it is not known.
      fast: see `compile_report`.
      records: how many are laid out, evenly spread.
      seconds: how long batches are made to measure the rate of the input.

    Raises:
      ConfigError: the stage does not fit the topology, or its data can't be read.
      CompilerError: the compiler can't be used.
    """
    row, made = _look_at_data(config, topology.hosts, records, seconds) if has_data else (_typical_row(config), None)
    report = compile_report(config, topology, fast=fast)
    step, images = report["estimated_seconds"], config.batch_size * row.images
    checkpoint, frozen = checkpoint_bytes(config)
    figures: dict[str, Any] = {
        "stage": config.name, "topology": topology.name, "devices": report["devices"], "hosts": topology.hosts,
        "data": dataclasses.asdict(row),
        "samples_per_step": config.batch_size * row.samples,
        "epochs": config.steps * config.batch_size * row.samples / row.records if row.records else None,
        "images_per_second_per_host": {
            "needed": images / step / topology.hosts if step else None, "made_here": made,
            "cores_here": os.cpu_count() or 1},
        "checkpoint": {
            "bytes": checkpoint, "frozen_bytes": frozen, "gb_per_second": gb_per_second or None,
            "seconds": checkpoint / GB / gb_per_second if gb_per_second else None,
            "seconds_between": _seconds_between(config, step) if step else None},
        "run": run_costs(report, config.steps, price),
        "report": report,
    }
    return figures


def checkpoint_bytes(config: StageConfig) -> tuple[int, int]:
    """Returns the bytes of a checkpoint, and those of the frozen parameters, which a run writes once."""
    alone = dataclasses.replace(config, mesh=MeshConfig(), accumulate=1)
    state = make_program(alone, make_mesh(MeshConfig(), jax.devices("cpu")[:1])).abstract_state
    size = lambda tree: sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
    return size((state.trained, state.optimizer, state.ema)), size(state.frozen)


def measured_gb_per_second(workdir: str | Path) -> float:
    """Writes a file to a run's directory, removes it again, and returns how many GB per second that was.

    One writer is measured. Several hosts write their own parts at once, which is faster where the storage is.

    Raises:
      OSError: the directory can't be written.
    """
    path = run_path(workdir)
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    file, content = path / f".rehearsal-{secrets.token_hex(4)}", secrets.token_bytes(WRITTEN)
    try:
        before = time.perf_counter()
        with file.open("wb") as stream:
            stream.write(content)
            if not is_remote(path):
                stream.flush()
                os.fsync(stream.fileno())
        return WRITTEN / GB / (time.perf_counter() - before)
    finally:
        file.unlink(missing_ok=True)
        if is_new:
            path.rmdir()


def page(figures: dict[str, Any]) -> str:
    """Returns a rehearsal as a page for the terminal."""
    report, row, run = figures["report"], figures["data"], figures["run"]
    step = report["estimated_seconds"]
    peak = report["peak_bytes"]
    lines = {
        "machine": f"{figures['devices']} x {report['device_kind']} on {figures['hosts']} "
                   f"host{'s' * (figures['hosts'] > 1)}",
        "data": _data_line(row),
        "step": f"not compiled: {report['error']}",
        "memory": "unknown" if peak is None else f"{_size(peak)} of {_size(report['hbm_limit'])} per device: "
                  f"{'fits' if report['fits'] else 'DOES NOT FIT; raise accumulate, or see `vocojax report --search`'}",
        "input": _input_line(figures["images_per_second_per_host"]),
        "checkpoint": _checkpoint_line(figures["checkpoint"]),
        "run": costs_line(run) if run else "unknown: the step was not compiled",
    }
    if step:
        samples = f", {figures['samples_per_step']:,.0f} samples" if row["samples"] else ""
        epochs = f", {figures['epochs']:.2f} epochs in all" if figures["epochs"] else ""
        lines["step"] = (f"{step:.3g} s by {report['estimated_from']}, at best {report['mfu_bound']:.1%} MFU and "
                         f"{report['tokens_per_second_per_device']:,.0f} tokens/s per device{samples}{epochs}")
    width = max(map(len, lines))
    return "\n".join([
        f"{figures['stage']} on {figures['topology']}", *(f"  {name:{width}}  {text}" for name, text in lines.items()),
        "  In no sum: compiling, waiting for data, validation, the last checkpoint, interruptions. The step is an",
        "  estimate of the compiled program; `vocojax report` shows what it is made of.",
    ])


def _look_at_data(config: StageConfig, hosts: int, records: int, seconds: float) -> tuple[MeanRow, float]:
    """Packs some of a stage's records and makes batches of them; returns a mean row and images per second."""
    data = dataclasses.replace(config.data, keep_in_memory=False)
    stream = BatchStream(config.model, data, config.batch_size, config.seed, *views(config), process_count=hosts,
                         plan=config.plan)
    try:
        made = _images_per_second(stream, config, seconds)
        report = check(stream, data.num_threads, decodes=False, limit=min(records, stream.records))
    finally:
        stream.close()
    row = MeanRow(
        f"{report.records:,} of the stage's {stream.records:,} records, laid out and packed", stream.records,
        report.samples_per_row, report.images_per_row, report.fill, len(report.bad) / max(report.records, 1))
    return row, made


def _images_per_second(stream: BatchStream, config: StageConfig, seconds: float) -> float:
    """Returns the images per second of a stream's batches, those that were made ahead left out."""
    next(stream)
    began = time.perf_counter()
    while time.perf_counter() - began < DRAINED * seconds:
        next(stream)
    began, images = time.perf_counter(), 0
    while images == 0 or time.perf_counter() - began < seconds:
        batch = next(stream)
        images += int((batch["unit_slot"] >= 0).sum() if config.plan == "two_stage"
                      else (batch["vision"] >= 0).sum() // config.model.unit_tokens)
    return images / (time.perf_counter() - began)


def _typical_row(config: StageConfig) -> MeanRow:
    return MeanRow("typical rows: the config names no data and tokenizer", 0, 0.0, row_counts(config).images, 0.0)


def _seconds_between(config: StageConfig, step: float) -> float:
    """Returns the seconds from one checkpoint to the next."""
    by_steps = min(config.checkpoint.every, config.steps) * step
    return min(by_steps, 60 * config.checkpoint.minutes) if config.checkpoint.minutes else by_steps


def _data_line(row: dict[str, Any]) -> str:
    if not row["records"]:
        return f"{row['origin']}, {row['images']:.2f} images per row"
    bad = f"; {row['bad']:.1%} of them can't be used (`vocojax check_data` names them)" if row["bad"] else ""
    return (f"{row['origin']}: rows {row['fill']:.1%} full with {row['samples']:.2f} samples and {row['images']:.2f} "
            f"images{bad}")


def _input_line(rate: dict[str, Any]) -> str:
    needed, made, cores = rate["needed"], rate["made_here"], rate["cores_here"]
    needs = "unknown without a step" if needed is None else f"{needed:,.1f} images/s per host are needed"
    if made is None:
        return f"{needs}; name data and tokenizer to measure what this machine makes"
    here = f"this machine makes {made:,.1f} with {cores} core{'s' * (cores > 1)}"
    if needed is None or not needed:
        return f"{needs}; {here}"
    if made >= needed:
        return f"{needs}; {here}: enough"
    return (f"{needs}; {here}: TOO FEW, about {cores * needed / made:,.0f} such cores per host are enough "
            "(or shards of `vocojax prepare_data`)")


def _checkpoint_line(checkpoint: dict[str, Any]) -> str:
    text = f"{_size(checkpoint['bytes'])}, and once {_size(checkpoint['frozen_bytes'])} of frozen parameters"
    seconds, between = checkpoint["seconds"], checkpoint["seconds_between"]
    if between is not None:
        text += f"; one is due every {between:,.3g} s"
    if seconds is None:
        return f"{text}; --gb_per_second=N, or --workdir to measure it, adds the time"
    text += f" and takes {seconds:,.3g} s at {checkpoint['gb_per_second']:.3g} GB/s, while training continues"
    if between is not None and seconds > between:
        text += ": TOO SLOW, the run waits for it; raise checkpoint.every and checkpoint.minutes"
    return text


def _size(count: float) -> str:
    return f"{count / GB:,.2f} GB" if count >= GB else f"{count / 1e6:,.2f} MB"
