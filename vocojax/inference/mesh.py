"""Inference on several devices of one process: parameters by their logical axes, rows over the batch axes."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vocojax.config import ConfigError, require
from vocojax.kernels.sharding import BATCH_AXES

AXES = ("data", "fsdp", "tensor")


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
    return Mesh(devices.reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parse_mesh(sizes: str | None) -> Mesh | None:
    """The mesh that a launch script's `--mesh=data,fsdp,tensor` asks for; None, one device, where it is not given.

    Raises:
      ConfigError: it is not one to three whole numbers, or they don't multiply to the number of devices.
    """
    if sizes is None:
        return None
    numbers = sizes.split(",")
    require(len(numbers) <= len(AXES) and all(number.strip().removeprefix("-").isdecimal() for number in numbers),
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
