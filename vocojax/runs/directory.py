"""A run's directory, and its files in addition to the checkpoints: the resolved config and the package versions.

Paths are local, or of any other kind that `etils.epath` supports (`gs://...`).
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from vocojax.config import ConfigError, build, config_to_dict, differing_keys
from vocojax.errors import CheckpointError
from vocojax.files import LiteralPath, is_remote, write_atomically
from vocojax.hub import local_copy
from vocojax.parallel import processes
from vocojax.runs.checkpoint_files import first_line, read_progress
from vocojax.runs.earlier import upgraded
from vocojax.sums import FILE as SUMS
from vocojax.sums import ChangedFile, read_sums, require_unchanged, write_sums

LOG = logging.getLogger(__name__)

PACKAGES = ("vocojax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")
# Keys of a stage's config that may change when a run resumes.
MUTABLE_KEYS = ("log_every", "checkpoint", "validation", "run", "data.num_threads", "data.num_workers",
                "data.keep_in_memory", "attention", "remat", "unit_chunk", "mesh")
# Keys that may differ between the processes of a run. Other differences would make processes wait for each other.
HOST_KEYS = ("data.num_threads", "data.num_workers", "data.keep_in_memory")


def run_path(workdir: str | os.PathLike) -> epath.Path:
    """Returns the path of a run's directory; a local one becomes absolute, one on the hub is downloaded.

    Raises:
      CheckpointError: the file system can't be reached.
      InputError: see `hub.local_copy`.
    """
    workdir = local_copy(workdir)
    try:
        path = epath.Path(workdir)
        path.exists()
    except (KeyError, NotImplementedError):
        raise CheckpointError(f"workdir {str(workdir)!r} has an unknown scheme before '://'; use a local path or "
                              "gs://BUCKET/PATH, or hf://ORG/NAME to read") from None
    except ImportError as error:
        raise CheckpointError(f"workdir {str(workdir)!r} can't be reached: {error}. Install the package that opens it "
                              "(for gs://: pip install 'vocojax[gcs]'), or mount the bucket") from error
    except OSError as error:
        raise CheckpointError(f"workdir {str(workdir)!r} can't be reached: {error}. Check the network and the "
                              "machine's credentials") from error
    return path if is_remote(path) else LiteralPath(Path(workdir).absolute())


def checkpoint_path(workdir: str | os.PathLike) -> epath.Path:
    """Returns `run_path` of a directory whose checkpoints are to be written or read.

    Raises:
      CheckpointError: see `run_path`; or the path has characters with which checkpoints would be written elsewhere.
    """
    path, name = run_path(workdir), os.fspath(workdir)
    if not is_remote(path) and "\\" in str(path):
        raise CheckpointError(f"workdir {name!r} has a backslash in its path, which TensorStore reads as '/': "
                              "rename the directory, or use another one")
    if any("\ud800" <= letter <= "\udfff" for letter in str(path)):
        raise CheckpointError(f"workdir {name!r} has a path that is not UTF-8, which TensorStore can't open: rename "
                              "the directory, or use another one")
    return path


def put_aside(path: epath.Path) -> epath.Path:
    """Moves a damaged file or checkpoint of a run to WORKDIR/damaged, and returns its new path.

    Args:
      path: WORKDIR/NAME or WORKDIR/checkpoints/STEP.
    """
    home = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    target = home / "damaged" / f"{path.name}-{time.time_ns()}"
    target.parent.mkdir(exist_ok=True)
    return path.rename(target)


def strip(values: Mapping[str, Any], keys: Sequence[str], prefix: str = "") -> dict[str, Any]:
    """Returns a config without some keys.

    Args:
      values: the config, nested.
      keys: dotted keys to leave out.
      prefix: dotted path of `values` in the whole config, with a final dot.
    """
    return {name: strip(value, keys, f"{prefix}{name}.") if isinstance(value, Mapping) else value
            for name, value in values.items() if prefix + name not in keys}


def fixed_keys(config: Any) -> dict[str, Any]:
    """Returns the part of a run's config (a dataclass, or None) that must not change when the run resumes."""
    return {} if config is None else strip(config_to_dict(config), MUTABLE_KEYS)


def changed_keys(saved: Any, config: Any) -> list[str]:
    """Returns the dotted keys that must not change and have changed since a run saved its config.

    A key that the saved config lacks has its default there. A key that no longer exists counts as changed.

    Args:
      saved: the config that the run saved, or `fixed_keys` of it.
      config: the present config, a dataclass.
    """
    if config is None or isinstance(saved, str):  # the first checkpoints held a digest; config.json is compared instead
        return []
    try:
        filled = build(type(config), upgraded(saved))
    except ConfigError as error:
        return [error.key]
    return differing_keys(fixed_keys(filled), fixed_keys(config))


