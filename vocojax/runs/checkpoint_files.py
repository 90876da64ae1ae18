"""The files of one checkpoint of a run: arrays and progress, their checks, and the error for damaged ones."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from vocojax.errors import CheckpointError, first_line
from vocojax.files import write_atomically


def read_arrays(directory: epath.Path, wanted: Any) -> Any:
    """Reads arrays of a checkpoint.

    Args:
      directory: the part of the checkpoint that holds them.
      wanted: tree of shapes, dtypes and shardings. A dict may leave out some of the saved arrays.
    """
    return ocp.PyTreeCheckpointHandler().restore(directory, args=ocp.args.PyTreeRestore(
        item=wanted, partial_restore=isinstance(wanted, dict),
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
    ))


def read_progress(directory: epath.Path) -> dict[str, Any]:
    """Reads a checkpoint's progress file.

    Raises:
      CheckpointError: its content does not match its digest.
    """
    progress = json.loads((directory / "progress" / "metadata").read_text())
    if progress["sha256"] != sha256(progress):
        raise CheckpointError("the progress file was changed after it was saved (sha256)")
    return progress


def write_progress(directory: epath.Path, progress: Mapping[str, Any]) -> None:
    """Writes the progress file of a checkpoint that Orbax does not write."""
    content = json.dumps({**progress, "sha256": sha256(progress)})
    write_atomically(directory / "progress" / "metadata", content)


def sha256(progress: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a progress file's content without the entry `sha256`."""
    rest = {name: value for name, value in progress.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def not_saved(sums: Mapping[str, int], saved: Mapping[str, int], names: Iterable[str]) -> str:
    """Returns a problem that names the arrays whose checksums differ from the saved ones; '' if none differ.

    Args:
      sums: checksums of the arrays that were read, by name.
      saved: checksums that were saved with the checkpoint, by name.
      names: the arrays to compare.
    """
    changed = [name for name in names if sums.get(name) != saved.get(name)]
    return f"changed after they were saved (checksum): {shortened(changed)}" if changed else ""


def shortened(names: Sequence[str]) -> str:
    """Returns the first five names, separated by commas."""
    return ", ".join(names[:5]) + " ..." * (len(names) > 5)


def damaged(directory: epath.Path | Path, problem: str) -> CheckpointError:
    """Returns the error for a damaged part of a checkpoint, with the remedy.

    Args:
      directory: the part.
      problem: what is wrong with it.
    """
    remedy = ("If a training run wrote it, run its command again: the run moves this checkpoint aside and resumes from "
              "the one before. If launch/convert.py wrote it, convert again")
    if directory.name == "frozen":
        remedy = ("All checkpoints of the run need it, so an earlier one does not help. Copy it from a backup, or from "
                  "another run with the same config and init_from, which has the same")
    return CheckpointError(f"{directory} IS DAMAGED: {problem}. {remedy}")


def described(error: Exception) -> str:
    """Returns the type of an exception and the first line of its message."""
    return f"{type(error).__name__}: {first_line(error)}"
