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
from vocojax.runs.selection import split_name
from vocojax.sums import FILE as SUMS
from vocojax.sums import ChangedFile, read_sums, require_unchanged, write_sums

LOG = logging.getLogger(__name__)

PACKAGES = ("vocojax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")
# Keys of a stage's config that may change when a run resumes. The last ones say where something is: the content of data
# and tokenizer is compared by the stream's state, a teacher's by its checksums, and `init_from` has been read.
MUTABLE_KEYS = ("name", "log_every", "checkpoint", "validation", "run", "data.num_threads", "data.num_workers",
                "data.keep_in_memory", "attention", "remat", "unit_chunk", "mesh", "accumulate",
                "data.path", "data.image_root", "data.tokenizer", "data.mixture.path", "data.mixture.image_root",
                "init_from", "distill.teacher")
# Keys that may differ between the processes of a run. Other differences would make processes wait for each other.
HOST_KEYS = ("data.num_threads", "data.num_workers", "data.keep_in_memory")


def run_path(workdir: str | os.PathLike) -> epath.Path:
    """Returns the path of a run's directory; a local one becomes absolute, one on the hub is downloaded.

    Of the name of a checkpoint (RUN@STEP) it is that of the run; `selection.chosen_step` tells which checkpoint.

    Raises:
      CheckpointError: the file system can't be reached.
      InputError: see `hub.local_copy`.
    """
    workdir = local_copy(workdir)
    try:
        workdir, _ = split_name(workdir)
        path = epath.Path(workdir)
        path.exists()
    except (KeyError, NotImplementedError):
        raise CheckpointError(f"workdir {str(workdir)!r} has an unknown scheme before '://'; use a local path or "
                              "gs://BUCKET/PATH, or hf://ORG/NAME to read") from None
    except ImportError as error:
        raise CheckpointError(f"workdir {str(workdir)!r} can't be reached: {error}. Install the package that opens it "
                              "(for gs://: pip install -e '.[gcs]'), or mount the bucket") from error
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
      keys: dotted keys to leave out; of dicts in a list those of all of them.
      prefix: dotted path of `values` in the whole config, with a final dot.
    """

    def inside(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return strip(value, keys, f"{prefix}{name}.")
        return [inside(name, part) for part in value] if isinstance(value, list | tuple) else value

    return {name: inside(name, value) for name, value in values.items() if prefix + name not in keys}


def fixed_keys(config: Any) -> dict[str, Any]:
    """Returns the part of a run's config (a dataclass, or None) that must not change when the run resumes."""
    return {} if config is None else strip(config_to_dict(config), MUTABLE_KEYS)


def changed_keys(saved: Any, config: Any, extend: bool = False) -> list[str]:
    """Returns the dotted keys that must not change and have changed since a run saved its config.

    A key that the saved config lacks has its default there. A key that no longer exists counts as changed.

    Args:
      saved: the config that the run saved, or `fixed_keys` of it.
      config: the present config, a dataclass.
      extend: whether the present config may have more steps.
    """
    if config is None or isinstance(saved, str):  # the first checkpoints held a digest; config.json is compared instead
        return []
    before, here = upgraded(saved), config_to_dict(config)
    try:
        filled = build(type(config), _with_mutable(before, here))
    except ConfigError as error:
        there, now = _flat(strip(before, MUTABLE_KEYS)), _flat(here)
        return [key for key in there if key in now and now[key] != there[key]] or [error.key]
    changed = differing_keys(fixed_keys(filled), fixed_keys(config))
    return [key for key in changed if not (extend and key == "steps" and filled.steps < config.steps)]


def _with_mutable(saved: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a saved config with the present values of the keys that may change, which checkpoints do not hold.

    Args:
      saved: the saved config, nested.
      here: the present config.
      prefix: dotted path of both in the whole config, with a final dot.
    """
    values = dict(saved)
    for name, value in here.items():
        before = values.get(name, {})
        if prefix + name in MUTABLE_KEYS:
            values[name] = value
        elif isinstance(value, Mapping) and isinstance(before, Mapping):
            inner = _with_mutable(before, value, f"{prefix}{name}.")
            values |= {name: inner} if inner or name in values else {}
        elif name == "mixture" and len(value) == len(before):
            values[name] = [_with_mutable(*parts, f"{prefix}{name}.") for parts in zip(before, value, strict=True)]
    return values


def _digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def write_run_files(workdir: str | Path, config: Any, extend: bool = False) -> None:
    """Writes config.json and versions.json. If there are checkpoints, the config must be theirs.

    Process 0 writes; all processes must have the same config and see the same directory.

    Args:
      workdir: the run's directory.
      config: the run's config, a dataclass.
      extend: whether a finished run may get more steps.

    Raises:
      CheckpointError: the directory holds a run with another config (the keys are named), or processes differ.
    """
    path = checkpoint_path(workdir) / "config.json"
    problem = ""
    if processes.is_first():
        problem = _changed(path, config, extend)
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


def _changed(path: epath.Path, config: Any, extend: bool) -> str:
    """Returns the problem if a run's config differs in what must not change; logs what else differs."""
    newest = max(checkpoint_steps(path.parent), default=None)
    if newest is None or not path.exists():
        return ""
    try:
        saved = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # the checkpoints have copies, which are compared when one is read
        LOG.warning("%s: is damaged, it is not JSON (%s); writing it again", path, first_line(error))
        return ""
    if changed := changed_keys(saved, config, extend):
        if changed == ["steps"] and not extend and saved["steps"] < config.steps:
            return (f"{path.parent} holds a run of {saved['steps']} steps, and the config has {config.steps}: pass "
                    "--extend to train a finished run for more steps, or use the run's own config")
        return (f"{path.parent} holds a run with another config (differing: {', '.join(changed)}): "
                "use the run's own config, or another --workdir")
    before, now = _flat(upgraded(saved)), _flat(config_to_dict(config))
    if extend and newest < before["steps"] < config.steps:
        return (f"{path.parent} is at step {newest} of {before['steps']}: run its own command to finish it before it "
                "is extended")
    for key in (key for key in before if key in now and now[key] != before[key]):
        LOG.info("%s: resumes with a changed config: %s is now %r, it was %r", path.parent, key, now[key], before[key])
    return ""


def checkpoint_steps(path: epath.Path) -> list[int]:
    """Returns the steps of the checkpoints in a run's directory, in order; [] if there are none."""
    checkpoints = path / "checkpoints"
    return sorted(int(e.name) for e in checkpoints.iterdir() if e.name.isdecimal()) if checkpoints.is_dir() else []


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
    path = run_path(workdir)
    try:
        return read_progress(path / "checkpoints" / str(max(checkpoint_steps(path), default=0)))
    except Exception:  # a damaged file may have any content; who reads the checkpoint reports it
        return {}


def _not_signed(values: Mapping[str, Any], saved: Any) -> list[str]:
    """Returns the dotted keys of a checkpoint's config that a config lacks, or has with another value.

    Left out are those that may change while a run has this checkpoint: its steps grow when it is extended.
    """
    if not isinstance(saved, Mapping):  # a conversion has none, and the first checkpoints held a digest
        return []
    left_out = (*MUTABLE_KEYS, "steps")
    here, there = (_flat(strip(part, left_out)) for part in (values, upgraded(saved)))
    return [key for key, value in there.items() if key not in here or here[key] != value]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
