"""The start of a stage: what is checked before anything is compiled, and the banner that says what will run."""

import dataclasses
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vocojax import devices
from vocojax.config import ConfigError
from vocojax.data.config import DataConfig
from vocojax.data.loader import BatchStream
from vocojax.errors import CheckpointError
from vocojax.layout import LayoutError
from vocojax.parallel.mesh import BATCH_AXES
from vocojax.runs.directory import changed_keys, checkpoint_steps, run_config, run_path
from vocojax.training.config import StageConfig
from vocojax.training.optimizer import described_schedule, matches
from vocojax.training.program import Program

LOG = logging.getLogger(__name__)
LOOKS = 200  # records whose words are looked at, evenly spread
SHOWN = 10  # unknown words that are logged
GIB = devices.GIB


@dataclass
class Opened:
    """A stage's stream with its first batch made, so that what is wrong with the data is found before a compilation.

    It takes the stream's place in the loop: its state after the first batch was taken is the stream's.

    Attributes:
      stream: of the stage, after the first batch.
      first: the first batch, until it is taken.
      samples: how many samples of this process's records the first batch holds.
    """

    stream: BatchStream
    first: Mapping[str, np.ndarray] | None
    samples: int

    def __next__(self) -> Mapping[str, np.ndarray]:
        first, self.first = self.first, None
        return next(self.stream) if first is None else first

    def get_state(self) -> dict[str, Any]:
        """Returns the state after the batch that was taken last, as the stream does."""
        return self.stream.get_state()


def open_first(stream: BatchStream) -> Opened:
    """Makes the first batch of a stream.

    Raises:
      SkippedTooMany: too many of its records can't be used.
    """
    before = _samples_read(stream)
    return Opened(stream, next(stream), _samples_read(stream) - before)


def _samples_read(stream: BatchStream) -> int:
    """Returns how many usable records have left the packers' windows so far."""
    state = stream.get_state()
    return sum((packer["position"] - int(number)) // state["packers"] - len(packer["window"])
               - sum(packer["counts"]["skipped"].values()) for number, packer in state["state"].items())


