"""The device mesh: of a training run over all devices, and of inference over those of one process."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vocojax.config import ConfigError, require
from vocojax.kernels.sharding import BATCH_AXES

AXES = (*BATCH_AXES, "tensor")
LOCAL_AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(BATCH_AXES)


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; -1 for one of them means all that are left.

    slice: TPU slices that are joined by the data centre's network only; parameters are whole in each.
    data: copies of the parameters; fsdp: parts that every copy is cut into; rows are spread over all of these.
    tensor: parts that heads, MLP and vocabulary are cut into, with all rows on each.
    """

    slice: int = 1
    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = (self.slice, self.data, self.fsdp, self.tensor)
        require(all(s >= 1 or s == -1 for s in sizes), "slice", "data, fsdp and tensor must be >= 1 or -1", sizes)
        require(sizes.count(-1) <= 1, "slice", "at most one axis may be -1", sizes)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the devices, by default all there are. Neighbours on a TPU's torus stay neighbours on the axes.

    Raises:
      ConfigError: the axes' sizes don't multiply to the number of devices, or don't go with the slices they are in.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.slice, config.data, config.fsdp, config.tensor]
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // -math.prod(sizes)
    if math.prod(sizes) != len(devices):
        asked = " x ".join(str(size) for size in (config.slice, config.data, config.fsdp, config.tensor))
        raise ConfigError("mesh", f"slice x data x fsdp x tensor must be the {len(devices)} devices there are, "
                          f"got {asked}")
    on_tpu = devices[0].platform == "tpu"  # elsewhere a slice is a host, and an axis may span several
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if on_tpu else 1
    if slices > 1 and sizes[0] != slices:
        raise ConfigError("mesh.slice", f"must be the {slices} slices that the devices are in, got {sizes[0]}")
    try:  # `jax.make_mesh` refuses several slices, and to split an axis of the torus except on v5e
        if slices > 1:
            inside, across = (1, *sizes[1:]), (slices, 1, 1, 1)
            grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
        else:
            grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError) as error:
        raise ConfigError("mesh", f"slice x data x fsdp x tensor = {sizes} can't be laid over the {len(devices)} "
                          f"devices: {str(error)[:500]}") from error
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a host batch on the mesh, rows over the data axes; each process brings the rows of its own devices."""
    sharding = NamedSharding(mesh, BATCH)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def local_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of this process's devices, so that every process of a multi-host run works on its own.

    Raises:
      ConfigError: the axes' sizes don't multiply to the number of devices.
    """
    devices = np.array(jax.local_devices())
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = devices.size // max(1, -math.prod(sizes))
    if math.prod(sizes) != devices.size or min(sizes) < 1:
        raise ConfigError("mesh", f"data x fsdp x tensor must be the {devices.size} devices of this process, got "
                          f"{data} x {fsdp} x {tensor}")
    return Mesh(devices.reshape(sizes), LOCAL_AXES, axis_types=(AxisType.Auto,) * len(LOCAL_AXES))


def parse_mesh(sizes: str | None) -> Mesh | None:
    """The mesh that a launch script's `--mesh=data,fsdp,tensor` asks for; None, one device, where it is not given.

    Raises:
      ConfigError: it is not one to three whole numbers, or they don't multiply to the number of devices.
    """
    if sizes is None:
        return None
    numbers = sizes.split(",")
    require(len(numbers) <= len(LOCAL_AXES) and all(number.strip().removeprefix("-").isdecimal() for number in numbers),
            "--mesh", "must be whole numbers data,fsdp,tensor such as 4,1,2 (-1 for the rest)", sizes)
    return local_mesh(*map(int, numbers))


def row_multiple() -> int:
    """How many rows the mesh in force computes at once: batches are filled up to a multiple of it."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def place_rows(tree: Any) -> Any:
    """Host arrays on the devices: rows over the batch axes of the mesh in force, or whole on the one device."""
    if jax.sharding.get_abstract_mesh().empty:
        return jax.tree.map(jax.numpy.asarray, tree)
    mesh = jax.sharding.get_mesh()
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(axes)))
