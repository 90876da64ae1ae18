"""A run's files beside its checkpoints: the resolved config, package versions, and how they are written.

Paths are local or any that `etils.epath` knows (`gs://...`).
"""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from vocojax.config import ConfigError, build, config_to_dict, differing_keys
from vocojax.errors import VocojaxError
from vocojax.files import is_remote, write_atomically
from vocojax.parallel import processes
from vocojax.runs.earlier import upgraded

PACKAGES = ("vocojax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")
# Keys of a stage's config that may change when a run goes on.
MUTABLE_KEYS = ("log_every", "checkpoint", "validation", "run", "data.num_threads", "data.num_workers",
                "data.keep_in_memory", "attention", "remat", "mesh")
# Keys that may differ between the processes of a run; in all others they must agree, or would wait for each other.
HOST_KEYS = ("data.num_threads", "data.num_workers", "data.keep_in_memory")


class CheckpointError(VocojaxError, RuntimeError):
    """A run's files don't allow what was asked of them."""


def run_path(workdir: str | os.PathLike) -> epath.Path:
    """A run's directory; `CheckpointError` if there is no way to reach it from here."""
    path = epath.Path(workdir)
    try:
        path.exists()
    except ImportError as error:
        raise CheckpointError(f"workdir {str(workdir)!r} can't be reached: {error}. Install the package that opens it "
                              "(gs://: pip install 'vocojax[gcs]'), or mount the bucket") from error
    except OSError as error:
        raise CheckpointError(f"workdir {str(workdir)!r} can't be reached: {error}. Check the network and the "
                              "credentials that the machine has") from error
    return path if is_remote(path) else epath.Path(Path(workdir).absolute())


def strip(values: Mapping[str, Any], keys: Sequence[str], prefix: str = "") -> dict[str, Any]:
    """A config without some keys."""
    return {name: strip(value, keys, f"{prefix}{name}.") if isinstance(value, Mapping) else value
            for name, value in values.items() if prefix + name not in keys}


def fixed_keys(config: Any) -> dict[str, Any]:
    """What of a run's config (a dataclass, or None) may not change when the run goes on."""
    return {} if config is None else strip(config_to_dict(config), MUTABLE_KEYS)


def changed_keys(saved: Any, config: Any) -> list[str]:
    """Dotted keys that may not change and have, since a run wrote down its config.

    A key that it didn't have then counts as the default that it has today; one that there is no more has changed.

    Args:
      saved: the config as the run wrote it, or `fixed_keys` of it.
      config: today's, a dataclass.
    """
    if config is None or isinstance(saved, str):  # at first checkpoints held a digest; config.json is what counts there
        return []
    try:
        filled = build(type(config), upgraded(saved))
    except ConfigError as error:
        return [error.key]
    return differing_keys(fixed_keys(filled), fixed_keys(config))


def _digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def write_run_files(workdir: str | Path, config: Any) -> None:
    """Writes config.json and versions.json; where there are checkpoints, the config must be the one they began with.

    The config is a dataclass.

    Process 0 writes; all processes must have the same config and see the same directory.

    Raises:
      CheckpointError: the directory holds a run with another config (the keys are named), or processes differ.
    """
    path = run_path(workdir) / "config.json"
    problem = ""
    if processes.is_first():
        problem = _changed(path, config)
        if not problem:
            path.parent.mkdir(parents=True, exist_ok=True)
            versions = {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}}
            write_atomically(path, json.dumps(config_to_dict(config), indent=2) + "\n")
            write_atomically(path.parent / "versions.json", json.dumps(versions, indent=2) + "\n")
    if problem := processes.from_first("run files", problem):
        raise CheckpointError(problem)
    try:
        seen = json.loads(path.read_text())
    except (OSError, ValueError):
        seen = None
    told = processes.from_all("configs", [_digest(strip(config_to_dict(config), HOST_KEYS)), seen is not None])
    if blind := [index for index, (_, sees) in enumerate(told) if not sees]:
        raise CheckpointError(f"workdir {workdir} of process 0 is not seen by processes {blind}: it must be a "
                              "directory that all share, or a bucket")
    if other := [index for index, (own, _) in enumerate(told) if own != told[0][0]]:
        raise CheckpointError(f"processes {other} were started with another config than process 0")


def _changed(path: epath.Path, config: Any) -> str:
    checkpoints = path.parent / "checkpoints"
    if not path.exists() or not checkpoints.is_dir() or not any(e.name.isdecimal() for e in checkpoints.iterdir()):
        return ""
    changed = changed_keys(json.loads(path.read_text()), config)
    if not changed:
        return ""
    return (f"{path.parent} holds a run with another config (differing: {', '.join(changed)}): "
            "use the config it began with, or another --workdir")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def is_run(directory: str | os.PathLike) -> bool:
    """Returns whether a directory looks like a run of training."""
    return (run_path(directory) / "checkpoints").is_dir()


def run_config(workdir: str | Path) -> dict[str, Any]:
    """Returns the resolved config of a run, in today's keys.

    Raises:
      CheckpointError: the directory holds none, or one that is damaged.
    """
    path = run_path(workdir) / "config.json"
    if not path.exists():
        raise CheckpointError(f"{workdir} holds no run: {path.name} is missing")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: is damaged, it is not JSON ({error}); copy it back from a checkpoint's "
                              "progress file or another copy of the run") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: is damaged, it holds no JSON object; copy it back from another copy of the run")
    return upgraded(values)
