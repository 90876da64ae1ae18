"""Parameters that are cut into parts over several devices, and gathered where they are used (ZeRO-3, arXiv 1910.02054).

Inside a `jax.shard_map` a variable may hold one part of its parameter. Its metadata says so (`cut`, a `Parts`). A
stack's variables are gathered layer by layer inside its scan, so that one layer is whole at a time. All others are
gathered by whoever runs the model (`gathered(model, stacked=False)`). Without cut variables nothing happens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

Model = TypeVar("Model", bound=nnx.Module)


@dataclass(frozen=True)
class Parts:
    """How a parameter is cut along one axis, and how it is gathered.

    Attributes:
      mesh_axis: the mesh axis whose devices hold the parts, device d the part d.
      axis: which axis of the parameter is cut, counted from the last (-1).
      stages: the gather runs in one stage over all devices, `(size,)`, or in two, `(outer, inner)`.
    """

    mesh_axis: str
    axis: int
    stages: tuple[int, ...]

    def gather(self, part: jax.Array) -> jax.Array:
        """Returns the whole array. The transpose of this sums over the devices and leaves each its part."""
        # Parts are moved as leading rows: XLA would copy cut columns narrower than a register into another layout.
        x = jnp.moveaxis(part, self.axis, 0)
        for groups in self._groups():
            x = jax.lax.all_gather(x, self.mesh_axis, axis=0, tiled=True, axis_index_groups=groups)
            x = checkpoint_name(x, "gathered")
        return checkpoint_name(jnp.moveaxis(x, 0, self.axis), "gathered")

    def _groups(self) -> list[list[list[int]] | None]:
        """Returns the groups of devices that gather together, for each stage in the order in which they run.

        One stage is one group of all devices (None). Two stages see the devices as a table of `outer` rows and `inner`
        columns. With outer = 3 and inner = 2, device 0 gathers its parts so:

            devices   0 1      first within each row:       [0 1] [2 3] [4 5]     device 0 has parts 0 1
                      2 3      then within each column:     [0 2 4] [1 3 5]       device 0 has parts 0 1 2 3 4 5
                      4 5

        After the first stage a device holds neighbouring parts. So the second stage leaves all parts in order.
        """
        if len(self.stages) == 1:
            return [None]
        outer, inner = self.stages
        rows = [[row * inner + column for column in range(inner)] for row in range(outer)]
        columns = [[row * inner + column for row in range(outer)] for column in range(inner)]
        return [rows, columns]


def cut(model: Model, parts: Mapping[str, Parts], dtype: DTypeLike) -> Model:
    """Returns a copy of the (abstract) model whose named variables are parts, which are gathered in `dtype`."""
    graphdef, state = nnx.split(nnx.clone(model))  # a split shares its variables with the model
    flat = nnx.to_flat_state(state)
    for path, variable in flat:
        if part := parts.get("/".join(map(str, path))):
            variable.set_metadata(cut=part, gathered_dtype=jnp.dtype(dtype))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def in_parts(module: nnx.Module) -> bool:
    """Returns whether any of a module's variables is cut."""
    return any(_is_cut(variable) for _, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)))


def gathered(module: Model, *, stacked: bool) -> Model:
    """Returns the module with some of its cut variables gathered.

    Args:
      module: the model, or with `stacked` one layer of a stack inside its scan.
      stacked: gathers the variables of stacks; if False, all others.
    """
    if not in_parts(module):
        return module

    def whole(variable: nnx.Variable) -> nnx.Variable:
        if not _is_cut(variable) or _is_stacked(variable) != stacked:
            return variable
        metadata, part = variable.get_metadata(), variable[...]
        array = metadata["cut"].gather(part.astype(metadata["gathered_dtype"]))
        # A layer of a stack is used once. Others are used often (the head by every chunk of the targets, the embedding
        # by every token): their gradient must be summed in fp32 before it is sent, so they are used in their own dtype.
        return variable.replace(array if stacked else array.astype(part.dtype))

    graphdef, state = nnx.split(module)
    flat = [(path, whole(variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def scatter_gradients_first(module: Model, x: jax.Array) -> tuple[Model, jax.Array]:
    """Returns both unchanged, and orders the backward pass: the gradient of `x` waits for those of the module.

    `x` is what the module will be applied to. Its gradient is passed on only when the gradients of the variables that
    `gathered(module, stacked=False)` gathers have been scattered into parts. Otherwise XLA may keep these gradients
    whole in memory until the end of the backward pass.
    """
    graphdef, state = nnx.split(module)
    flat = []
    for path, variable in nnx.to_flat_state(state):
        if _is_cut(variable) and not _is_stacked(variable):
            part, x = _gradients_together(variable[...], x)
            variable = variable.replace(part)
        flat.append((path, variable))
    return nnx.merge(graphdef, nnx.from_flat_state(flat)), x


@jax.custom_vjp
def _gradients_together(part: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns both unchanged. On the way back neither gradient is used before both are there."""
    return part, x


_gradients_together.defvjp(
    lambda part, x: ((part, x), None), lambda _, gradients: jax.lax.optimization_barrier(gradients)
)


def _is_cut(variable: nnx.Variable) -> bool:
    return "cut" in variable.get_metadata()


def _is_stacked(variable: nnx.Variable) -> bool:
    """Returns whether a variable belongs to a stack: it has an axis of layers, or had it before the scan took one."""
    return "layers" in variable.get_metadata()["out_sharding"]
