"""The tensors of a directory (one file or shards with an index), and of several places together."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vocojax.convert.pickle_files import PickleFile
from vocojax.convert.safetensors_files import SafetensorsFile
from vocojax.errors import ConvertError
from vocojax.weights import Index, Weights

# Name of the single file and of the index, by preference.
_FORMS = (
    ("model.safetensors", "model.safetensors.index.json", "*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model*.bin"),
)


class MergedTensors:
    """The tensors of several sources under one roof.

    Args:
      where: what they are together, for errors.
      parts: sources, each with what renames its tensors.

    Raises:
      ConvertError: two parts have a tensor of the same name.
    """

    def __init__(self, where: str, parts: list[tuple[Weights, Callable[[str], str]]]):
        self.where = where
        self._homes: dict[str, tuple[Weights, str]] = {}
        for part, rename in parts:
            for name in part.shapes:
                new = rename(name)
                if new in self._homes:
                    raise ConvertError(f"{part.where}: tensor {name} is in {self._homes[new][0].where} already")
                self._homes[new] = part, name
        self.shapes = {new: part.shapes[name] for new, (part, name) in self._homes.items()}

    def dtype(self, name: str) -> np.dtype:
        """The tensor's dtype."""
        part, own = self._homes[name]
        return part.dtype(own)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """A tensor, or the slice of it at `index`."""
        part, own = self._homes[name]
        return part.read(own, index)


def open_file(path: str | Path) -> Weights:
    """One file of tensors: safetensors by its suffix, anything else as torch's.

    Raises:
      ConvertError: it doesn't exist or can't be read.
    """
    if not Path(path).is_file():
        raise ConvertError(f"{path}: no such file")
    return SafetensorsFile(path) if str(path).endswith(".safetensors") else PickleFile(path)


def open_directory(directory: str | Path) -> Weights:
    """The tensors of a directory in transformers' file layout; safetensors win over `.bin`.

    Raises:
      ConvertError: no weights, or shards and index that disagree.
    """
    directory = Path(directory)
    for single, index, pattern in _FORMS:
        if (directory / index).is_file():
            return _open_shards(directory, directory / index, pattern)
        if (directory / single).is_file():
            return open_file(directory / single)
        if stray := sorted(path.name for path in directory.glob(pattern)):
            raise ConvertError(f"{directory}: holds {', '.join(stray)} but no {index}: fetch the index")
    raise ConvertError(f"{directory}: no weights: neither {_FORMS[0][0]} nor {_FORMS[1][0]}, alone or with an index")


def _open_shards(directory: Path, index: Path, pattern: str) -> Weights:
    try:
        homes: dict[str, str] = json.loads(index.read_text())["weight_map"]
        if not all(isinstance(home, str) for home in homes.values()):
            raise TypeError("names of shards must be strings")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConvertError(f"{index}: not an index with a weight_map: {error}") from None
    shards = sorted(set(homes.values()))
    for shard in shards:
        if not (directory / shard).is_file():
            tensors = sorted(name for name, home in homes.items() if home == shard)
            raise ConvertError(f"{directory / shard}: missing; {index.name} says it holds {len(tensors)} tensors, the "
                               f"first {tensors[0]}")
    if unlisted := sorted(path.name for path in directory.glob(pattern) if path.name not in shards):
        raise ConvertError(f"{directory / unlisted[0]}: a shard that {index.name} doesn't name; remove it or fetch the "
                           "index again")
    files = {shard: open_file(directory / shard) for shard in shards}
    for name, shard in homes.items():
        if name not in files[shard].shapes:
            raise ConvertError(f"{directory / shard}: lacks tensor {name}, which {index.name} says it holds")
    for shard, file in files.items():
        if extra := sorted(name for name in file.shapes if homes.get(name) != shard):
            raise ConvertError(f"{directory / shard}: holds tensor {extra[0]}, which {index.name} doesn't say")
    return MergedTensors(str(directory), [(file, lambda name: name) for file in files.values()])
