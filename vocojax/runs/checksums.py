"""A checksum of every array of a state, computed where the array lies.

It is a sum modulo 2^32 of hashes of (bits, index), so it does not depend on how an array is sharded: a state restored
on another mesh has the checksums it was saved with, and a changed element always changes that of its array. (OCDBT and
Zarr as Orbax writes them protect their indices, not the values.)
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_CHUNK = 2**18  # elements whose hashes stay in a core's cache


def checksums(tree: Any) -> dict[str, int]:
    """Name of every array of a tree -> its checksum. Waits for the device."""
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
             for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return {name: int(value) for name, value in jax.device_get(_checksums(named)).items()}


@jax.jit
def _checksums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(_checksum, arrays)


def _checksum(array: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}").astype(jnp.uint32)
    index, stride = jnp.uint32(0), 1
    for axis in reversed(range(array.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    return _hashes(bits, index).sum(dtype=jnp.uint32)


def host_checksum(array: np.ndarray) -> int:
    """The same of an array in host memory, without a device."""
    bits, total = np.ascontiguousarray(array).reshape(-1).view(f"uint{8 * array.dtype.itemsize}"), 0
    for start in range(0, bits.size, _CHUNK):
        part = bits[start:start + _CHUNK].astype(np.uint32)
        index = np.arange(start, start + part.size, dtype=np.int64).astype(np.uint32)
        total += int(_hashes(part, index).sum(dtype=np.uint64))
    return total % 2**32


def _hashes(bits: Any, index: Any) -> Any:
    """uint32 of numpy or JAX."""
    hashed = bits + index * np.uint32(0x9E3779B9)
    # The finaliser of MurmurHash3, a bijection: other bits at an index are another hash.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hashed = (hashed ^ (hashed >> shift)) * np.uint32(factor)
    return hashed ^ (hashed >> 16)
