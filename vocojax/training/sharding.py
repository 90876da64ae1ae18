"""The device mesh, and which mesh axes the logical axes of parameters and batches go to."""

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vocojax.config import ConfigError
from vocojax.models.parameters import variables_of
from vocojax.training.config import MeshConfig

AXES = ("data", "fsdp", "tensor")

# Logical axis of a parameter -> mesh axis. One table for vision tower, compressors, projector and decoder.
RULES: dict[str | None, str | None] = {
    None: None,
    "layers": None,
    "norm": None,
    "vision": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}
BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh over all devices.

    Raises:
      ConfigError: the axes' sizes don't multiply to the number of devices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    devices = jax.device_count()
    if -1 in sizes:
        sizes[sizes.index(-1)] = devices // -int(np.prod(sizes))
    if int(np.prod(sizes)) != devices:
        raise ConfigError("mesh", f"data x fsdp x tensor must be the {devices} devices there are, got "
                          f"{config.data} x {config.fsdp} x {config.tensor}")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parameter_shardings(model: nnx.Module, mesh: Mesh) -> dict[str, NamedSharding]:
    """The sharding of every parameter of a (possibly abstract) model by the table above.

    A dimension that its mesh axis does not divide stays whole.
    """
    def place(variable: nnx.Variable) -> NamedSharding:
        axes = [RULES[name] for name in variable.get_metadata()["out_sharding"]]
        parts = [axis if axis and size % mesh.shape[axis] == 0 else None
                 for size, axis in zip(variable.shape, axes, strict=True)]
        return NamedSharding(mesh, PartitionSpec(*parts))

    return {name: place(variable) for name, variable in variables_of(model).items()}


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a host batch on the mesh, rows over the data axes; each process brings the rows of its own devices."""
    sharding = NamedSharding(mesh, BATCH)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
