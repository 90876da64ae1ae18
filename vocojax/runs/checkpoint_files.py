"""The files of one checkpoint of a run: arrays, progress, and what is said of those that are damaged."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from vocojax.runs.directory import CheckpointError


def read_arrays(directory: epath.Path, wanted: Any) -> Any:
    """Reads arrays in the shapes, dtypes and shardings asked for; a dict may leave out some that are there."""
    return ocp.PyTreeCheckpointHandler().restore(directory, args=ocp.args.PyTreeRestore(
        item=wanted, partial_restore=isinstance(wanted, dict),
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
    ))


def read_progress(directory: epath.Path) -> dict[str, Any]:
    """Reads a checkpoint's progress file; `CheckpointError` if it is not what was saved."""
    progress = json.loads((directory / "progress" / "metadata").read_text())
    if progress["sha256"] != sha256(progress):
        raise CheckpointError("progress is not what was saved")
    return progress


def sha256(progress: Mapping[str, Any]) -> str:
    """Returns the digest of everything in a progress file but the digest itself."""
    rest = {name: value for name, value in progress.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def not_saved(sums: Mapping[str, int], saved: Mapping[str, int], names: Iterable[str]) -> str:
    """Returns a description of the arrays that do not have the checksums they were saved with, or ''."""
    changed = [name for name in names if sums.get(name) != saved.get(name)]
    return f"not what was saved (checksum): {', '.join(changed[:5])}{' ...' * (len(changed) > 5)}" if changed else ""


def damaged(directory: epath.Path | Path, problem: str) -> CheckpointError:
    """Returns the error for a part of a checkpoint that cannot be read, with the remedy."""
    remedy = ("Start its own run again: it moves that checkpoint aside and resumes from the one before. Convert "
              "again what launch/convert.py wrote")
    if directory.name == "frozen":
        remedy = ("Every checkpoint of the run needs it, so that no earlier one helps: copy it back from a copy of the "
                  "run, or from another run of the same config and init_from, which writes the same")
    return CheckpointError(f"{directory} IS DAMAGED: {problem}. {remedy}")


def described(error: Exception) -> str:
    """Returns an exception's type and the first line of its message."""
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: Exception) -> str:
    """Returns the first line of an exception's message, cut to 300 characters."""
    lines = str(error).splitlines()
    return lines[0][:300] if lines else ""
