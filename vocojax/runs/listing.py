"""The list of a run's checkpoints: what each holds, what it measured, and whether it is sound."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vocojax.errors import CheckpointError
from vocojax.runs.checkpoint_files import described, not_saved, read_progress
from vocojax.runs.checksums import host_checksum
from vocojax.runs.directory import checkpoint_steps, run_config, run_path
from vocojax.runs.earlier import upgraded_metrics
from vocojax.runs.selection import best_step, saved_metrics


@dataclass(frozen=True)
class Listed:
    """A checkpoint of a run.

    Attributes:
      step: optimizer steps taken.
      metrics: of this step, from metrics.jsonl and from the checkpoint itself.
      bytes: size of its files, without the frozen parameters, which all checkpoints of a run share.
      is_best: whether `RUN@best` is this one.
      problem: what is wrong with it; '' if it is sound, None if that was not looked at.
    """

    step: int
    metrics: dict[str, float]
    bytes: int
    is_best: bool
    problem: str | None


def list_checkpoints(workdir: str | Path, check: bool = True) -> list[Listed]:
    """Lists a run's checkpoints in order.

    Args:
      workdir: the run's directory.
      check: whether to read every array and compare its checksum, which takes memory for all of a part (the optimizer's
        state is the largest) and as long as reading takes.

    Raises:
      CheckpointError: the directory holds no run, or no checkpoint.
    """
    path, config = run_path(workdir), run_config(workdir)
    steps = checkpoint_steps(path)
    if not steps:
        raise CheckpointError(f"{path} holds no checkpoint; check the path, or train first")
    try:
        best = best_step(path, steps, config)
    except CheckpointError:
        best = None
    logged, frozen = _logged(path / "metrics.jsonl"), _sums(path / "frozen") if check else {}
    return [
        Listed(step, logged.get(step, {}) | saved_metrics(path, step), _size(path / "checkpoints" / str(step)),
               step == best, _problem(path / "checkpoints" / str(step), frozen) if check else None)
        for step in steps
    ]


def _problem(directory: epath.Path, frozen: dict[str, int] | str) -> str:
    """Returns what is wrong with a checkpoint, '' if nothing is; `frozen` is from `_sums`."""
    try:
        saved = read_progress(directory)["checksums"]
    except Exception as error:  # a damaged file may have any content
        return described(error)
    sums = dict[str, int]()
    parts = [frozen, *(_sums(directory / part) for part in ("parameters", "optimizer", "ema"))]
    for part in parts:
        if isinstance(part, str):
            return part
        sums |= part
    return not_saved(sums, saved, saved)


def _sums(directory: epath.Path) -> dict[str, int] | str:
    """Returns the checksums of the arrays in one part of a checkpoint, or what is wrong; {} for a part that is not."""
    if not directory.exists():
        return {}
    try:
        handler = ocp.PyTreeCheckpointHandler()
        metadata = handler.metadata(directory)
        tree: Any = getattr(metadata, "tree", metadata)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        arrays = handler.restore(directory, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        return {f"{directory.name}/{name}": host_checksum(np.asarray(array)) for name, array in _named(arrays)}
    except Exception as error:  # whatever a damaged file makes of Orbax and TensorStore
        return f"{directory.name}: {described(error)}"


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(keys, simple=True, separator="/"), leaf


def _size(directory: epath.Path) -> int:
    return sum(_size(entry) if entry.is_dir() else entry.stat().length for entry in directory.iterdir())


def _logged(history: epath.Path) -> dict[int, dict[str, float]]:
    """Returns the metrics of every step in metrics.jsonl; lines that can't be read are left out."""
    found: dict[int, dict[str, float]] = {}
    for line in history.read_text().splitlines() if history.exists() else ():
        try:
            values = json.loads(line)
            found[int(values.pop("step"))] = upgraded_metrics(values)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return found
