"""Where parameters lie on a mesh, and how a gradient is computed on all of its devices.

Parameters lie in parts on the devices of axis `fsdp` (ZeRO-3, arXiv 1910.02054). Every device computes its own rows
with whole layers: a layer's parts are gathered in the dtype it computes in just before it runs, and its gradient is
summed and scattered into parts again as soon as it is there. Both are written out (`jax.shard_map`,
`models/gathering.py`). Left to XLA's partitioner on TPU they become all-reduces, which move twice the bytes.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vocojax.config import ConfigError
from vocojax.kernels.sharding import BATCH_AXES
from vocojax.models.gathering import Parts
from vocojax.models.parameters import variables_of
from vocojax.parallel.cluster import ClusterError
from vocojax.parallel.mesh import AXES, BATCH

# Logical axis of a parameter -> the mesh axes that may cut it. A mesh axis prefers the logical axes where it comes
# first. One table for vision tower, compressors, projector and decoder; optimizer state lies like its parameter.
RULES: dict[str | None, tuple[str, ...]] = {
    None: (),
    "layers": (),
    "norm": (),
    "embed": ("fsdp",),
    "vision": ("fsdp",),
    "heads": ("tensor", "fsdp"),
    "kv_heads": ("tensor", "fsdp"),
    "mlp": ("tensor", "fsdp"),
    "vocab": ("tensor", "fsdp"),
}
TILE_ROWS = 16  # rows of a bfloat16 tile in a TPU's memory; a part of fewer rows would be padded and copied
LARGE = 1 << 20  # a parameter with at least this many elements must not be whole on every device
PLANE = 16  # devices in a plane of a TPU's torus


def parameter_shardings(model: nnx.Module, mesh: Mesh) -> dict[str, NamedSharding]:
    """Returns the sharding of every parameter of a (possibly abstract) model, by its name.

    Raises:
      ConfigError: a large parameter would lie whole on every device.
    """
    shardings = {}
    for name, variable in variables_of(model).items():
        spec = _spec(variable.shape, variable.get_metadata()["out_sharding"], mesh.shape)
        if mesh.shape["fsdp"] > 1 and math.prod(variable.shape) >= LARGE and "fsdp" not in spec:
            raise ConfigError("mesh.fsdp", f"must divide an axis of every large parameter, but {mesh.shape['fsdp']} "
                              f"divides none of {name}, {variable.shape}")
        shardings[name] = NamedSharding(mesh, spec)
    return shardings


def _spec(shape: Sequence[int], names: Sequence[str | None], mesh: Mapping[str, int]) -> PartitionSpec:
    """Returns which axis of a parameter each mesh axis cuts, `tensor` before `fsdp`.

    Vectors stay whole: they are small, and gathering them costs a message each.

    Args:
      shape: of the parameter.
      names: the logical name of each of its axes.
      mesh: the size of each mesh axis.
    """
    spec: list[str | None] = [None] * len(shape)
    if sum(name != "layers" for name in names) < 2:
        return PartitionSpec(*spec)
    for mesh_axis in ("tensor", "fsdp"):
        ways = mesh[mesh_axis]
        if ways == 1:
            continue
        choices = []
        for axis, name in enumerate(names):
            if mesh_axis in RULES[name] and spec[axis] is None and shape[axis] % ways == 0:
                has_broken_tiles = shape[axis] // ways % TILE_ROWS != 0
                choices.append((has_broken_tiles, RULES[name].index(mesh_axis), axis))
        if choices:
            _, _, best = min(choices)
            spec[best] = mesh_axis
    return PartitionSpec(*spec)


def parts_of(shardings: Mapping[str, NamedSharding], mesh: Mesh) -> dict[str, Parts]:
    """Returns how each parameter that axis `fsdp` cuts is gathered, by its name."""
    parts = {}
    for name, sharding in shardings.items():
        if "fsdp" in sharding.spec:
            axis = sharding.spec.index("fsdp") - len(sharding.spec)
            parts[name] = Parts("fsdp", axis, _stages(mesh))
    return parts


def _stages(mesh: Mesh) -> tuple[int, ...]:
    """Returns the stages of a gather along `fsdp`, see `Parts.stages`.

    libtpu turns a gather that spans more than a plane of the torus into an all-reduce. It does not do so with a gather
    along the remaining axis followed by one in the plane.
    """
    size = mesh.shape["fsdp"]
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    return (PLANE, size // PLANE) if on_tpu and size > PLANE and size % PLANE == 0 else (size,)


def over_devices(
    function: Callable[..., tuple[Any, Any]], mesh: Mesh, shardings: Mapping[str, NamedSharding]
) -> Callable[..., tuple[Any, Any]]:
    """Returns a gradient function for all devices: each computes its own rows, and the results are summed.

    Axis `tensor` is left to XLA's partitioner.

    Args:
      function: (trained, state, batch) -> (gradients like `trained`, sums), for rows that are all on one device. It has
        to gather the parameters cut by `fsdp` with `models.gathering`, which sums their gradients along that axis.
      mesh: the devices.
      shardings: of all parameters, by name.
    """
    # With every axis manual, kernels run as they are. An axis that XLA's partitioner works on must not be.
    manual = BATCH_AXES if mesh.shape["tensor"] > 1 else AXES

    def specs_of(parameters: Mapping[str, Any]) -> dict[str, PartitionSpec]:
        """Returns the cuts of parameters by `fsdp` only."""
        return {name: PartitionSpec(*(axis if axis == "fsdp" else None for axis in shardings[name].spec))
                for name in parameters}

    def on_one_device(trained: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        grads, sums = function(trained, state, batch)
        summed = {}
        for name, grad in grads.items():
            is_summed_along_fsdp = "fsdp" in shardings[name].spec
            summed[name] = _sum(grad, BATCH_AXES[:-1] if is_summed_along_fsdp else BATCH_AXES, mesh)
        return summed, _sum(sums, BATCH_AXES, mesh)

    def run(trained: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        state = state._replace(optimizer=(), trained={}, ema={})  # the gradient needs none of them
        state_specs = state._replace(
            step=PartitionSpec(), frozen=specs_of(state.frozen), teacher=specs_of(state.teacher))
        mapped = jax.shard_map(
            on_one_device, mesh=mesh, in_specs=(specs_of(trained), state_specs, BATCH),
            out_specs=(specs_of(trained), PartitionSpec()), axis_names=set(manual), check_vma=False,
        )
        return mapped(trained, state, batch)

    return run


def _sum(tree: Any, axes: tuple[str, ...], mesh: Mesh) -> Any:
    """Returns the sums over the devices along those of the axes that have several."""
    axes = tuple(axis for axis in axes if mesh.shape[axis] > 1)
    return jax.lax.psum(tree, axes) if axes else tree


def row_share(sharding: NamedSharding, rows: int) -> tuple[int, int]:
    """Returns (index, count): which share of a batch's rows this process's devices hold, of how many shares.

    Processes have the same share where a mesh axis that splits no rows runs through several of them.

    Raises:
      ClusterError: the rows of two processes overlap but are not the same.
    """
    held: dict[int, set[tuple[int, int]]] = defaultdict(set)
    spans: Mapping[Any, Any] = sharding.devices_indices_map((rows,))
    for device, (span, *_) in spans.items():
        held[device.process_index].add(span.indices(rows)[:2])
    shares = sorted({tuple(sorted(spans)) for spans in held.values()})
    if len({span for share in shares for span in share}) != sum(map(len, shares)) or len(set(map(len, shares))) > 1:
        raise ClusterError(f"the mesh gives processes overlapping rows: {shares}")
    return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)
