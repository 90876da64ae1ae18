"""The device mesh, where parameters and batches lie on it, and how a gradient is computed on all of it.

Parameters lie in parts on the devices of axis `fsdp` (ZeRO-3, arXiv 1910.02054). Every device computes its own rows
with whole layers: a layer's parts are gathered in the dtype it computes in just before it runs, and its gradient is
summed and scattered back into parts as soon as it is there. Both are written out (`jax.shard_map`, `models/parts.py`)
instead of being left to XLA's partitioner, which on TPU turns them into all-reduces of twice the bytes.
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

# Logical axis of a parameter -> the mesh axes that may cut it, best first. One table for vision tower, compressors,
# projector and decoder; optimizer state lies like the parameter that it belongs to.
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
TILE_ROWS = 16  # of a bfloat16 tile in a TPU's memory; a part of fewer rows is padded to it and laid out anew
LARGE = 1 << 20  # elements from which on a parameter must not be whole on every device
PLANE = 16  # devices in a plane of a TPU's torus


def parameter_shardings(model: nnx.Module, mesh: Mesh) -> dict[str, NamedSharding]:
    """The sharding of every parameter of a (possibly abstract) model by the table above.

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
    """Which axis each mesh axis cuts: the best of those that it divides, parts of whole tiles before others.

    Vectors stay whole: they are small, and gathering them costs a message each.
    """
    spec: list[str | None] = [None] * len(shape)
    if sum(name != "layers" for name in names) < 2:
        return PartitionSpec(*spec)
    for axis in ("tensor", "fsdp"):
        size = mesh[axis]
        able = [d for d, name in enumerate(names) if axis in RULES[name] and not spec[d] and shape[d] % size == 0]
        if able and size > 1:
            spec[min(able, key=lambda d: (shape[d] // size % TILE_ROWS != 0, RULES[names[d]].index(axis)))] = axis
    return PartitionSpec(*spec)


def parts_of(shardings: Mapping[str, NamedSharding], mesh: Mesh) -> dict[str, Parts]:
    """How each parameter that axis `fsdp` cuts is put together again."""
    parts = {}
    for name, sharding in shardings.items():
        if "fsdp" in sharding.spec:
            axis = sharding.spec.index("fsdp") - len(sharding.spec)
            parts[name] = Parts("fsdp", axis, _stages(mesh))
    return parts


def _stages(mesh: Mesh) -> tuple[int, ...]:
    """In how many devices each, the most significant first, a gather goes along `fsdp`.

    libtpu makes all-reduces of gathers that span more than a plane of the torus, but not of a gather along its
    remaining axis and then one in the plane.
    """
    size = mesh.shape["fsdp"]
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    return (PLANE, size // PLANE) if on_tpu and size > PLANE and size % PLANE == 0 else (size,)


def on_every_device(
    function: Callable[..., tuple[Any, Any]], mesh: Mesh, shardings: Mapping[str, NamedSharding]
) -> Callable[..., tuple[Any, Any]]:
    """A gradient function run by every device on its own rows, its results summed over all of them.

    Args:
      function: (trained, state, batch) -> (gradients like `trained`, sums), of rows that are all on one device.
      shardings: of all parameters. Those cut by `fsdp` must be gathered by `models.parts` inside the function, which
        has then summed their gradients along that axis already.

    Axis `tensor` is left to XLA's partitioner.
    """
    manual = BATCH_AXES if mesh.shape["tensor"] > 1 else AXES  # where all axes are manual, kernels run as they are
    only_fsdp = lambda sharding: PartitionSpec(*(axis if axis == "fsdp" else None for axis in sharding.spec))

    def run(trained: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        def local(trained: Any, state: Any, batch: Any) -> tuple[Any, Any]:
            grads, sums = function(trained, state, batch)
            left = lambda name: BATCH_AXES[:-1] if "fsdp" in shardings[name].spec else BATCH_AXES
            return {name: _sum(grad, left(name), mesh) for name, grad in grads.items()}, _sum(sums, BATCH_AXES, mesh)

        of = lambda parameters: {name: only_fsdp(shardings[name]) for name in parameters}
        # The optimizer state is no business of the gradient and would only be in the way.
        state = state._replace(optimizer=(), trained={})
        specs = state._replace(step=PartitionSpec(), frozen=of(state.frozen), teacher=of(state.teacher))
        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=(of(trained), specs, BATCH), out_specs=(of(trained), PartitionSpec()),
            axis_names=set(manual), check_vma=False,
        )
        return mapped(trained, state, batch)

    return run


def _sum(tree: Any, axes: tuple[str, ...], mesh: Mesh) -> Any:
    axes = tuple(axis for axis in axes if mesh.shape[axis] > 1)
    return jax.lax.psum(tree, axes) if axes else tree


def row_share(sharding: NamedSharding, rows: int) -> tuple[int, int]:
    """(index, count): which share of a batch's rows this process's devices hold, of how many shares.

    Processes have the same share where a mesh axis that splits no rows runs through several of them.

    Raises:
      ClusterError: two processes' rows overlap without being the same.
    """
    held: dict[int, set[tuple[int, int]]] = defaultdict(set)
    spans: Mapping[Any, Any] = sharding.devices_indices_map((rows,))
    for device, (span, *_) in spans.items():
        held[device.process_index].add(span.indices(rows)[:2])
    shares = sorted({tuple(sorted(spans)) for spans in held.values()})
    if len({span for share in shares for span in share}) != sum(map(len, shares)) or len(set(map(len, shares))) > 1:
        raise ClusterError(f"the mesh gives processes overlapping rows: {shares}")
    return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)
