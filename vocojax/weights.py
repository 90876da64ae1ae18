"""Weights of a model as named arrays: their protocol for any source, checks of shapes, and reading into shardings."""

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

    Attributes:
      where: the files, for errors.
      shapes: shapes of all arrays by name.
    """

    @property
    def where(self) -> str: ...

    @property
    def shapes(self) -> Mapping[str, Shape]: ...

    def dtype(self, name: str) -> np.dtype:
        """Returns an array's dtype as stored."""
        ...

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Reads an array, or the slice of it at `index`."""
        ...


def check_tensors(
    expected: Mapping[str, Shape], present: Mapping[str, Shape], where: str, allowed: Collection[re.Pattern[str]] = ()
) -> list[str]:
    """Compares the present tensors with the expected ones.

    Args:
      expected: shapes by name.
      present: shapes by name.
      where: the file or directory, for the error.
      allowed: regexes of tensors that may be missing or unexpected.

    Returns:
      The names of the missing tensors, all of which may be missing.

    Raises:
      ConvertError: tensors are missing, unexpected or have another shape (all are named).
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


def misfit(where: str, present: Mapping[str, Shape], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> str:
    """Returns the error message for weights that a stage's model can't start from; '' if all wanted parameters fit.

    Args:
      where: the file or directory, for the message.
      present: shapes of the parameters that there are.
      wanted: parameters of the model.
    """
    problems = [f"{name} is missing" for name in wanted if name not in present]
    problems += [f"{name} has shape {tuple(present[name])}, expected {leaf.shape}" for name, leaf in wanted.items()
                 if name in present and tuple(present[name]) != tuple(leaf.shape)]
    if not problems:
        return ""
    return (f"{where} does not fit the model: {'; '.join(problems)}; set config.model as in its config.json, or list "
            "in init_new what the stage does not take from it")


def read_parameters(weights: Weights, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Parameters:
    """Reads parameters with the wanted dtypes and shardings. Each device reads only its part.

    Args:
      weights: has all wanted parameters, in the wanted shapes.
      wanted: shape, dtype and sharding by name.
    """
    parameters: Parameters = {}
    for path, leaf in wanted.items():
        read = lambda index, path=path, dtype=leaf.dtype: weights.read(path, index).astype(dtype, copy=False)
        parameters[path] = jax.make_array_from_callback(tuple(leaf.shape), leaf.sharding, read)
    return parameters


class ParametersInMemory:
    """The parameters of a model as `Weights`; all of their shards must be on devices of this process.

    Args:
      parameters: arrays by path.

    Attributes:
      where: 'the model', for errors.
      shapes: shapes of the parameters by path.
    """

    where = "the model"

    def __init__(self, parameters: Mapping[str, jax.Array]):
        self._parameters = parameters
        self.shapes: dict[str, Shape] = {path: tuple(value.shape) for path, value in parameters.items()}

    def dtype(self, name: str) -> np.dtype:
        """Returns the parameter's dtype."""
        return np.dtype(self._parameters[name].dtype)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Returns a parameter, or the slice of it at `index`, as a host array.

        Raises:
          ConvertError: devices of other processes hold parts of it.
        """
        value = self._parameters[name]
        if not value.is_fully_addressable:
            raise ConvertError(f"parts of parameter {name} are on other hosts; convert the run's Orbax checkpoint "
                               "instead, with launch/convert.py")
        return np.asarray(value if index is None else value[index])
