"""A reader of safetensors files, slice by slice, and a writer that takes the tensors in any order."""

import json
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from vocojax.errors import ConvertError
from vocojax.files import parse_json
from vocojax.sums import require_unchanged
from vocojax.weights import Index, Shape

_LENGTH = struct.Struct("<Q")  # length of the JSON header that precedes the data
DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsFile:
    """The tensors of one file. It is mapped into memory only while something is read from it.

    Args:
      path: the file.
      sha256: SHA-256 of its content, if it is known; the file is compared with it before its first tensor is read.

    Attributes:
      where: the file, for errors.
      shapes: shapes of the tensors by name.

    Raises:
      ConvertError: the file is not a safetensors file, is truncated, or holds a dtype without a numpy equivalent.
    """

    def __init__(self, path: str | Path, sha256: str | None = None):
        self.where, self._unchecked = str(path), sha256
        self._check = threading.Lock()  # many threads read; the first compares, the others wait for it
        try:
            with safe_open(self.where, "np") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                self.shapes: dict[str, Shape] = {name: tuple(part.get_shape()) for name, part in slices.items()}
                self._dtypes = {name: part.get_dtype() for name, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise ConvertError(_damage(Path(path)) or f"{path}: can't be read: {error}; download it again") from None
        for name, dtype in self._dtypes.items():
            if dtype not in DTYPES:
                raise ConvertError(f"{path}: tensor {name} has dtype {dtype}; supported are {', '.join(DTYPES)}")

    def dtype(self, name: str) -> np.dtype:
        """Returns the tensor's dtype."""
        return DTYPES[self._dtypes[name]]

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Reads a tensor, or the slice of it at `index`.

        Raises:
          ChangedFile: the file is not what its sum says.
        """
        with self._check:
            if self._unchecked:
                require_unchanged(Path(self.where).parent, {Path(self.where).name: self._unchecked})
                self._unchecked = None
        with safe_open(self.where, "np") as file:
            return file.get_tensor(name) if index is None or not index else file.get_slice(name)[index]


def _damage(path: Path) -> str:
    """Returns the error message for a truncated file; '' if the header shows no truncation."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            header = parse_json(file.read(length))
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
            return f"{path}: truncated: tensor {name} ends at byte {needed} of {size}; download the file again"
    return ""


class SafetensorsWriter:
    """A writer of one file. The names, dtypes and shapes are given first; the tensors then come in any order.

    Use it in a `with` statement; at its end, the writer checks that every tensor was written.

    Args:
      path: the file; it must not exist.
      tensors: dtype and shape by name, in the order of the tensors in the file.
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
        """Writes one tensor at its place in the file.

        Raises:
          ValueError: its dtype or shape is not the announced one, or it was written before.
        """
        announced = self._tensors.get(name)
        if announced != (array.dtype, array.shape) or name not in self._offsets:
            raise ValueError(f"tensor {name} is {array.dtype} {array.shape}, expected {announced}, once")
        self._file.seek(self._data + self._offsets.pop(name))
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()  # without fsync: `files.new_directory` does that for the whole directory
        if kind is None and self._offsets:
            raise ValueError(f"tensors were never written: {', '.join(self._offsets)}")