def _digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def write_run_files(workdir: str | Path, config: Any) -> None:
    """Writes config.json and versions.json. If there are checkpoints, the config must be theirs.

    Process 0 writes; all processes must have the same config and see the same directory.

    Args:
      workdir: the run's directory.
      config: the run's config, a dataclass.

    Raises:
      CheckpointError: the directory holds a run with another config (the keys are named), or processes differ.
    """
    path = checkpoint_path(workdir) / "config.json"
    problem = ""
    if processes.is_first():
        problem = _changed(path, config)
        if not problem:
            path.parent.mkdir(parents=True, exist_ok=True)
            versions = {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}}
            (path.parent / SUMS).unlink(missing_ok=True)  # a killed start must not leave another file's sum
            write_atomically(path, json.dumps(config_to_dict(config), indent=2) + "\n")
            write_sums(path.parent, [path.name])
            write_atomically(path.parent / "versions.json", json.dumps(versions, indent=2) + "\n")
    if problem := processes.from_first("run files", problem):
        raise CheckpointError(problem)
    try:
        seen = json.loads(path.read_text())
    except (OSError, ValueError):
        seen = None
    reports = processes.from_all("configs", [_digest(strip(config_to_dict(config), HOST_KEYS)), seen is not None])
    if blind := [index for index, (_, sees) in enumerate(reports) if not sees]:
        raise CheckpointError(f"processes {blind} do not see process 0's workdir {workdir}: use a directory that all "
                              "processes share, or a bucket")
    if other := [index for index, (own, _) in enumerate(reports) if own != reports[0][0]]:
        raise CheckpointError(f"processes {other} have another config than process 0: start all processes of a run "
                              "with the same flags")


def _changed(path: epath.Path, config: Any) -> str:
    checkpoints = path.parent / "checkpoints"
    if not path.exists() or not checkpoints.is_dir() or not any(e.name.isdecimal() for e in checkpoints.iterdir()):
        return ""
    try:
        saved = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # the checkpoints have copies, which are compared when one is read
        LOG.warning("%s: is damaged, it is not JSON (%s); writing it again", path, first_line(error))
        return ""
    changed = changed_keys(saved, config)
    if not changed:
        return ""
    return (f"{path.parent} holds a run with another config (differing: {', '.join(changed)}): "
            "use the run's own config, or another --workdir")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def is_run(directory: str | os.PathLike) -> bool:
    """Returns whether a directory looks like a training run: it has checkpoints."""
    return (run_path(directory) / "checkpoints").is_dir()


def run_config(workdir: str | Path) -> dict[str, Any]:
    """Reads the resolved config of a run and returns it with today's keys.

    Raises:
      CheckpointError: there is no config.json, it is damaged, or it is not that of the newest checkpoint.
    """
    path = run_path(workdir) / "config.json"
    if not path.exists():
        raise CheckpointError(f"{workdir} holds no run: {path.name} is missing; check the path")
    try:
        values = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged, it is not JSON ({error}); copy it from a backup of the run, or "
                              "write it again from the entry 'config' of a checkpoint's progress/metadata") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: is damaged, it is not a JSON object; copy it from a backup of the run")
    require_run_files(workdir, [path.name])
    if changed := _not_signed(upgraded(values), signed(workdir).get("config")):
        raise CheckpointError(f"{path}: was changed after the run wrote it (differing from the newest checkpoint: "
                              f"{', '.join(changed)}); copy it from a backup of the run, or write it again from the "
                              "entry 'config' of the checkpoint's progress/metadata")
    return upgraded(values)


def require_run_files(workdir: str | Path, names: Sequence[str]) -> None:
    """Compares files of a run with their sums, if it has any.

    Args:
      workdir: the run's directory.
      names: the files; a name that ends in `/` is a directory.

    Raises:
      CheckpointError: a file was changed after the run wrote it.
    """
    try:
        found = read_sums(run_path(workdir))
        require_unchanged(run_path(workdir), {name: found[name] for name in found if name.startswith(tuple(names))})
    except ChangedFile as error:
        raise CheckpointError(str(error)) from None


def signed(workdir: str | Path) -> dict[str, Any]:
    """Returns the content of the newest checkpoint's progress file; {} if there is none, or none that is sound."""
    checkpoints = run_path(workdir) / "checkpoints"
    steps = [int(e.name) for e in checkpoints.iterdir() if e.name.isdecimal()] if checkpoints.is_dir() else []
    try:
        return read_progress(checkpoints / str(max(steps, default=0)))
    except Exception:  # a damaged file may have any content; who reads the checkpoint reports it
        return {}


def _not_signed(values: Mapping[str, Any], saved: Any) -> list[str]:
    """Returns the dotted keys of a checkpoint's config that a config lacks, or has with another value."""
    if not isinstance(saved, Mapping):  # a conversion has none, and the first checkpoints held a digest
        return []
    here = _flat(values)
    return [key for key, value in _flat(upgraded(saved)).items() if key not in here or here[key] != value]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
