"""The weights of a run as host arrays, parameter by parameter: what conversions read and write.

A conversion's target looks like a run of training that has made no step, so that a stage can start from it
(`init_from`):

    DIR/config.json, DIR/tokenizer/   the card, see `card.py`
    DIR/checkpoints/0/parameters      every parameter, a flat dict by path
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 (teaches numpy the name bfloat16)
import numpy as np
import orbax.checkpoint as ocp

from vocojax.config import LoraConfig
from vocojax.models.lora import factor_names, is_factor, merge
from vocojax.runs.checkpoint_files import damaged
from vocojax.runs.checksums import host_checksum
from vocojax.runs.directory import CheckpointError
from vocojax.runs.parameters import SavedParameters
from vocojax.weights import Index, Shape, Weights

_CHUNK_BYTES = 128 * 2**20  # at most, for the files that a parameter is cut into; stacked ones are cut by layers too


class RunWeights:
    """The parameters of a run's newest checkpoint as `Weights`; factors of LoRA are merged as they are read.

    One whole parameter is held in memory: slices of the one last read cost nothing.

    Args:
      directory: the run's.
      lora: scale of the factors, where the checkpoint holds some.

    Raises:
      CheckpointError: there is no complete checkpoint; what is read is not what the run saved; or the checkpoint holds
        factors and `lora` does not say how they are scaled.
    """

    def __init__(self, directory: str | Path, lora: LoraConfig):
        self._saved, self._lora = SavedParameters(directory), lora
        self._checkpointer = ocp.PyTreeCheckpointer()
        self.where = str(self._saved.directory / "parameters")
        self.shapes: dict[str, Shape] = {
            name: tuple(leaf.shape) for name, leaf in self._saved.leaves.items() if not is_factor(name)
        }
        if len(self.shapes) < len(self._saved.leaves) and not lora.rank:
            raise CheckpointError(f"{directory}/config.json: has no lora.rank and lora.alpha, but the checkpoint has "
                                  "factors of LoRA; copy the file back from another copy of the run")
        self._last: tuple[str, np.ndarray] | None = None

    def dtype(self, name: str) -> np.dtype:
        """Returns the parameter's dtype."""
        return np.dtype(self._saved.leaves[name].dtype)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Returns a parameter, or the slice of it at `index`."""
        if self._last is None or self._last[0] != name:
            self._last = None  # releases the one before first
            self._last = name, self._read_merged(name)
        return self._last[1] if index is None else self._last[1][index].copy()  # a view would keep the whole alive

    def _read_merged(self, name: str) -> np.ndarray:
        a, b = factor_names(name)
        if a not in self._saved.leaves:
            return self._read_saved(name)
        kernel = self._read_saved(name)
        return np.asarray(merge(kernel, self._read_saved(a), self._read_saved(b), self._lora.scale,
                                jnp.dtype(kernel.dtype)))

    def _read_saved(self, name: str) -> np.ndarray:
        path = self._saved.homes[name]
        try:
            value = self._checkpointer.restore(path, args=ocp.args.PyTreeRestore(
                item={name: np.zeros(0)}, partial_restore=True,
                restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)},
            ))[name]
        except Exception as error:  # whatever a damaged file makes of Orbax and TensorStore
            raise damaged(path, f"{name} can't be read: {error}") from error
        key = f"{path.name}/{name}"
        if self._saved.checksums and self._saved.checksums.get(key) != host_checksum(value):
            raise damaged(path, f"not what was saved (checksum): {key}")
        return value


class _Later:
    """A parameter that is read when its turn to be written has come; to Orbax it looks like an array."""

    def __init__(self, weights: Weights, path: str, dtype: np.dtype):
        self._weights, self._path = weights, path
        self.shape, self.dtype = weights.shapes[path], dtype
        self.ndim, self.size = len(self.shape), int(np.prod(self.shape))
        self.nbytes = self.size * dtype.itemsize

    def read(self) -> np.ndarray:
        return self._weights.read(self._path).astype(self.dtype, copy=False)


class _LaterHandler(ocp.type_handlers.NumpyHandler):
    """Writes `_Later`s one after the other."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(self, values: Sequence[Any], infos: Any, args: Any = None) -> Sequence[Any]:
        for value, info, arg in zip(values, infos, args, strict=True):
            for future in await super().serialize([value.read()], [info], [arg]):
                future.result()
        return []


def write_parameters(directory: Path, weights: Weights, dtypes: Mapping[str, np.dtype]) -> None:
    """Writes DIR/checkpoints/0/parameters, holding one parameter in memory at a time.

    Plain zarr rather than OCDBT, which keeps what it has written of an array in memory until the array is whole.
    """
    registry = ocp.type_handlers.create_type_handler_registry(
        (_Later, _LaterHandler()),
        (jax.Array, ocp.type_handlers.ArrayHandler(array_metadata_store=None)),  # without one Orbax warns
    )
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
    # Plain zarr is complete as it is written: Orbax would look for parts to merge, and warn that there are none.
    handler.finalize = lambda directory: None  # type: ignore[method-assign]
    tree = {path: _Later(weights, path, dtypes[path]) for path in sorted(weights.shapes)}
    # Orbax cuts `shard_axes` into single entries: the layers of a stacked parameter, nothing of another.
    chunks = {path: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if "blocks/" in path else ())
              for path in tree}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(parameters=handler)) as checkpointer:
        checkpointer.save(
            (directory / "checkpoints" / "0").absolute(),
            args=ocp.args.Composite(parameters=ocp.args.PyTreeSave(tree, save_args=chunks)),
        )