def warn_of_unknown_words(stream: BatchStream) -> None:
    """Logs the first words that the tokenizer does not know, if some of the records that are looked at have any."""
    looked = sorted({index * stream.records // LOOKS for index in range(LOOKS)})
    found: list[list[tuple[str, bool]]] = []
    for record in looked if stream.tokenizer.has_unknown_words else []:
        try:
            found.append(stream.source.unknown_words(record))
        except LayoutError:  # skipped and counted when it is read for training
            continue
    words = list(dict.fromkeys(word for own in found for word, _ in own))
    if words:
        targets = sum(any(is_target for _, is_target in own) for own in found)
        LOG.warning(
            "the tokenizer does not know some words, which all become %s: %s%s (%d of the %d records that were looked "
            "at have such words, %d in an answer); use a tokenizer that knows them; vocojax check_data counts all",
            stream.tokenizer.huggingface.unk_token, ", ".join(words[:SHOWN]), ", ..." * (len(words) > SHOWN),
            sum(map(bool, found)), len(found), targets)


def check_new(config: StageConfig, program: Program) -> None:
    """Raises `ConfigError` if a regex of `init_new` matches no parameter."""
    for pattern in config.init_new:
        if not any(matches(name, (pattern,)) for name in program.abstract_parameters):
            raise ConfigError("init_new", f"has the regex {pattern!r}, which matches no parameter: names are those of "
                              "parameters.txt in a run's directory, such as projector/linear_in/kernel")


def banner(config: StageConfig, workdir: str | Path, program: Program, opened: Opened, first_step: int,
           processes: int) -> str:
    """Returns what a start will do, in a few lines.

    Args:
      config: of the stage.
      workdir: the run's directory.
      program: of the stage.
      opened: its stream, with the first batch.
      first_step: the steps that were taken before.
      processes: how many share a batch.
    """
    model, first = program.abstract_parameters, opened.first or {}
    count = {name: math.prod(leaf.shape) for name, leaf in model.items()}
    trained = sum(count[name] for name in program.multipliers)
    tokens, filled = config.batch_size * config.data.row_length, int(first["num_tokens"].sum()) * processes
    samples, records = opened.samples * processes, opened.stream.records
    steps = config.steps - first_step
    lines = {
        f"stage {config.name}": f"{f'resumes after step {first_step:,}' if first_step else 'starts'}, {steps:,} of "
                                f"{config.steps:,} steps to go, in {workdir}",
        "devices": _devices(program),
        "parameters": f"{sum(count.values()):,}: {trained:,} train, {sum(count.values()) - trained:,} are frozen",
        "memory": _memory(config, program),
        "step": f"{config.batch_size} rows x {config.data.row_length:,} tokens in {config.accumulate} part"
                f"{'s' * (config.accumulate > 1)}: {tokens:,} tokens; the first batch is {filled / tokens:.1%} full, "
                f"with {samples:,} samples",
        "optimizer": _optimizer(config, first_step),
        "epochs": f"{steps:,} steps read about {steps * samples / max(records, 1):.2f} times the {records:,} records",
        "data": _data(config.data),
        "tokenizer": f"{config.data.tokenizer}, {len(opened.stream.tokenizer):,} tokens",
        "template": config.data.template,
        "weights": _weights(config, first_step, workdir),
    }
    if config.distill.teacher:
        lines["teacher"] = config.distill.teacher
    if config.validation.every:
        held_out = config.validation
        lines["validation"] = (f"every {held_out.every:,} steps, {held_out.batches} batches of {held_out.source} "
                               f"{held_out.path or held_out.split}")
    if config.validation.ask_every:
        asked = config.validation
        names = ", ".join(asked.benchmarks) or "no benchmark"
        lines["questions"] = (f"every {asked.ask_every:,} steps, {len(asked.prompts)} prompts and about "
                              f"{asked.questions:,} questions of each of {names}")
    lines["programs"] = f"compiled ones are kept in {config.run.compilation_cache or 'memory only'}"
    width = max(map(len, lines))
    return "\n".join(f"  {name:{width}}  {text}" for name, text in lines.items())


def newest_step(config: StageConfig, workdir: str | Path, extend: bool = False) -> int:
    """Returns the step of the newest checkpoint in a directory; 0 if there is none.

    Raises:
      CheckpointError: they are of a run with another config.
    """
    steps = checkpoint_steps(run_path(workdir))
    if steps and (changed := changed_keys(run_config(workdir), config, extend)):
        raise CheckpointError(f"{workdir} holds a run with another config (differing: {', '.join(changed)}): use the "
                              "run's own config, or another --workdir")
    return max(steps, default=0)


def extension(config: StageConfig, saved: Mapping[str, Any], first_step: int) -> str:
    """Returns what an extended run's schedule is; '' if the run's steps are those that its checkpoint was saved with.

    Args:
      config: of the stage.
      saved: the config in the checkpoint.
      first_step: the steps that were taken before.
    """
    before = saved.get("steps", config.steps) if isinstance(saved, Mapping) else config.steps
    if before == config.steps:
        return ""
    return (f"extends the run from {before} to {config.steps} steps. Its learning rate is now that of a run of "
            f"{config.steps} steps: {described_schedule(config.optimizer, config.steps, first_step + 1)}")


def _devices(program: Program) -> str:
    mesh, first = program.mesh, program.mesh.devices.flat[0]
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    is_chosen = first.platform != "cpu" or bool(os.environ.get("JAX_PLATFORMS"))
    alone = "" if is_chosen else "; no accelerator was found"
    return f"{mesh.size} x {first.device_kind} of {jax.process_count()} process{'es' * (jax.process_count() > 1)}: " \
           f"{axes}{alone}"


def _memory(config: StageConfig, program: Program) -> str:
    state = program.abstract_state
    held = _bytes(jax.tree.leaves(state))
    gradients, activations = _bytes(state.trained.values()), activation_bytes(config, program)
    own = next(device for device in program.mesh.devices.flat if device.process_index == jax.process_index())
    total, limit = held + gradients + activations, memory_of_device(own)
    if limit and total > limit:
        LOG.warning("the step may not fit: about %s per device, of %s. More devices along fsdp, a larger accumulate or "
                    "remat=full take less; `vocojax report` counts exactly", _size(total), _size(limit))
    kept = "parameters, their averages and optimizer" if state.ema else "parameters and optimizer"
    return (f"about {_size(total)} per device{f', of {_size(limit)}' if limit else ''}: {kept} "
            f"{_size(held)}, gradients {_size(gradients)}, activations about {_size(activations)}")


def _optimizer(config: StageConfig, first_step: int) -> str:
    next_step = min(first_step + 1, config.steps)
    averages = f"; averages with ema {config.optimizer.ema:g} are measured and read" if config.optimizer.ema else ""
    return f"AdamW, learning rate {described_schedule(config.optimizer, config.steps, next_step)}{averages}"


def _size(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / devices.MIB:.2f} MiB"


def _bytes(leaves: Iterable[Any]) -> int:
    """Returns the bytes of a device's parts of abstract arrays."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def activation_bytes(config: StageConfig, program: Program) -> int:
    """Estimates a device's bytes of activations: what blocks keep, one block's own, and the layers gathered for it."""
    decoder, mesh = config.model.decoder, program.mesh
    rows = config.batch_size // config.accumulate // math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    tokens = rows * config.data.row_length
    if config.plan == "two_stage":
        unit = config.model.unit_tokens + config.model.unit_vocos + 2
        tokens += config.unit_chunk * unit
    heads = 2 * (decoder.num_heads + decoder.num_kv_heads) * decoder.head_width
    linear = heads + (3 * decoder.mlp_width + decoder.width) // mesh.shape["tensor"]
    kept = {"offload": 0, "full": decoder.width, "attention_out": 2 * decoder.width, "minimal": decoder.width + linear,
            "none": 4 * decoder.width + 2 * linear}[config.remat]
    layer = decoder.width * (heads + 3 * decoder.mlp_width)  # numbers of one block's kernels
    gathered = 2 * layer if mesh.shape["fsdp"] > 1 else 0
    size = np.dtype(config.dtype).itemsize
    return size * (decoder.depth * tokens * kept + tokens * (linear + 4 * decoder.width) + gathered)


def memory_of_device(device: jax.Device) -> int:
    """Returns the bytes that a device of this process leaves to programs; 0 if that is not known."""
    chip = devices.tpu(device.device_kind)
    return chip.memory if chip else (device.memory_stats() or {}).get("bytes_limit", 0)


def _data(data: DataConfig) -> str:
    if not data.mixture:
        return _part(data)
    return "; ".join(f"{part.weight:g} x {_part(part)}" for part in data.mixture)


def _part(part: Any) -> str:
    files = f"{part.path}" + (f", files below {part.image_root}" if part.image_root else "")
    return f"{part.source} {files}" if part.path else f"{part.source}, split {part.split}"


def _weights(config: StageConfig, first_step: int, workdir: str | Path) -> str:
    if first_step:
        return f"checkpoint {first_step} of {workdir}"
    if not config.init_from:
        return "random (init_from is empty)"
    return config.init_from + (f"; random: {', '.join(config.init_new)}" if config.init_new else "")


def without_workers(config: StageConfig) -> StageConfig:
    """Returns the stage with its batches made in threads of this process, for a look at the first one."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=0))
