"""Weights of a model as named arrays, wherever they lie: the protocol, shape checks, and reading into shardings."""

import re
from collections.abc import Collection, Mapping
from typing import Protocol

import jax
import numpy as np

from vocojax.errors import ConvertError
from vocojax.models.parameters import Parameters

Shape = tuple[int, ...]
Index = tuple[slice, ...]


class Weights(Protocol):
    """Named arrays: the tensors of some files, or the parameters of a model ('decoder/blocks/query/kernel').

    where: names the files in errors.
    shapes: what there is.
    """

    @property
    def where(self) -> str: ...

    @property
    def shapes(self) -> Mapping[str, Shape]: ...

    def dtype(self, name: str) -> np.dtype:
        """An array's dtype on disk."""
        ...

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """An array, or the slice of it at `index`."""
        ...


def check_tensors(
    expected: Mapping[str, Shape], present: Mapping[str, Shape], where: str, allowed: Collection[re.Pattern[str]] = ()
) -> list[str]:
    """Compares the tensors there are with those there should be.

    Args:
      expected, present: shapes by name.
      where: the file or directory, for the error.
      allowed: tensors that may be missing or superfluous.

    Returns:
      The names of tensors that are missing and may be.

    Raises:
      ConvertError: lists every missing, unexpected and wrongly shaped tensor.
    """
    may_differ = lambda name: any(pattern.fullmatch(name) for pattern in allowed)
    missing = expected.keys() - present.keys()
    shape = lambda name: f"{name} {list(present[name])} instead of {list(expected[name])}"
    problems = {
        "missing": sorted(name for name in missing if not may_differ(name)),
        "unexpected": sorted(name for name in present.keys() - expected.keys() if not may_differ(name)),
        "wrongly shaped": [shape(name) for name in sorted(expected.keys() & present.keys())
                           if tuple(present[name]) != tuple(expected[name])],
    }
    found = [f"{len(names)} {kind} tensors: {', '.join(names)}" for kind, names in problems.items() if names]
    if found:
        raise ConvertError(f"{where}: {'; '.join(found)}")
    return sorted(name for name in missing if may_differ(name))


def read_parameters(weights: Weights, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Parameters:
    """Reads parameters into the shardings and dtypes asked for; every device reads only its part.

    Args:
      weights: holds all of the wanted parameters, in the wanted shapes.
      wanted: shape, dtype and sharding by name.
    """
    parameters: Parameters = {}
    for path, leaf in wanted.items():
        read = lambda index, path=path, dtype=leaf.dtype: weights.read(path, index).astype(dtype, copy=False)
        parameters[path] = jax.make_array_from_callback(tuple(leaf.shape), leaf.sharding, read)
    return parameters


class ParametersInMemory:
    """The parameters of a model as `Weights`; every device's part must be within this process's reach."""

    where = "the model"

    def __init__(self, parameters: Mapping[str, jax.Array]):
        self._parameters = parameters
        self.shapes: dict[str, Shape] = {path: tuple(value.shape) for path, value in parameters.items()}

    def dtype(self, name: str) -> np.dtype:
        """The parameter's dtype."""
        return np.dtype(self._parameters[name].dtype)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """A parameter, or the slice of it at `index`."""
        value = self._parameters[name]
        if not value.is_fully_addressable:
            raise ConvertError(f"parameter {name} lies on other hosts too; convert the run's Orbax checkpoint instead")
        return np.asarray(value if index is None else value[index])
