"""Lists a run's checkpoints: step, metrics, size, and whether each is sound.

    vocojax checkpoints runs/voco
    vocojax checkpoints runs/voco --json=checkpoints.json

Every array is read and compared with its checksum, unless --nocheck is given. A checkpoint is named RUN@STEP, and the
best one by the run's `checkpoint.best_metric` RUN@best, wherever a run is named (convert, answer, compress, evaluate,
init_from, a teacher); RUN without it is the newest.
"""

import dataclasses
import json
from collections.abc import Sequence

from absl import app, flags

from vocojax.cli.flag_checks import require_writable
from vocojax.errors import CheckpointError

FLAGS = flags.FLAGS
SHOWN = ("loss", "accuracy", "validation/loss", "validation/accuracy")


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_bool("check", True, "Read every array and compare its checksum.")
    flags.DEFINE_string("json", None, "File to write the list to.")
    require_writable("json")


def main(arguments: Sequence[str]) -> None:
    """Lists."""
    if len(arguments) != 1:
        raise app.UsageError(f"one run is named: vocojax checkpoints RUN, got {' '.join(arguments) or 'none'}")
    from vocojax.runs.listing import list_checkpoints

    (run,) = arguments
    found = list_checkpoints(run, FLAGS.check)
    if FLAGS.json:
        with open(FLAGS.json, "w", encoding="utf-8") as file:
            json.dump([dataclasses.asdict(one) for one in found], file, indent=2)
    shown = [name for name in SHOWN if any(name in one.metrics for one in found)]
    rows = [["step", *shown, "MiB", "state"]]
    for one in found:
        state = {None: "not checked", "": "sound"}.get(one.problem, f"DAMAGED: {one.problem}")
        values = [f"{one.metrics[name]:.4f}" if name in one.metrics else "-" for name in shown]
        rows.append([str(one.step), *values, f"{one.bytes / 2**20:,.1f}", state + ", best" * one.is_best])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for *numbers, state in rows:
        print("  ".join([*(cell.rjust(width) for cell, width in zip(numbers, widths[:-1], strict=True)), state]))
    if all(one.problem for one in found):
        raise CheckpointError(f"{run}: no checkpoint is sound")
