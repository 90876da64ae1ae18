"""Safetensors files: read slice by slice through the safetensors library, and written tensor by tensor in any order."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from vocojax.errors import ConvertError
from vocojax.weights import Index, Shape

_LENGTH = struct.Struct("<Q")  # of the JSON header in front of the data
DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsFile:
    """The tensors of one file. It is mapped into memory only while something is read from it.

    Raises:
      ConvertError: the file is no safetensors file, is truncated, or holds a dtype without a numpy equivalent.
    """

    def __init__(self, path: str | Path):
        self.where = str(path)
        try:
            with safe_open(self.where, "np") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                self.shapes: dict[str, Shape] = {name: tuple(part.get_shape()) for name, part in slices.items()}
                self._dtypes = {name: part.get_dtype() for name, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise ConvertError(_damage(Path(path)) or f"{path}: can't be read: {error}") from None
        for name, dtype in self._dtypes.items():
            if dtype not in DTYPES:
                raise ConvertError(f"{path}: tensor {name} is of type {dtype}, not one of {', '.join(DTYPES)}")

    def dtype(self, name: str) -> np.dtype:
        """The tensor's dtype."""
        return DTYPES[self._dtypes[name]]

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """A tensor, or the slice of it at `index`."""
        with safe_open(self.where, "np") as file:
            return file.get_tensor(name) if index is None or not index else file.get_slice(name)[index]


def _damage(path: Path) -> str:
    """What is wrong with a file that the library rejects, as far as its header tells; '' if nothing."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            header = json.loads(file.read(length))
    except (OSError, struct.error, ValueError, MemoryError, OverflowError):
        return ""
    try:
        header.pop("__metadata__", None)
        ends = sorted((entry["data_offsets"][1], name) for name, entry in header.items())
    except (AttributeError, KeyError, TypeError, IndexError):
        return ""
    for end, name in ends:
        needed = _LENGTH.size + length + end
        if needed > size:
            return (f"{path}: truncated: tensor {name} ends at byte {needed} of {size}; fetch the file again")
    return ""


class SafetensorsWriter:
    """Writes one file whose tensors are known beforehand and come in any order, straight to their places.

    Use it in a `with` statement; leaving it without an exception checks that every tensor came.

    Args:
      path: the file.
      tensors: dtype and shape by name, in the order they take in the file.
    """

    def __init__(self, path: str | Path, tensors: Mapping[str, tuple[np.dtype, Shape]]):
        self._offsets: dict[str, int] = {}
        self._tensors = dict(tensors)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in self._tensors.items():
            size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
            self._offsets[name] = end
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = _LENGTH.size + len(text)
        self._file = open(path, "xb")  # noqa: SIM115 (closed by __exit__)
        self._file.write(_LENGTH.pack(len(text)) + text)
        self._file.truncate(self._data + end)

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one tensor.

        Raises:
          ValueError: it has another dtype or shape than announced, or came before.
        """
        announced = self._tensors.get(name)
        if announced != (array.dtype, array.shape) or name not in self._offsets:
            raise ValueError(f"tensor {name} is {array.dtype} {array.shape}, announced was {announced} once")
        self._file.seek(self._data + self._offsets.pop(name))
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()  # `files.new_directory` waits until it is on the disk
        if kind is None and self._offsets:
            raise ValueError(f"tensors were never written: {', '.join(self._offsets)}")
