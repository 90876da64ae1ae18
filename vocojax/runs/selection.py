"""Names of a run's checkpoints: RUN is the newest, RUN@500 that of step 500, RUN@best the best by the run's metric."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from vocojax.errors import CheckpointError
from vocojax.hub import SCHEME
from vocojax.runs.earlier import upgraded_metrics

BEST = "best"


def split_name(name: str | os.PathLike) -> tuple[str | os.PathLike, str]:
    """Returns a run's directory and the checkpoint that its name chooses: a step, 'best', or '' for the newest.

    Only the name of a run can choose one. A directory that is itself called so, and a revision on the hub, are names
    without a choice.
    """
    text = os.fspath(name)
    directory, _, choice = text.rpartition("@")
    is_choice = choice == BEST or (choice.isascii() and choice.isdecimal())
    if not directory or not is_choice or text.startswith(SCHEME):
        return name, ""
    if epath.Path(text).exists() or not (epath.Path(directory) / "checkpoints").is_dir():
        return name, ""
    return directory, choice


def chosen_step(path: epath.Path, choice: str, config: Mapping[str, Any]) -> int:
    """Returns the step of the checkpoint that a name chooses.

    Args:
      path: the run's directory.
      choice: see `split_name`.
      config: of the run; its `checkpoint.best_metric` and `best_is` say which is the best.

    Raises:
      CheckpointError: there is no complete checkpoint, or not the one that is chosen.
    """
    steps = sorted(ocp.utils.checkpoint_steps(path / "checkpoints")) if (path / "checkpoints").is_dir() else []
    if not steps:
        raise CheckpointError(f"{path} holds no complete checkpoint; check the path, or train first")
    if not choice:
        return steps[-1]
    if choice == BEST:
        return best_step(path, steps, config)
    if int(choice) not in steps:
        raise CheckpointError(f"{path}: has no checkpoint of step {choice}, but of {', '.join(map(str, steps))}; name "
                              "one of these")
    return int(choice)


def best_step(path: epath.Path, steps: list[int], config: Mapping[str, Any]) -> int:
    """Returns the step of the best checkpoint, the newest of several that are equally good.

    Raises:
      CheckpointError: no checkpoint has the metric: the run was not to keep its best.
    """
    rules = config.get("checkpoint", {})
    metric, sign = rules.get("best_metric", "loss"), -1 if rules.get("best_is", "lowest") == "lowest" else 1
    values = {step: sign * saved_metrics(path, step).get(metric, math.nan) for step in steps}
    known = [step for step in steps if math.isfinite(values[step])]
    if not known:
        raise CheckpointError(f"{path}: no checkpoint was saved with its {metric}, so none is known as the best; train "
                              "with --config.checkpoint.keep_best=1, or name a step (`vocojax checkpoints` lists them)")
    return max(known, key=lambda step: (values[step], step))


def saved_metrics(path: epath.Path, step: int) -> dict[str, float]:
    """Returns the metrics that a checkpoint was saved with; {} if there are none, or they are damaged."""
    try:
        values = json.loads((path / "checkpoints" / str(step) / "metrics" / "metrics").read_text())
        return upgraded_metrics({name: float(value) for name, value in values.items()})
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def refuse_choice(workdir: str | Path) -> None:
    """Raises `CheckpointError` if a directory that is to be written is the name of a checkpoint."""
    directory, choice = split_name(workdir)
    if choice:
        raise CheckpointError(f"{workdir}: names a checkpoint of {directory}, which is only read; name a directory to "
                              "write, and the checkpoint as --config.init_from")
