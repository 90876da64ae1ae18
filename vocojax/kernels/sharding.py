"""Kernels on a mesh: every row and every head is its own problem, so each device keeps to the ones it holds."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

BATCH_AXES = ("slice", "data", "fsdp")
HEAD_AXES = ("tensor",)


def per_shard(
    function: Callable[..., Any], inputs: list[str], outputs: list[str], rows: int, heads: int, kv_heads: int
) -> Callable[..., Any]:
    """Returns `function` run by `shard_map` on the rows and heads of each device, or unchanged if no mesh is set.

    XLA can't cut a kernel into shards by itself, and in plain XLA code the skipping of empty chunks would ask all
    devices about every chunk. All axes of the mesh become manual, also those that nothing is spread over, because a TPU
    kernel accepts no other.

    Axes that do not divide the number of rows (one prompt on many devices) or of key/value heads are left out: the
    devices along them repeat the same work. That is right but wasteful, so it is logged.

    Args:
      function: of arrays that are all on one device.
      inputs: the axes of each argument. 'B' is spread over the batch axes of the mesh, 'H' and 'G' over its head axis,
        anything else is whole on every device.
      outputs: the axes of each result, likewise.
      rows: of the batch.
      heads: query heads.
      kv_heads: key/value heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind != AxisType.Manual
    }
    if math.prod(free.values()) == 1:
        return function
    by_rows = _dividing([axis for axis in BATCH_AXES if axis in free], free, rows, "rows")
    by_heads = _dividing([axis for axis in HEAD_AXES if axis in free], free, math.gcd(heads, kv_heads), "heads")
    axes = {"B": by_rows, "H": by_heads, "G": by_heads}
    spec = lambda names: PartitionSpec(*(axes.get(name) or None for name in names))
    in_specs, out_specs = tuple(map(spec, inputs)), tuple(map(spec, outputs))
    mapped = jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=set(free), check_vma=False)
    if AxisType.Explicit not in mesh.axis_types:
        return mapped
    # On explicit axes an array must already lie where shard_map wants it.
    placed = lambda x, spec: jax.tree.map(lambda leaf: jax.reshard(leaf, spec), x)
    return lambda *arguments: mapped(*map(placed, arguments, in_specs))


def _dividing(axes: list[str], sizes: dict[str, int], count: int, what: str) -> tuple[str, ...]:
    """Returns the longest run of `axes` whose devices divide `count` things evenly."""
    kept: tuple[str, ...] = ()
    for axis in axes:
        if count % math.prod(sizes[a] for a in (*kept, axis)):
            _warn(f"kernels: {count} {what} do not divide over mesh axis {axis!r} of {sizes[axis]} devices")
            break
        kept += (axis,)
    return kept


def device_kind() -> str:
    """Returns the kind of device that the program is built for: the mesh's, which may be another machine's, else that
    of the local ones."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind


@functools.cache
def _warn(message: str) -> None:
    logging.getLogger(__name__).warning("%s; each of them does all of the work", message)
