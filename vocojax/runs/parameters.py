"""The parameters of a run's newest checkpoint, read into shardings and checked against their checksums.

A run writes its trained parameters with each checkpoint and its frozen parameters once (`WORKDIR/frozen`). LoRA factors
are merged while reading. `checkpoint_files.py` reads and checks single files.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.typing import DTypeLike

from vocojax.config import ConfigError, LoraConfig, ModelConfig, build
from vocojax.models.lora import merge_factors, with_factors
from vocojax.models.parameters import Parameters, abstract, variables_of, with_parameters
from vocojax.models.voco import VocoLlama
from vocojax.parallel import processes
from vocojax.runs.checkpoint_files import damaged, described, not_saved, read_arrays, read_progress, shortened
from vocojax.runs.checksums import checksums
from vocojax.runs.directory import CheckpointError, checkpoint_path, run_config
from vocojax.runs.selection import BEST, chosen_step, split_name
from vocojax.weights import misfit


class SavedParameters:
    """An index of the parameters in a checkpoint of a run, the newest by default. No array is read.

    Of a run that keeps averages of what trains (`optimizer.ema`) it holds the averages, and not the parameters that
    training resumes from.

    Args:
      workdir: the run's directory, local or remote, or the name of a checkpoint (RUN@STEP, RUN@best).

    Attributes:
      directory: the checkpoint's directory.
      leaves: metadata (`shape`, `dtype`) of each parameter by name, LoRA factors included.
      homes: directory that holds each parameter, by name.
      checksums: saved checksums by `parameters/NAME`, `ema/NAME` or `frozen/NAME`; empty for a converted checkpoint.

    Raises:
      CheckpointError: there is no complete checkpoint, or parts of it are damaged or missing.
    """

    def __init__(self, workdir: str | Path):
        path, (_, choice) = checkpoint_path(workdir), split_name(workdir)
        step = chosen_step(path, choice, run_config(workdir) if choice == BEST else {})
        self.directory = path / "checkpoints" / str(step)
        self.leaves: dict[str, Any] = {}
        self.homes: dict[str, epath.Path] = {}
        for directory in (path / "frozen", self.directory / "parameters", self.directory / "ema"):
            if directory.exists() or directory.name == "parameters":
                leaves = _saved_leaves(directory)
                self.leaves |= leaves
                self.homes |= dict.fromkeys(leaves, directory)
        self.checksums = _saved_checksums(self.directory)
        for directory in (path / "frozen", self.directory / "ema"):
            part = f"{directory.name}/"
            names = [key.removeprefix(part) for key in self.checksums if key.startswith(part)]
            if lost := [name for name in names if self.homes.get(name) != directory]:
                raise damaged(directory, f"{shortened(lost)} missing")


def load_model(workdir: str | Path, dtype: DTypeLike = jnp.float32) -> VocoLlama:
    """Loads the model of a run's newest checkpoint on the first device.

    Args:
      workdir: the run's directory.
      dtype: dtype of the parameters and of the computation.

    Raises:
      CheckpointError: there is no complete checkpoint of a model, or it is damaged.
    """
    try:
        config = build(ModelConfig, run_config(workdir)["model"], "model")
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{workdir}/config.json is not a stage's config: {error}; use the directory of a stage's "
                              "run") from error
    model = abstract(lambda: VocoLlama(config, nnx.Rngs(0), dtype))
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {name: jax.ShapeDtypeStruct(variable.shape, dtype, sharding=sharding)
              for name, variable in variables_of(model).items()}
    return with_parameters(model, load_parameters(workdir, wanted))


def load_parameters(workdir: str | Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Parameters:
    """Loads parameters of a run's newest checkpoint. LoRA factors are merged into their kernels.

    All processes of a cluster call this with the same arguments.

    Args:
      workdir: the run's directory.
      wanted: shapes, dtypes and shardings by name.

    Raises:
      CheckpointError: there is no complete checkpoint, parameters are missing or have another shape (all are named), or
        arrays are damaged.
    """
    saved = SavedParameters(workdir)
    shapes = {name: tuple(leaf.shape) for name, leaf in saved.leaves.items()}
    if problem := misfit(str(saved.directory), shapes, wanted):
        raise CheckpointError(problem)
    reading = with_factors(wanted, saved.leaves)
    found: Parameters = {}
    for directory in dict.fromkeys(saved.homes.values()):
        here = {name: leaf for name, leaf in reading.items() if saved.homes[name] == directory}
        as_saved = {name: leaf for name, leaf in here.items() if leaf.dtype == saved.leaves[name].dtype}
        # Arrays whose dtype changes are read one by one, so that only one at a time is in memory in both dtypes.
        for group in filter(None, (as_saved, *({name: here[name]} for name in here if name not in as_saved))):
            found |= _read_sound(directory, group, saved)
    if reading.keys() == wanted.keys():
        return {name: found[name] for name in wanted}
    return merge_factors(found, wanted, build(LoraConfig, run_config(workdir)["lora"], "lora").scale)


def _read_sound(
    directory: epath.Path, wanted: Mapping[str, jax.ShapeDtypeStruct], saved: SavedParameters
) -> Parameters:
    """Reads parameters of one directory, checks their checksums, and casts them.

    Raises:
      CheckpointError: on all processes, if one of them can't read its part or a checksum differs.
    """
    as_saved = {name: jax.ShapeDtypeStruct(leaf.shape, saved.leaves[name].dtype, sharding=leaf.sharding)
                for name, leaf in wanted.items()}
    found: Parameters = {}
    problem = ""
    try:
        found = read_arrays(directory, as_saved)
    except Exception as error:  # Orbax and TensorStore raise many types for damaged files
        problem = described(error)
    problem = next(filter(None, processes.from_all("parameters", problem)), "")
    if not problem and saved.checksums:
        own = checksums({directory.name: found})
        problem = not_saved(own, saved.checksums, own)
    if problem:
        raise damaged(directory, problem)
    return {name: value.astype(wanted[name].dtype) for name, value in found.items()}


def _saved_leaves(directory: epath.Path) -> dict[str, Any]:
    try:
        metadata = ocp.PyTreeCheckpointHandler().metadata(directory)
    except Exception as error:  # Orbax raises many types for damaged files
        raise damaged(directory, described(error)) from error
    return dict(getattr(metadata, "tree", metadata))


def _saved_checksums(directory: epath.Path) -> dict[str, int]:
    """Reads the checksums of a checkpoint; a converted one has none."""
    if not (directory / "progress").exists() and not (directory / "optimizer").exists():
        return {}
    try:
        return read_progress(directory)["checksums"]
    except Exception as error:  # a damaged file may have any content
        raise damaged(directory, described(error)) from error
