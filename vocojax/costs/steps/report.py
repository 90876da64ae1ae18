"""Whether a stage fits a topology, how long its step takes there, and what bounds it: `launch/compile_report.py`."""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import dataclass
from typing import Any

from vocojax.costs import hlo
from vocojax.costs.steps import attention
from vocojax.costs.steps.compiling import Compiled, compile_step
from vocojax.costs.steps.program import Costs, add_up
from vocojax.costs.topologies import Topology
from vocojax.devices import GPUS, known_tpu, peak_flops
from vocojax.training.config import StageConfig

LOG = logging.getLogger(__name__)
_SENT = {"all-reduce": 2}  # how often a collective's bytes pass through a device's links


@dataclass(frozen=True)
class Device:
    """What bounds a device of a topology.

    Attributes:
      memory: bytes of HBM.
      flops: peak FLOP/s.
      bandwidth: bytes per second of HBM.
      interconnect: bytes per second of its links to other devices.
      hertz: clock.
      network: bytes per second between it and other slices.
    """

    memory: int
    flops: float
    bandwidth: float
    interconnect: float
    hertz: float
    network: float = math.inf

    @classmethod
    def of(cls, topology: Topology, compiled: Compiled) -> Device:
        """Returns the device that a step was compiled for; a core of a split chip has its share of it."""
        if topology.is_gpu:
            gpu = GPUS[topology.kind]
            peak = peak_flops(gpu.device_kind) or math.nan
            return cls(gpu.memory, peak, gpu.bandwidth, gpu.interconnect, gpu.ghz * 1e9)
        chip = known_tpu(compiled.device_kind)
        share = compiled.cores / chip.cores
        return cls(int(chip.memory * share), chip.flops * share, chip.bandwidth * share,
                   chip.interconnect * share, chip.ghz * 1e9, chip.network * share)


def compile_report(config: StageConfig, topology: Topology, *, fast: bool = False) -> dict[str, Any]:
    """Compiles a stage's step for a topology and reports on it, as a dict that JSON can hold.

    Its keys are, among others:

      fits: whether the program's memory is there.
      tokens_per_device: of a step.
      estimated_seconds: of a step. Computation by XLA's own cycle counts (with `fast` and on GPUs by a roofline),
        kernels by their static cost, the collectives that nothing hides, and what slices exchange.
      mfu_bound: model FLOPs over what the chip could do in that time. Rows count as full, as in tokens per second.
      hbm_bytes_per_device: by kind; they add up to `peak_bytes`.
      collective_bytes: by kind, inside a slice; `synchronous_bytes` are those of them that nothing hides.
      between_slices_bytes: by kind.
      seconds: by resource; `interconnect` at the rate of a collective over the whole torus.
      scope_seconds: by part of the model.
      head_chunks: chunks of target slots that typical rows fill, in a part of the batch. The head is priced by them.
      target_chunks: chunks that all target slots of these rows make.
      image_chunks: chunks of images that typical rows fill, likewise. The vision tower is priced by them.
      slot_chunks: chunks that all slots for images make.
      error: what the compiler said if it gave up.

    Raises:
      ConfigError: as `compile_step`.
      CompilerError: as `compile_step`.
      Unfinished: as `compile_step`.
    """
    implementation = "pallas_gpu" if topology.is_gpu else "pallas_tpu"
    config = dataclasses.replace(
        config, attention=config.attention or implementation, mesh=topology.whole(config.mesh))
    compiled = compile_step(config, topology, fast=fast)
    known = {"topology": topology.name, "remat": config.remat, "accumulate": config.accumulate,
             "mesh": dataclasses.asdict(config.mesh), "batch_size": config.batch_size}
    device = Device.of(topology, compiled)
    ways = compiled.devices // config.mesh.tensor
    rows = config.batch_size // config.accumulate // ways
    tokens = int(config.batch_size * attention.row_counts(config).tokens) // compiled.devices
    report: dict[str, Any] = known | {
        "devices": compiled.devices, "device_kind": compiled.device_kind, "rows_per_device": rows,
        "tokens_per_device": tokens, "hbm_limit": device.memory, "error": compiled.error,
        "compiler": {"cpu_seconds": compiled.cpu_seconds, "memory_gib": compiled.memory_gib, "fast": fast},
        **memory(compiled, device),
    }
    if not compiled.hlo:
        return report | {"estimated_seconds": None, "mfu_bound": None, "collective_bytes": {}}
    report["head_chunks"], report["target_chunks"] = attention.head_chunks(config, rows)
    report["image_chunks"], report["slot_chunks"] = attention.image_chunks(
        config, rows, compiled.device_kind)
    filled = {"head": report["head_chunks"], "vision": report["image_chunks"]}
    costs = add_up(hlo.parse(compiled.hlo, filled), compiled.devices)
    attention_seconds = _attention(config, topology, costs, device, rows)
    return report | estimate(costs, device, compiled, tokens, attention_seconds, topology.slices)


