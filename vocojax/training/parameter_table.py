"""The table of a stage's parameters: what each one is, how it is sharded, whether it trains, and where it is from."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import jax

from vocojax.files import write_atomically
from vocojax.parallel import processes
from vocojax.runs.directory import run_path

LOG = logging.getLogger(__name__)
_HEADER = ("parameter", "shape", "dtype", "sharding", "learning rate", "origin")


def report_parameters(
    workdir: str | Path,
    parameters: Mapping[str, jax.ShapeDtypeStruct],
    multipliers: Mapping[str, float],
    origins: Mapping[str, str],
) -> None:
    """Logs the table and writes it to WORKDIR/parameters.txt.

    Args:
      workdir: the run's directory.
      parameters: all of the model, with shardings. The blocks of a stack are one entry, with the layers as first axis.
      multipliers: of the learning rate, of those that train.
      origins: for each parameter where its first values are from.
    """
    if not processes.is_first():
        return
    table = parameter_table(parameters, multipliers, origins)
    LOG.info("the stage's parameters:\n%s", table)
    write_atomically(run_path(workdir) / "parameters.txt", table + "\n")


def parameter_table(
    parameters: Mapping[str, jax.ShapeDtypeStruct], multipliers: Mapping[str, float], origins: Mapping[str, str]
) -> str:
    """Returns the table as lines of aligned columns, with a line of totals; arguments as of `report_parameters`."""
    rows = [_HEADER]
    for name, leaf in parameters.items():
        rate = f"x {multipliers[name]:g}" if name in multipliers else "frozen"
        shape = " x ".join(map(str, leaf.shape)) or "scalar"
        rows.append((name, shape, str(leaf.dtype), _axes(leaf), rate, origins[name]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    count = {name: math.prod(leaf.shape) for name, leaf in parameters.items()}
    trained = sum(count[name] for name in multipliers)
    return "\n".join([*lines, f"{sum(count.values()):,} numbers in {len(count)} parameters, of which {trained:,} in "
                      f"{len(multipliers)} train"])


def _axes(leaf: jax.ShapeDtypeStruct) -> str:
    """Returns the mesh axes that each dimension is cut along, such as `-, fsdp`; `whole` for copies on all devices."""
    spec = getattr(leaf.sharding, "spec", ())
    cut = ["+".join((axes,) if isinstance(axes, str) else axes) if axes else "-" for axes in spec]
    return ", ".join(cut) if any(axes != "-" for axes in cut) else "whole"
