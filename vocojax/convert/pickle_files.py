"""A reader of PyTorch's `.bin` and `.pth` files that needs no torch and never runs code from a pickle.

Such a file is an uncompressed zip archive: a pickle that describes the tensors, and one entry with the bytes of each
storage. The unpickler here makes tensors and ordered dicts. It refuses everything else and names it.
"""

import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from vocojax.errors import ConvertError, shown
from vocojax.weights import Index, Shape

_LOCAL_HEADER = struct.Struct("<26xHH")  # a zip entry's: 26 bytes, then the lengths of its name and its extra field


class _StorageType(NamedTuple):
    dtype: np.dtype


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int  # in elements
    shape: Shape
    strides: tuple[int, ...]  # in elements


_STORAGE_TYPES: Mapping[str, _StorageType] = {name: _StorageType(np.dtype(dtype)) for name, dtype in {
    "FloatStorage": np.float32, "HalfStorage": np.float16, "BFloat16Storage": ml_dtypes.bfloat16,
    "DoubleStorage": np.float64, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}.items()}


# What the unpickler raises for a pickle with changed bytes, in addition to `_RefusedError`.
_DAMAGES = (pickle.UnpicklingError, EOFError, AssertionError, AttributeError, TypeError, ValueError, LookupError,
            MemoryError, OverflowError, RecursionError, struct.error)


def _one_line(error: BaseException) -> str:
    return str(error).encode("unicode_escape").decode() or type(error).__name__


class _RefusedError(pickle.UnpicklingError):
    """A pickle's request for something that is not a tensor."""


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """The unpickler written in Python: the one written in C takes as much memory as a hostile pickle asks for."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGE_TYPES:
            return _STORAGE_TYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _Tensor(storage, offset, tuple(size), tuple(stride))
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        raise _RefusedError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        if isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _StorageType):
            return _Storage(str(pid[2]), pid[1].dtype)
        raise _RefusedError(f"a persistent id of type {type(pid).__name__}")


class PickleFile:
    """The tensors of one `.bin` or `.pth` file. A tensor's bytes are read only when the tensor is.

    Args:
      path: the file.

    Attributes:
      where: the file, for errors.
      shapes: shapes of the tensors by name.

    Raises:
      ConvertError: the file is not such an archive, is truncated, or holds something other than tensors.
    """

    def __init__(self, path: str | Path):
        self.where = str(path)
        try:
            with zipfile.ZipFile(path) as archive:
                self._entries = {info.filename: info for info in archive.infolist()}
                head = next((name for name in self._entries if name.endswith("data.pkl")), None)
                if head is None:
                    raise ConvertError(f"{path}: an archive without data.pkl, not written by torch.save; get the "
                                       "weights as safetensors")
                self._root = head.removesuffix("data.pkl")
                self._size = Path(path).stat().st_size
                self._require_uncompressed()
                with archive.open(head) as data:
                    content = _Unpickler(data).load()
                order = f"{self._root}byteorder"
                if order in self._entries and archive.read(order) != b"little":
                    raise ConvertError(f"{path}: was written on a big-endian machine; save it again on a little-endian "
                                       "one")
            self._tensors = self._require_tensors(content)
            for name, tensor in self._tensors.items():
                self._require_inside(name, tensor)
        except ConvertError:
            raise
        except _RefusedError as error:
            raise ConvertError(f"{path}: refused: its pickle asks for {_one_line(error)}, which is not a tensor; get "
                               "the weights as safetensors") from None
        except (zipfile.BadZipFile, OSError) as error:
            raise ConvertError(f"{path}: not a complete file of torch.save ({error}); download it again, or save it "
                               "again with torch >= 1.6") from None
        except _DAMAGES as error:
            raise ConvertError(f"{path}: its pickle is damaged: {_one_line(error)}; download it again") from None
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def _require_uncompressed(self) -> None:
        """Refuses entries that take more memory than the file has bytes; torch.save writes none."""
        for name, entry in self._entries.items():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > self._size:
                raise ConvertError(f"{self.where}: the entry {shown(name)} is compressed, or larger than the file, "
                                   "which torch.save never writes; get the weights as safetensors")

    def _require_tensors(self, content: Any) -> dict[str, _Tensor]:
        if not isinstance(content, dict):
            raise ConvertError(f"{self.where}: holds a {type(content).__name__} instead of a dict of tensors; save the "
                               "plain state dict")
        for name, value in content.items():
            if not isinstance(value, _Tensor) or not isinstance(name, str) or not name.isprintable():
                key = shown(name) if isinstance(name, str) else f"a key of type {type(name).__name__}"
                raise ConvertError(f"{self.where}: {key} is not a tensor; save the plain state dict")
        return dict(content)

    def _require_inside(self, name: str, tensor: _Tensor) -> None:
        entry = self._entries.get(f"{self._root}data/{tensor.storage.key}")
        if entry is None:
            raise ConvertError(f"{self.where}: the file is damaged: tensor {name} has no storage "
                               f"data/{tensor.storage.key}; download it again")
        last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
        is_inside = min(0, tensor.offset, *tensor.strides, *tensor.shape) >= 0
        if not is_inside or (0 not in tensor.shape and (last + 1) * tensor.storage.dtype.itemsize > entry.file_size):
            raise ConvertError(f"{self.where}: the file is damaged: tensor {name} lies outside its storage of "
                               f"{entry.file_size} bytes; download it again")
        if math.prod(tensor.shape) * tensor.storage.dtype.itemsize > self._size:  # a stride of 0 claims any size
            raise ConvertError(f"{self.where}: tensor {name} of shape {list(tensor.shape)} is larger than the file of "
                               f"{self._size} bytes; save the file again with tensor.clone()")

    def dtype(self, name: str) -> np.dtype:
        """Returns the tensor's dtype."""
        return self._tensors[name].storage.dtype

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Reads a tensor, or the slice of it at `index`."""
        (key, dtype), offset, shape, strides = self._tensors[name]
        if 0 in shape:
            return np.zeros(shape, dtype) if index is None else np.zeros(shape, dtype)[index]
        entry = self._entries[f"{self._root}data/{key}"]
        count = entry.file_size // dtype.itemsize
        storage = np.memmap(self.where, dtype, mode="r", offset=self._start(entry), shape=(count,))
        view = np.lib.stride_tricks.as_strided(storage[offset:], shape, [step * dtype.itemsize for step in strides])
        return np.array(view if index is None else view[index])

    def _start(self, entry: zipfile.ZipInfo) -> int:
        """Returns the offset in the file at which an entry's bytes begin."""
        with open(self.where, "rb") as file:
            file.seek(entry.header_offset)
            name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        return entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
