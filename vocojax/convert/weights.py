"""Weights of a model, wherever they lie: what a converter reads from, and how an nnx module is filled from it."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from vocojax.convert.mapping import ConvertError, Shape, Slot, Table, check_tensors

Index = tuple[slice, ...]


class Tensors(Protocol):
    """Named tensors in files; `where` names the files in errors."""

    where: str
    shapes: Mapping[str, Shape]

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """A tensor, or the slice of it at `index`."""
        ...


class Weights(Protocol):
    """The parameters of a model by path ('decoder/blocks/query/kernel'); `shapes` lists those there are."""

    where: str
    shapes: Mapping[str, Shape]

    def read(self, path: str, index: Index | None = None) -> np.ndarray:
        """A parameter, or the slice of it at `index`, in the dtype it is stored in."""
        ...


class MappedWeights:
    """The parameters that a table finds in some tensors; only what is asked for is read.

    Args:
      table: the layout of the tensors.
      tensors: where they are.
      parameters: shapes of the model's parameters by path.
      allow_missing: regexes of tensors that may be missing; their parameters are absent from `shapes`.

    Raises:
      ConvertError: see `Table.resolve` and `check_tensors`.
    """

    def __init__(
        self, table: Table, tensors: Tensors, parameters: Mapping[str, Shape], allow_missing: Iterable[str] = ()
    ):
        self.where = tensors.where
        self._tensors = tensors
        self._names: dict[str, str] = {}
        for name in tensors.shapes:
            canonical = table.canonical(name)
            if table.ignores(canonical):
                continue
            if canonical in self._names:
                raise ConvertError(f"{self.where}: tensors {self._names[canonical]} and {name} are both {canonical}")
            self._names[canonical] = name
        slots = table.resolve(parameters)
        present = {canonical: tensors.shapes[name] for canonical, name in self._names.items()}
        missing = check_tensors({name: slot.shape for name, slot in slots.items()}, present, self.where, allow_missing)
        absent = {slots[name].path for name in missing}
        self.shapes = {path: shape for path, shape in parameters.items() if path not in absent}
        self._layers: dict[str, list[tuple[str, Slot]]] = {}
        for name, slot in slots.items():
            self._layers.setdefault(slot.path, []).append((name, slot))

    def read(self, path: str, index: Index | None = None) -> np.ndarray:
        index = tuple(slice(None) for _ in self.shapes[path]) if index is None else index
        layers = self._layers[path]
        if layers[0][1].layer is None:
            return self._read_slot(*layers[0], index)
        parts = [self._read_slot(name, slot, index[1:]) for name, slot in layers[index[0]]]
        return np.stack(parts)

    def _read_slot(self, name: str, slot: Slot, index: Index) -> np.ndarray:
        transform, name = slot.transform, self._names[name]
        if transform.transposes is None:
            return transform.forward(self._tensors.read(name))[index]
        return transform.forward(self._tensors.read(name, index[::-1] if transform.transposes else index))


def parameter_shapes(module: nnx.Module, prefix: str = "") -> dict[str, Shape]:
    """Shapes of a (possibly abstract) module's parameters by path."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {prefix + "/".join(map(str, path)): tuple(variable.shape) for path, variable in flat}


def fill(module: nnx.Module, weights: Weights, dtype: DTypeLike, shardings: Any = None, prefix: str = "") -> None:
    """Gives a (possibly abstract) module the parameters it has in `weights`; each device is sent only its part.

    Args:
      module: e.g. from `nnx.eval_shape`. Parameters that `weights` lacks keep their values.
      weights: where to read.
      dtype: of the parameters.
      shardings: of the module's `nnx.Param` state; None for the default device.
      prefix: of the module's paths in `weights`.
    """
    state = nnx.state(module, nnx.Param)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = dict(nnx.to_flat_state(shardings)) if shardings is not None else {}
    for key, variable in nnx.to_flat_state(state):
        path = prefix + "/".join(map(str, key))
        if path in weights.shapes:
            read = lambda index, path=path: weights.read(path, index).astype(dtype, copy=False)
            sharding = places.get(key, here)
            variable.set_value(jax.make_array_from_callback(tuple(variable.shape), sharding, read))
    nnx.update(module, state)
