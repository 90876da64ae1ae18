"""The tensors of one file, of a directory (one file, or shards with an index), or of several of these together."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from vocojax.convert.pickle_files import PickleFile
from vocojax.convert.safetensors_files import SafetensorsFile
from vocojax.errors import ConvertError, shown
from vocojax.files import parse_json
from vocojax.sums import WEIGHTS, read_sums
from vocojax.weights import Index, Weights

# Single file, index, and pattern of shards; the first form that a directory has is read.
_FORMS = (
    ("model.safetensors", "model.safetensors.index.json", "*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model*.bin"),
)


class MergedTensors:
    """The tensors of several sources as one.

    Args:
      where: name of the whole, for errors.
      parts: sources, each with a function that renames its tensors.

    Attributes:
      where: as above.
      shapes: shapes of the tensors by their new names.

    Raises:
      ConvertError: two sources have a tensor of the same name.
    """

    def __init__(self, where: str, parts: list[tuple[Weights, Callable[[str], str]]]):
        self.where = where
        self._homes: dict[str, tuple[Weights, str]] = {}
        for part, rename in parts:
            for name in part.shapes:
                new = rename(name)
                if new in self._homes:
                    raise ConvertError(f"{part.where}: tensor {name} is also in {self._homes[new][0].where}; use only "
                                       "one of the two")
                self._homes[new] = part, name
        self.shapes = {new: part.shapes[name] for new, (part, name) in self._homes.items()}

    def dtype(self, name: str) -> np.dtype:
        """Returns the tensor's dtype."""
        part, own = self._homes[name]
        return part.dtype(own)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Reads a tensor, or the slice of it at `index`."""
        part, own = self._homes[name]
        return part.read(own, index)


def open_file(path: str | Path) -> Weights:
    """Opens one file of tensors: safetensors if it has that suffix, else a file of torch.save.

    Raises:
      ConvertError: the file does not exist or can't be read.
    """
    if not Path(path).is_file():
        raise ConvertError(f"{path}: no such file; check the path")
    path = Path(path)
    return SafetensorsFile(path, read_sums(path.parent).get(path.name)) if path.suffix == WEIGHTS else PickleFile(path)


def open_directory(directory: str | Path) -> Weights:
    """Opens the tensors of a directory in transformers' file layout; safetensors take precedence over `.bin`.

    Raises:
      ConvertError: there are no weights, or the shards and their index disagree.
    """
    directory = Path(directory)
    for single, index, pattern in _FORMS:
        if (directory / index).is_file():
            return _open_shards(directory, directory / index, pattern)
        if (directory / single).is_file():
            return open_file(directory / single)
        if stray := sorted(path.name for path in directory.glob(pattern)):
            raise ConvertError(f"{directory}: holds {', '.join(stray)} but no {index}; download the index too")
    raise ConvertError(f"{directory}: no weights: neither {_FORMS[0][0]} nor {_FORMS[1][0]}, alone or with an index; "
                       "download them or check the path")


def _open_shards(directory: Path, index: Path, pattern: str) -> Weights:
    try:
        homes: dict[str, str] = parse_json(index.read_text(encoding="utf-8-sig"))["weight_map"]
        if not all(isinstance(home, str) for home in homes.values()):
            raise TypeError("names of shards must be strings")
        if outside := sorted(home for home in homes.values() if home in ("", "..") or Path(home).name != home):
            raise ValueError(f"{shown(outside[0])} is not the name of a file beside it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConvertError(f"{index}: not an index with a weight_map: {error}; download it again") from None
    shards = sorted(set(homes.values()))
    for shard in shards:
        if not (directory / shard).is_file():
            tensors = sorted(name for name, home in homes.items() if home == shard)
            raise ConvertError(f"{directory / shard}: missing; {index.name} lists {len(tensors)} tensors in it, the "
                               f"first is {tensors[0]}; download it")
    if unlisted := sorted(path.name for path in directory.glob(pattern) if path.name not in shards):
        raise ConvertError(f"{directory / unlisted[0]}: not listed in {index.name}; remove this shard or download the "
                           "index again")
    files = {shard: open_file(directory / shard) for shard in shards}
    for name, shard in homes.items():
        if name not in files[shard].shapes:
            raise ConvertError(f"{directory / shard}: lacks tensor {name}, which {index.name} lists in it; download "
                               "shards and index again")
    for shard, file in files.items():
        if extra := sorted(name for name in file.shapes if homes.get(name) != shard):
            raise ConvertError(f"{directory / shard}: holds tensor {extra[0]}, which {index.name} does not list in it; "
                               "download shards and index again")
    return MergedTensors(str(directory), [(file, lambda name: name) for file in files.values()])
