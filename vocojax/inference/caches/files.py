"""Caches as safetensors files. Each says what it holds, and is refused where a single bit is wrong.

    keys, values                [L, U, N, G, D] in the cache's dtype, or int8 with
    keys_scale, values_scale    float32 [L, U, N, G]: factors of the int8 values of each token and head
    metadata                    format; config and parameters (the model's fingerprint); position (`first_position`);
                                images (`image_digests`); dtype; sha256

The digest covers the metadata and the tensors; safetensors itself notices only a length that is wrong.
"""

import errno
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Literal

import ml_dtypes
import numpy as np
import safetensors
from etils import epath
from safetensors.numpy import save as to_safetensors

from vocojax.errors import shown
from vocojax.files import parse_json, read_file, write_atomically
from vocojax.inference.caches.cache import CacheError, VocoCache, require_model
from vocojax.inference.caches.fingerprint import Fingerprint, is_digest

Storage = Literal["exact", "int8"]
FORMAT = "vocojax-voco-cache-1"
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "I8": np.dtype(np.int8),
           "BF16": np.dtype(ml_dtypes.bfloat16)}
_NAMES = {dtype.name: dtype for dtype in _DTYPES.values()}


class DamagedCache(CacheError):
    """A file that is not, or no longer, what was written."""


def save(cache: VocoCache, path: epath.PathLike, storage: Storage = "exact") -> None:
    """Writes a cache to a file that holds all of it or is not there.

    Args:
      cache: what to write.
      path: the file, local or remote.
      storage: `exact`, or `int8` for half of bfloat16's bytes and a small loss.

    Raises:
      CacheError: it can't be written, or the cache lacks its model's fingerprint.
    """
    write_cache(epath.Path(path), to_bytes(cache, storage))


def load(path: epath.PathLike, fingerprint: Fingerprint | None = None) -> VocoCache:
    """Reads a cache.

    Args:
      path: the file, local or remote.
      fingerprint: if given, of the model whose it has to be.

    Raises:
      CacheError: it can't be read or is of another model. `DamagedCache`: it is torn, truncated or altered.
    """
    try:
        content = read_file(epath.Path(path))
    except OSError as error:
        raise CacheError(f"{path}: can't be read: {error.strerror or error}") from error
    cache = from_bytes(content, str(path))
    return cache if fingerprint is None else require_model(cache, fingerprint, str(path))


def to_bytes(cache: VocoCache, storage: Storage = "exact") -> bytes:
    """Returns the content of the cache's file."""
    if cache.fingerprint is None:
        raise CacheError("a cache without its model's fingerprint can't be saved: compress with Assistant.compress, or "
                         "pass compress the model's fingerprint")
    arrays = {"keys": np.asarray(cache.k_LUNGD), "values": np.asarray(cache.v_LUNGD)}
    metadata = {
        "format": FORMAT, "config": cache.fingerprint.config, "parameters": cache.fingerprint.parameters,
        "position": str(cache.first_position), "images": json.dumps(cache.image_digests),
        "dtype": arrays["keys"].dtype.name,
    }
    if storage == "int8":
        arrays = {name: part for key, array in arrays.items()
                  for name, part in zip((key, f"{key}_scale"), quantise(array), strict=True)}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return to_safetensors(arrays, metadata | {"sha256": _digest(metadata, arrays)})


def from_bytes(content: bytes, where: str) -> VocoCache:
    """Reads the cache in a file's content.

    Args:
      content: the file's.
      where: names the file in errors.

    Raises:
      CacheError: it is of another format. `DamagedCache`: it is torn, truncated or altered.
    """
    try:
        arrays = {name: _array(tensor) for name, tensor in safetensors.deserialize(content)}
        metadata = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        if metadata.get("format") != FORMAT:
            raise CacheError(f"{where}: is no VoCo cache of format {FORMAT} but {shown(metadata.get('format'))}")
        if metadata.pop("sha256") != _digest(metadata, arrays):
            raise ValueError("its digest is not that of its content")
        dtype = _NAMES[metadata["dtype"]]
        part = lambda key: (dequantise(arrays[key], arrays[f"{key}_scale"], dtype) if f"{key}_scale" in arrays
                            else arrays[key])
        return VocoCache(*_checked_arrays(part("keys"), part("values")), _position(metadata["position"]),
                         _image_digests(metadata["images"], arrays["keys"].shape[1]), _fingerprint(metadata))
    except CacheError:
        raise
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DamagedCache(f"{where}: torn or damaged ({error}); delete it and compress the image again") from error


def _checked_arrays(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if keys.ndim != 5 or keys.shape != values.shape or 0 in keys.shape or keys.dtype != values.dtype:
        raise ValueError(f"keys are {keys.dtype}{list(keys.shape)} and values {values.dtype}{list(values.shape)}")
    return keys, values


def _position(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"position is {shown(text)}")
    return int(text)


def _image_digests(text: str, count: int) -> tuple[str, ...]:
    digests = parse_json(text)
    if not isinstance(digests, list) or len(digests) != count or not all(map(is_digest, digests)):
        raise ValueError(f"images must be {count} digests of 32 hexadecimal digits, got {shown(text)}")
    return tuple(digests)


def _fingerprint(metadata: Mapping[str, str]) -> Fingerprint:
    if not isinstance(parse_json(metadata["config"]), dict):
        raise ValueError(f"config is {shown(metadata['config'])}")
    found = Fingerprint(metadata["config"], metadata["parameters"])
    _ = found.digest  # a lone surrogate has none
    return found


def quantise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns int8 [..., D] and the float32 scale [...] that brings each vector's largest entry to 127."""
    x = x.astype(np.float32)
    scale = np.abs(x).max(-1) / 127
    return np.rint(x / np.where(scale > 0, scale, 1)[..., None]).astype(np.int8), scale


def dequantise(x: np.ndarray, scale: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns [..., D] from int8 and scale: the inverse of `quantise` up to rounding."""
    return (x.astype(np.float32) * scale[..., None]).astype(dtype)


def write_cache(path: epath.Path, content: bytes) -> None:
    """Writes a cache's file so that readers see all of it or nothing, whoever else writes it at the same time.

    Raises:
      CacheError: the disk is full, or whatever else the system says; nothing is left behind.
    """
    try:
        write_atomically(path, content)
    except OSError as error:
        raise not_written(path, error) from error


def not_written(path: epath.Path, error: OSError) -> CacheError:
    """Returns the error of a file or directory that can't be written, with the remedy."""
    remedy = {
        errno.ENOSPC: ": free space, or limit the store's size", errno.EDQUOT: ": free space, or limit its size",
        errno.EROFS: ": name a store that can be written", errno.EACCES: ": name a store that this user may write",
        errno.ENOTDIR: ": name a directory", errno.EEXIST: ": name a directory",
    }.get(error.errno or 0, "")
    return CacheError(f"{path}: can't be written: {error.strerror or error}{remedy}")


def _array(tensor: Mapping[str, Any]) -> np.ndarray:
    return np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])


def _digest(metadata: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f" {name} {array.dtype.name} {list(array.shape)} ".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
