"""Parameters that lie in parts on several devices, put together where they are used.

Inside a `jax.shard_map` a model's variables may hold parts. Which ones do, and how, stands in the variable's metadata
(`cut`). A stack's variables are gathered layer by layer in its scan, so that one layer is whole at a time; all others
by whoever runs the model (`gathered(model, stacked=False)`). Where nothing is cut, nothing happens.
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
    """A parameter cut along one axis.

    mesh_axis: whose devices hold the parts. axis: which one is cut, counted from the last (-1).
    stages: the gather goes in this many steps, along groups of these many devices each, most significant first.
    """

    mesh_axis: str
    axis: int
    stages: tuple[int, ...]

    def gather(self, part: jax.Array) -> jax.Array:
        """The whole array. Its transpose sums over the devices and leaves each its part."""
        # Parts are moved as leading rows: cut columns narrower than a register would be laid out anew.
        x = jnp.moveaxis(part, self.axis, 0)
        for groups in self._groups():
            x = jax.lax.all_gather(x, self.mesh_axis, axis=0, tiled=True, axis_index_groups=groups)
            x = checkpoint_name(x, "gathered")
        return checkpoint_name(jnp.moveaxis(x, 0, self.axis), "gathered")

    def _groups(self) -> list[list[list[int]] | None]:
        """The groups of devices of each stage, the innermost stage first."""
        if len(self.stages) == 1:
            return [None]
        outer, inner = self.stages
        return [
            [[o * inner + i for i in range(inner)] for o in range(outer)],
            [[o * inner + i for o in range(outer)] for i in range(inner)],
        ]


def cut(model: Model, parts: Mapping[str, Parts], dtype: DTypeLike) -> Model:
    """The (abstract) model with the named variables marked as parts that are gathered in `dtype`."""
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    for path, variable in flat:
        if part := parts.get("/".join(map(str, path))):
            variable.set_metadata(cut=part, gathered_dtype=jnp.dtype(dtype))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def in_parts(module: nnx.Module) -> bool:
    """Whether any of a module's variables is cut."""
    return any("cut" in variable.get_metadata() for _, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)))


def gathered(module: Model, *, stacked: bool) -> Model:
    """The module with its parts put together: of stacks' variables (one layer of them), or of all others."""

    def put_together(variable: nnx.Variable) -> nnx.Variable:
        metadata = variable.get_metadata()
        if "cut" not in metadata or ("layers" in metadata["out_sharding"]) != stacked:
            return variable
        whole = metadata["cut"].gather(variable[...].astype(metadata["gathered_dtype"]))
        # A stack's layer is used once. Others are used often (the head by every chunk of the targets, the embedding by
        # every token), so their gradient must be summed in fp32 before it is sent: in the dtype of what is used.
        return variable.replace(whole if stacked else whole.astype(variable[...].dtype))

    if not in_parts(module):
        return module
    graphdef, state = nnx.split(module)
    flat = [(path, put_together(variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def held_back(module: Model, x: jax.Array) -> tuple[Model, jax.Array]:
    """Both as they are, but on the way back `x`'s gradient waits until those of the parts that
    `gathered(module, stacked=False)` gathers are in parts. Else XLA keeps them whole all along, if it sees fit."""
    graphdef, state = nnx.split(module)
    flat = dict(nnx.to_flat_state(state))
    metadata = {path: variable.get_metadata() for path, variable in flat.items()}
    for path, known in metadata.items():
        if "cut" in known and "layers" not in known["out_sharding"]:
            part, x = _in_turn(flat[path][...], x)
            flat[path] = flat[path].replace(part)
    return nnx.merge(graphdef, nnx.from_flat_state(list(flat.items()))), x


@jax.custom_vjp
def _in_turn(part: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return part, x


_in_turn.defvjp(lambda part, x: ((part, x), None), lambda _, gradients: jax.lax.optimization_barrier(gradients))
