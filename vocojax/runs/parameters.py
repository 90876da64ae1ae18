"""What a run's checkpoints hold, read and compared with the checksums it was saved with; see `checkpoints.py`."""

import hashlib
import json
from collections.abc import Iterable, Mapping
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
from vocojax.runs.checksums import checksums
from vocojax.runs.directory import CheckpointError, run_config, run_path


def load_model(workdir: str | Path, dtype: DTypeLike = jnp.float32) -> VocoLlama:
    """The model of a run's newest checkpoint; computes in and holds its parameters in `dtype`."""
    try:
        config = build(ModelConfig, run_config(workdir)["model"], "model")
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{workdir}/config.json is not a stage's config: {error}") from error
    model = abstract(lambda: VocoLlama(config, nnx.Rngs(0), dtype))
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {name: jax.ShapeDtypeStruct(variable.shape, dtype, sharding=sharding)
              for name, variable in variables_of(model).items()}
    return with_parameters(model, load_parameters(workdir, wanted))


def load_parameters(workdir: str | Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Parameters:
    """Parameters of a run's newest checkpoint, in the shapes, dtypes and shardings asked for; those that LoRA adapted
    come merged with their factors.

    Raises:
      CheckpointError: no checkpoint; parameters that are missing or shaped otherwise (all are named); what is read is
        not what was saved, or is gone.
    """
    parts = [(directory, saved_leaves(directory)) for directory in parameter_directories(workdir)]
    saved = {name: leaf for _, leaves in reversed(parts) for name, leaf in leaves.items()}
    sums = saved_checksums(parts[0][0].parent)
    require_frozen(run_path(workdir) / "frozen", sums, (name for name in wanted if name not in saved))
    problems = [f"{name} is missing" for name in wanted if name not in saved]
    problems += [f"{name} has shape {tuple(saved[name].shape)}, expected {leaf.shape}"
                 for name, leaf in wanted.items() if name in saved and tuple(saved[name].shape) != leaf.shape]
    if problems:
        raise CheckpointError(f"{parts[0][0].parent} does not fit the model: {'; '.join(problems)} "
                              "(init_new names what a stage does not take from it)")
    item = with_factors(wanted, saved)
    found: Parameters = {}
    for directory, leaves in parts:
        here = {name: leaf for name, leaf in item.items() if name in leaves and name not in found}
        as_saved = {name: leaf for name, leaf in here.items() if leaf.dtype == leaves[name].dtype}
        # What is held in another dtype than it was saved in is read alone, so that only one array is there in both.
        for group in filter(None, (as_saved, *({name: here[name]} for name in here if name not in as_saved))):
            found |= _read_sound(directory, group, leaves, sums)
    if item.keys() == wanted.keys():
        return {name: found[name] for name in wanted}
    return merge_factors(found, wanted, build(LoraConfig, run_config(workdir)["lora"], "lora").scale)


def _read_sound(
    directory: epath.Path, wanted: Mapping[str, jax.ShapeDtypeStruct], leaves: Mapping[str, Any],
    sums: Mapping[str, int],
) -> Parameters:
    """Parameters in a directory, cast to the dtypes asked for once they are found to be those that were saved."""
    as_saved = {name: jax.ShapeDtypeStruct(leaf.shape, leaves[name].dtype, sharding=leaf.sharding)
                for name, leaf in wanted.items()}
    found: Parameters = {}
    problem = ""
    try:
        found = read_arrays(directory, as_saved)
    except Exception as error:  # whatever a damaged file makes of Orbax and TensorStore
        problem = described(error)
    problem = next(filter(None, processes.from_all("parameters", problem)), "")
    if not problem and sums:
        own = checksums({directory.name: found})
        problem = not_saved(own, sums, own)
    if problem:
        raise damaged(directory, problem)
    return {name: value.astype(wanted[name].dtype) for name, value in found.items()}


def parameter_directories(workdir: str | Path) -> list[epath.Path]:
    """Where the parameters of a run's newest checkpoint lie: each is in one of them.

    Raises:
      CheckpointError: there is no complete checkpoint.
    """
    path = run_path(workdir)
    steps = ocp.utils.checkpoint_steps(path / "checkpoints")
    if not steps:
        raise CheckpointError(f"{workdir} holds no checkpoint")
    own = path / "checkpoints" / str(max(steps)) / "parameters"
    return [own, path / "frozen"] if (path / "frozen").exists() else [own]


def require_frozen(directory: epath.Path | Path, sums: Mapping[str, int], names: Iterable[str]) -> None:
    """Raises `CheckpointError` if some parameters that are not there were saved among what a run does not train."""
    lost = [name for name in names if f"frozen/{name}" in sums]
    if lost:
        raise damaged(directory, f"{', '.join(lost[:5])}{' ...' * (len(lost) > 5)} missing")


def saved_leaves(directory: epath.Path) -> dict[str, Any]:
    """Name -> metadata with shape and dtype of every parameter in a directory; `CheckpointError` if it is damaged."""
    try:
        metadata = ocp.PyTreeCheckpointHandler().metadata(directory)
    except Exception as error:  # whatever a damaged file makes of Orbax
        raise damaged(directory, described(error)) from error
    return dict(getattr(metadata, "tree", metadata))


def saved_checksums(directory: epath.Path) -> dict[str, int]:
    """`parameters/PATH` or `frozen/PATH` -> checksum, of a run's checkpoint; of a converted one there are none.

    Raises:
      CheckpointError: its progress file is missing or damaged.
    """
    if not (directory / "progress").exists() and not (directory / "optimizer").exists():
        return {}
    try:
        return read_progress(directory)["checksums"]
    except Exception as error:  # whatever a damaged file makes of JSON
        raise damaged(directory, described(error)) from error


def read_arrays(directory: epath.Path, wanted: Any) -> Any:
    """Arrays in the shapes, dtypes and shardings asked for; a dict may leave out some that are there."""
    return ocp.PyTreeCheckpointHandler().restore(directory, args=ocp.args.PyTreeRestore(
        item=wanted, partial_restore=isinstance(wanted, dict),
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
    ))


def read_progress(directory: epath.Path) -> dict[str, Any]:
    progress = json.loads((directory / "progress" / "metadata").read_text())
    if progress["sha256"] != sha256(progress):
        raise CheckpointError("progress is not what was saved")
    return progress


def sha256(progress: Mapping[str, Any]) -> str:
    """Of everything in a progress file but this."""
    rest = {name: value for name, value in progress.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def not_saved(sums: Mapping[str, int], saved: Mapping[str, int], names: Iterable[str]) -> str:
    """What is wrong if some arrays do not have the checksums that they were saved with, else ''."""
    changed = [name for name in names if sums.get(name) != saved.get(name)]
    return f"not what was saved (checksum): {', '.join(changed[:5])}{' ...' * (len(changed) > 5)}" if changed else ""


def damaged(directory: epath.Path | Path, problem: str) -> CheckpointError:
    """What to tell of a part of a checkpoint that others than its own run were to read, or of what all steps share."""
    remedy = ("Its own run, started again, puts that checkpoint aside and goes on from the one before; weights that "
              "launch/convert.py wrote must be converted again")
    if directory.name == "frozen":
        remedy = ("Every checkpoint of the run needs it, so that none before helps: copy it back, from a copy of the "
                  "run or from another run of the same config and init_from, which writes the same")
    return CheckpointError(f"{directory} IS DAMAGED: {problem}. {remedy}")


def described(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:300] if lines else ""
