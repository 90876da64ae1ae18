"""The device mesh: one set of axes for training on all devices and for inference on those of one process."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vocojax.config import ConfigError, require
from vocojax.kernels.sharding import BATCH_AXES

AXES = (*BATCH_AXES, "tensor")
BATCH = PartitionSpec(BATCH_AXES)  # rows over every axis that has rows of its own


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; -1 for one of them means all that are left.

    Attributes:
      slice: TPU slices, which only the data centre's network joins. Each holds all parameters.
      data: copies of the parameters within a slice.
      fsdp: parts that each copy is cut into. Rows are split over `slice`, `data` and `fsdp`.
      tensor: parts that heads, MLP and vocabulary are cut into. Each part sees all rows.
    """

    slice: int = 1
    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        axes = ", ".join(AXES)
        require(all(size >= 1 or size == -1 for size in self.sizes), axes, "must each be >= 1, or -1", self.sizes)
        require(self.sizes.count(-1) <= 1, axes, "must hold -1 at most once", self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes in the order of `AXES`."""
        return self.slice, self.data, self.fsdp, self.tensor

    def over(self, count: int) -> "MeshConfig":
        """Returns the mesh over this number of devices, with what is left of them in place of -1.

        Raises:
          ConfigError: the sizes do not multiply to `count`.
        """
        left = count // -math.prod(self.sizes)  # means nothing unless one size is -1
        sizes = tuple(left if size == -1 else size for size in self.sizes)
        if math.prod(sizes) != count:
            raise ConfigError("mesh", f"slice x data x fsdp x tensor must multiply to the {count} devices there are, "
                              f"got {' x '.join(map(str, self.sizes))}")
        return MeshConfig(**dict(zip(AXES, sizes, strict=True)))


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays a mesh over the devices, by default all of them. Neighbours on a TPU's torus stay neighbours on the axes.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or do not fit the slices that these are in.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.over(len(devices)).sizes
    on_tpu = devices[0].platform == "tpu"  # elsewhere a slice is a host, and an axis may span several
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if on_tpu else 1
    if slices > 1 and sizes[0] != slices:
        raise ConfigError("mesh.slice", f"must be the {slices} slices that the devices are in, got {sizes[0]}")
    try:  # `jax.make_mesh` refuses several slices, and splits an axis of the torus on v5e only
        if slices > 1:
            inside, across = (1, *sizes[1:]), (slices, 1, 1, 1)
            grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
        else:
            grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError) as error:
        raise ConfigError("mesh", f"slice x data x fsdp x tensor = {list(sizes)} can't be laid over the {len(devices)} "
                          f"devices: {str(error)[:500]}") from error
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def local_mesh(config: MeshConfig) -> Mesh:
    """Lays a mesh over this process's devices, so that every process of a multi-host run works on its own.

    Raises:
      ConfigError: as `make_mesh`.
    """
    return make_mesh(config, jax.local_devices())


def parse_mesh(sizes: str | None) -> Mesh | None:
    """Returns the local mesh that `--mesh=data,fsdp,tensor` asks for; None, one device, if the flag is not given.

    Raises:
      ConfigError: the text is not one to three whole numbers, or they do not multiply to the number of devices.
    """
    if sizes is None:
        return None
    axes, numbers = AXES[1:], sizes.split(",")
    require(len(numbers) <= len(axes) and all(number.strip().removeprefix("-").isdecimal() for number in numbers),
            "--mesh", "must be whole numbers data,fsdp,tensor such as 4,1,2 (-1 for the rest)", sizes)
    return local_mesh(MeshConfig(**dict(zip(axes, map(int, numbers), strict=False))))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a host batch on the mesh, rows over the batch axes. Each process brings the rows of its own devices."""
    sharding = NamedSharding(mesh, BATCH)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def place_rows(tree: Any) -> Any:
    """Puts host arrays on the devices: rows over the batch axes of the mesh in force, without a mesh on one device."""
    if jax.sharding.get_abstract_mesh().empty:
        return jax.tree.map(jax.numpy.asarray, tree)
    return jax.device_put(tree, NamedSharding(jax.sharding.get_mesh(), BATCH))


def row_multiple() -> int:
    """Returns how many rows the mesh in force computes at once. Batches are filled up to a multiple of it."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)
