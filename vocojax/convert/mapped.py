"""The parameters of a model, read from tensors in a published layout."""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from vocojax.convert.mapping import Slot, Table
from vocojax.errors import ConvertError
from vocojax.weights import Index, Shape, Weights, check_tensors


class MappedWeights:
    """The parameters of a model in some tensors. A tensor is read only when its parameter is.

    Args:
      table: the layout of the tensors.
      tensors: the tensors.
      parameters: shapes of the model's parameters by path.
      allow_missing: regexes of tensors that may be missing or unexpected. Parameters whose tensors are missing are
        absent from `shapes`.

    Attributes:
      where: the files, for errors.
      shapes: shapes of the parameters by path.

    Raises:
      ConvertError: two tensors are the same one under two names; see also `Table.resolve` and `check_tensors`.
    """

    def __init__(
        self, table: Table, tensors: Weights, parameters: Mapping[str, Shape], allow_missing: Iterable[str] = ()
    ):
        self.where = tensors.where
        self._tensors = tensors
        self._names: dict[str, str] = {}
        allowed = [re.compile(pattern) for pattern in allow_missing]
        for name in tensors.shapes:
            canonical = table.canonical(name)
            if table.ignores(canonical):
                continue
            if canonical in self._names:
                raise ConvertError(f"{self.where}: tensors {self._names[canonical]} and {name} are both {canonical}; "
                                   "remove one of them")
            self._names[canonical] = name
        slots = table.resolve(parameters)
        present = {canonical: tensors.shapes[name] for canonical, name in self._names.items()}
        missing = check_tensors({name: slot.shape for name, slot in slots.items()}, present, self.where, allowed)
        absent = {slots[name].path for name in missing}
        self.shapes = {path: shape for path, shape in parameters.items() if path not in absent}
        self._layers: dict[str, list[tuple[str, Slot]]] = {}
        for name, slot in slots.items():
            if slot.path not in absent:
                self._layers.setdefault(slot.path, []).append((self._names[name], slot))

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of a parameter: one that can hold the values of all its layers."""
        return np.result_type(*{self._tensors.dtype(source) for source, _ in self._layers[name]})

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Reads a parameter, or the slice of it at `index`."""
        layers = self._layers[name]
        index = tuple(slice(None) for _ in self.shapes[name]) if index is None else index
        if layers[0][1].layer is None:
            return self._read_slot(*layers[0], index)
        wanted = layers[index[0]]
        shape = tuple(len(range(*part.indices(size))) for part, size in zip(index, self.shapes[name], strict=True))
        stacked = np.empty(shape, self.dtype(name))
        for layer, (source, slot) in enumerate(wanted):
            stacked[layer] = self._read_slot(source, slot, index[1:])
        return stacked

    def _read_slot(self, source: str, slot: Slot, index: Index) -> np.ndarray:
        transform = slot.transform
        if transform.transposes is None:
            return transform.forward(self._tensors.read(source))[index]
        return transform.forward(self._tensors.read(source, index[::-1] if transform.transposes else index))
