"""A model's parameters as a flat dict: path name (`decoder/blocks/query/kernel`) -> array."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

Model = TypeVar("Model", bound=nnx.Module)
Parameters = dict[str, jax.Array]


def abstract(make: Callable[[], Model]) -> Model:
    """Returns the model that `make` would build, with shapes instead of arrays."""
    return jax.eval_shape(make)


def parameters_of(model: nnx.Module) -> Parameters:
    """Returns every parameter by its path name, in sorted order."""
    return {name: variable[...] for name, variable in variables_of(model).items()}


def variables_of(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Returns every parameter's `nnx.Variable`, which also knows its logical axes."""
    return {_name(path): variable for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def with_parameters(model: Model, parameters: Mapping[str, Any]) -> Model:
    """Returns a copy of a (possibly abstract) model that holds the given parameters.

    Raises:
      ValueError: names are missing or unknown.
    """
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    names = [_name(path) for path, _ in flat]
    if missing := sorted(set(names) - parameters.keys()):
        raise ValueError(f"parameters are missing: {', '.join(missing)}")
    if unknown := sorted(parameters.keys() - set(names)):
        raise ValueError(f"parameters are not the model's: {', '.join(unknown)}")
    filled = [(path, variable.replace(parameters[name])) for (path, variable), name in zip(flat, names, strict=True)]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))
