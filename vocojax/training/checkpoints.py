"""Runs on disk: a work directory with the resolved config, package versions and Orbax checkpoints.

    WORKDIR/config.json, versions.json
    WORKDIR/checkpoints/STEP/parameters   every parameter of the model, a flat dict by path name
                             optimizer    what training alone needs
                             progress     JSON: the data stream's state
"""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax.typing import DTypeLike

from vocojax.config import ConfigError, LoraConfig, ModelConfig, build
from vocojax.models.lora import merge_factors, with_factors
from vocojax.models.parameters import Parameters, abstract, variables_of, with_parameters
from vocojax.models.voco import VocoLlama
from vocojax.training.config import CheckpointConfig, differing_keys

PACKAGES = ("vocojax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")
# Keys of a stage's config that may change when a run goes on.
MUTABLE_KEYS = ("log_every", "checkpoint", "data.num_threads", "data.num_workers", "data.keep_in_memory", "attention",
                "remat", "mesh")


class CheckpointError(RuntimeError):
    """A run's files don't allow what was asked of them."""


class Checkpoints:
    """Saves and restores the checkpoints of one run, asynchronously and atomically (Orbax).

    Args:
      workdir: the run's directory.
      config: how often and how many.
    """

    def __init__(self, workdir: str | Path, config: CheckpointConfig):
        self.every = config.every
        self._manager = _open(workdir, max_to_keep=config.keep, cleanup_tmp_directories=True)

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, parameters: Parameters, optimizer: Any, progress: Mapping[str, Any]) -> None:
        """Writes a checkpoint behind `step` optimizer steps; one that exists is left as it is."""
        if step == self.latest:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                parameters=ocp.args.PyTreeSave(parameters),
                optimizer=ocp.args.PyTreeSave(optimizer),
                progress=ocp.args.JsonSave(dict(progress)),
            ),
        )

    def restore(
        self, step: int, parameters: Mapping[str, Any], optimizer: Any
    ) -> tuple[Parameters, Any, dict[str, Any]]:
        """Restores into the shapes, dtypes and shardings of the given (abstract) parameters and optimizer state."""
        construct = ocp.checkpoint_utils.construct_restore_args
        restore = lambda item: ocp.args.PyTreeRestore(item=item, restore_args=construct(item))
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                parameters=restore(parameters),
                optimizer=restore(optimizer),
                progress=ocp.args.JsonRestore(),
            ),
        )
        return restored.parameters, restored.optimizer, restored.progress

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the writer's threads."""
        self._manager.close()


def write_run_files(workdir: str | Path, config: Mapping[str, Any]) -> None:
    """Writes config.json and versions.json; where there are checkpoints, the config must be the one they began with.

    Raises:
      CheckpointError: the directory holds a run with another config (the keys are named), or is not a local path.
    """
    if "://" in str(workdir):
        raise CheckpointError(f"workdir {str(workdir)!r} must be a local path; mount the bucket")
    path = Path(workdir) / "config.json"
    checkpoints = path.with_name("checkpoints")
    if path.exists() and checkpoints.is_dir() and any(entry.name.isdecimal() for entry in checkpoints.iterdir()):
        before = json.loads(path.read_text())
        changed = [key for key in differing_keys(before, dict(config))
                   if not any(key == m or key.startswith(m + ".") for m in MUTABLE_KEYS)]
        if changed:
            raise CheckpointError(f"{workdir} holds a run with another config (differing: {', '.join(changed)}): "
                                  "use the config it began with, or another --workdir")
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    write_atomically(path, json.dumps(config, indent=2) + "\n")
    write_atomically(path.with_name("versions.json"), json.dumps(versions, indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file so that readers see the old text or the new one, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def run_config(workdir: str | Path) -> dict[str, Any]:
    """The resolved config of a run; `CheckpointError` if the directory holds none."""
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise CheckpointError(f"{workdir} holds no run: {path.name} is missing")
    return json.loads(path.read_text())


def load_parameters(workdir: str | Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Parameters:
    """Parameters of a run's newest checkpoint, in the shapes, dtypes and shardings asked for; those that LoRA adapted
    come merged with their factors.

    Raises:
      CheckpointError: no checkpoint, or parameters that are missing or shaped otherwise (all are named).
    """
    if not (Path(workdir) / "checkpoints").is_dir():
        raise CheckpointError(f"{workdir} holds no checkpoint")
    manager = _open(workdir)
    step = manager.latest_step()
    if step is None:
        raise CheckpointError(f"{workdir} holds no checkpoint")
    metadata = manager.item_metadata(step)["parameters"]
    saved = getattr(metadata, "tree", metadata)
    problems = [f"{name} is missing" for name in wanted if name not in saved]
    problems += [f"{name} has shape {tuple(saved[name].shape)}, expected {leaf.shape}"
                 for name, leaf in wanted.items() if name in saved and tuple(saved[name].shape) != leaf.shape]
    if problems:
        raise CheckpointError(f"{workdir}, step {step}, does not fit the model: {'; '.join(problems)} "
                              "(init_new names what a stage does not take from it)")
    item = with_factors(wanted, saved)
    restore = ocp.args.PyTreeRestore(
        item=item, partial_restore=True, restore_args=ocp.checkpoint_utils.construct_restore_args(item)
    )
    parameters = manager.restore(step, args=ocp.args.Composite(parameters=restore)).parameters
    if item.keys() == wanted.keys():
        return parameters
    return merge_factors(parameters, wanted, build(LoraConfig, run_config(workdir)["lora"], "lora").scale)


def _open(workdir: str | Path, **options: Any) -> ocp.CheckpointManager:
    """Orbax's manager of a run's checkpoints."""
    handlers = {
        "parameters": ocp.PyTreeCheckpointHandler(),
        "optimizer": ocp.PyTreeCheckpointHandler(),
        "progress": ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(
        Path(workdir).absolute() / "checkpoints", item_names=tuple(handlers), item_handlers=handlers,
        options=ocp.CheckpointManagerOptions(**options),
    )


def load_model(workdir: str | Path, dtype: DTypeLike = jnp.float32) -> VocoLlama:
    """The model of a run's newest checkpoint; computes in and holds its parameters in `dtype`."""
    try:
        config = build(ModelConfig, run_config(workdir)["model"], "model")
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{workdir}/config.json is not a stage's config: {error}") from error
    model = abstract(lambda: VocoLlama(config, nnx.Rngs(0), dtype))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {name: jax.ShapeDtypeStruct(variable.shape, dtype, sharding=sharding)
              for name, variable in variables_of(model).items()}
    return with_parameters(model, load_parameters(workdir, wanted))