def memory(compiled: Compiled, device: Device) -> dict[str, Any]:
    """Returns the bytes of each kind of array on a device; temporaries are all that XLA adds to the arguments."""
    held = {kind: size for kind, size in compiled.held.items() if size}
    if compiled.peak is None:
        return {"fits": False, "hbm_bytes_per_device": held, "peak_bytes": None}
    kinds = held | {"temporaries": compiled.peak - sum(held.values())}
    return {"fits": not compiled.error and compiled.peak <= device.memory, "hbm_bytes_per_device": kinds,
            "peak_bytes": compiled.peak}


def estimate(
    costs: Costs, device: Device, compiled: Compiled, tokens: int, attention_seconds: float, slices: int = 1
) -> dict[str, Any]:
    """Adds up the seconds of a step and returns what follows from them."""
    source = "estimated_cycles" if costs.cycles.total() else "roofline"
    scopes = (
        {scope: cycles / device.hertz for scope, cycles in costs.cycles.items()} if source == "estimated_cycles"
        else costs.roofline_seconds(device.flops, device.bandwidth)
    )
    compute = sum(scopes.values())
    waits = {scope: moved / device.interconnect for scope, moved in costs.waits.items()}
    # Every slice gets the sums of all others in a ring. Nothing of it counts as hidden: the optimizer waits for the
    # norm of the whole gradient.
    turns = {"all-reduce": 2 * (slices - 1) / slices}
    exchange = sum(turns.get(kind, 1) * moved for kind, moved in costs.between_slices.items()) / device.network
    # What runs at the same time as computation is hidden by it, if the computation takes as long.
    beside = sum(_SENT.get(kind, 1) * moved for kind, moved in costs.asynchronous.items()) / device.interconnect
    waits["other"] = waits.get("other", 0.0) + max(0.0, beside - compute - attention_seconds)
    seconds = compute + attention_seconds + sum(waits.values()) + exchange
    scopes["decoder"] = scopes.get("decoder", 0.0) + attention_seconds
    scopes = {scope: scopes.get(scope, 0.0) + waits.get(scope, 0.0) for scope in {*scopes, *waits}}
    if exchange:
        scopes["between slices"] = exchange
    vision = scopes.get("vision", 0.0)
    kinds = {*costs.synchronous, *costs.asynchronous}
    return {
        "estimated_seconds": seconds,
        "estimated_from": source,
        "mfu_bound": compiled.model_flops / compiled.devices / device.flops / seconds,
        "tokens_per_second_per_device": tokens / seconds,
        "decoder_tokens_per_second_per_device": tokens / (seconds - vision),
        "vision_share": vision / seconds,
        "seconds": {"compute": compute, "attention": attention_seconds, "interconnect": sum(waits.values()),
                    "hidden_interconnect": beside, "between_slices": exchange,
                    "hbm_traffic": costs.hbm_bytes / device.bandwidth},
        "scope_seconds": dict(sorted(scopes.items(), key=lambda entry: -entry[1])),
        "collective_bytes": {kind: costs.synchronous[kind] + costs.asynchronous[kind] for kind in sorted(kinds)},
        "synchronous_bytes": dict(sorted(costs.synchronous.items())),
        "between_slices_bytes": dict(sorted(costs.between_slices.items())),
        "flops": costs.flops,
        "hbm_traffic_bytes": costs.hbm_bytes,
        "kernel_calls": dict(costs.kernels),
    }


def _attention(config: StageConfig, topology: Topology, costs: Costs, device: Device, rows: int) -> float:
    """Returns the seconds of all kernels of a step, calls that rematerialisation repeats included."""
    if costs.kernels and not attention.is_of_videos(config):
        try:
            each = (attention.gpu_kernel_seconds(config, topology.kind, rows) if topology.is_gpu
                    else attention.kernel_seconds(config, topology.name, rows))
            return sum(calls * each[name] for name, calls in costs.kernels.items())
        except FileNotFoundError as missing:
            LOG.warning("attention is estimated by its FLOPs: %s", missing)
    decoder = config.model.decoder
    pairs = rows * attention.row_counts(config).pairs * decoder.num_heads / config.mesh.tensor
    forwards = 1 if config.remat in ("none", "attention_out") else 2
    flops = (4 * forwards + 10) * pairs * decoder.head_width * decoder.depth * config.accumulate
    return flops / (attention.MXU_SHARE * device.flops)
