"""Checksums of the arrays of a state, computed on the devices that hold the arrays.

A checksum is the sum of hashes of (bits, index) modulo 2^32. It does not depend on the sharding: a state that is
restored on another mesh has the checksums it was saved with. One changed element always changes its array's checksum.
(OCDBT and Zarr, as Orbax writes them, protect only their indices, not the values.)
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_CHUNK = 2**18  # elements hashed at a time, so that the hashes fit into a core's cache


def checksums(tree: Any) -> dict[str, int]:
    """Returns the checksum of each array of a tree by its path ("a/b"). Waits for the device."""
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
    """Returns the checksum of an array in host memory; no device is used."""
    bits, total = np.ascontiguousarray(array).reshape(-1).view(f"uint{8 * array.dtype.itemsize}"), 0
    for start in range(0, bits.size, _CHUNK):
        part = bits[start:start + _CHUNK].astype(np.uint32)
        index = np.arange(start, start + part.size, dtype=np.int64).astype(np.uint32)
        total += int(_hashes(part, index).sum(dtype=np.uint64))
    return total % 2**32


def _hashes(bits: Any, index: Any) -> Any:
    """Returns hashes of (bits, index); arrays are uint32 of numpy or of JAX."""
    hashed = bits + index * np.uint32(0x9E3779B9)
    # MurmurHash3's finaliser is a bijection: at a given index, different bits have different hashes.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hashed = (hashed ^ (hashed >> shift)) * np.uint32(factor)
    return hashed ^ (hashed >> 16)
