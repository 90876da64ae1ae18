"""The weights of a run, read and written by conversions as host arrays, one parameter at a time.

A conversion's target looks like a training run before its first step, so that a stage can start from it (`init_from`):

    DIR/config.json, DIR/tokenizer/   the card, see `card.py`
    DIR/checkpoints/0/parameters      every parameter, a flat dict by path
    DIR/checkpoints/0/progress        their checksums
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 (registers the name bfloat16 with numpy)
import numpy as np
import orbax.checkpoint as ocp

from vocojax.config import LoraConfig
from vocojax.models.lora import factor_names, is_factor, merge
from vocojax.runs.checkpoint_files import damaged, described, not_saved, write_progress
from vocojax.runs.checksums import host_checksum
from vocojax.runs.directory import CheckpointError, checkpoint_path
from vocojax.runs.parameters import SavedParameters
from vocojax.weights import Index, Shape, Weights

_CHUNK_BYTES = 128 * 2**20  # maximum of a file; a larger parameter has several, a stacked one a file or more per layer


class StoredWeights:
    """The arrays of a run's newest checkpoint as `Weights`, as they are stored: LoRA factors are arrays of their own.

    Args:
      directory: the run's directory.

    Attributes:
      where: the checkpoint, for errors.
      shapes: shapes of the arrays by path.

    Raises:
      CheckpointError: there is no complete checkpoint, or it is damaged.
    """

    def __init__(self, directory: str | Path):
        self._saved = SavedParameters(directory)
        self._checkpointer = ocp.PyTreeCheckpointer()
        self.where = str(self._saved.directory / "parameters")
        self.shapes: dict[str, Shape] = {name: tuple(leaf.shape) for name, leaf in self._saved.leaves.items()}

    def dtype(self, name: str) -> np.dtype:
        """Returns the array's dtype."""
        return np.dtype(self._saved.leaves[name].dtype)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Reads an array, or the slice of it at `index`, and checks its checksum."""
        path = self._saved.homes[name]
        try:
            value = self._checkpointer.restore(path, args=ocp.args.PyTreeRestore(
                item={name: np.zeros(0)}, partial_restore=True,
                restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)},
            ))[name]
        except Exception as error:  # Orbax and TensorStore raise many types for damaged files
            raise damaged(path, f"{name} can't be read: {described(error)}") from error
        key, saved = f"{path.name}/{name}", self._saved.checksums
        if saved and (problem := not_saved({key: host_checksum(value)}, saved, [key])):
            raise damaged(path, problem)
        return value if index is None else value[index].copy()  # a view would keep all of it in memory


class RunWeights:
    """The parameters of a run's newest checkpoint as `Weights`. LoRA factors are merged while reading.

    The last parameter that was read stays in memory, so that further slices of it need no reading.

    Args:
      directory: the run's directory.
      lora: gives the scale of LoRA factors, if the checkpoint has any.

    Attributes:
      where: the checkpoint, for errors.
      shapes: shapes of the parameters by path.
      stored: the arrays as they are stored, kernels and factors apart.
      lora: as above.

    Raises:
      CheckpointError: there is no complete checkpoint, it is damaged, or it has LoRA factors and `lora` has none.
    """

    def __init__(self, directory: str | Path, lora: LoraConfig):
        self.stored, self.lora = StoredWeights(directory), lora
        self.where = self.stored.where
        self.shapes = {name: shape for name, shape in self.stored.shapes.items() if not is_factor(name)}
        if len(self.shapes) < len(self.stored.shapes) and not lora.rank:
            raise CheckpointError(f"{directory}/config.json: lora.rank and lora.alpha are missing, but the checkpoint "
                                  "has LoRA factors; copy the file from a backup of the run")
        self._last: tuple[str, np.ndarray] | None = None

    def dtype(self, name: str) -> np.dtype:
        """Returns the parameter's dtype."""
        return self.stored.dtype(name)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Reads a parameter, or the slice of it at `index`."""
        if self._last is None or self._last[0] != name:
            self._last = None  # frees the previous parameter before the next is read
            self._last = name, self._read_merged(name)
        return self._last[1] if index is None else self._last[1][index].copy()  # a view would keep all of it in memory

    def _read_merged(self, name: str) -> np.ndarray:
        a, b = factor_names(name)
        if a not in self.stored.shapes:
            return self.stored.read(name)
        kernel, a_LIR, b_LRO = self.stored.read(name).copy(), self.stored.read(a), self.stored.read(b)
        with jax.default_device(jax.devices("cpu")[0]):
            for layer in np.ndindex(kernel.shape[:-2]):  # one at a time: a whole stack in fp32 is large
                kernel[layer] = merge(kernel[layer], a_LIR[layer], b_LRO[layer], self.lora.scale,
                                      jnp.dtype(kernel.dtype))
        return kernel


class _Later:
    """A parameter that is read only when it is written. To Orbax it looks like an array."""

    def __init__(self, weights: Weights, path: str, dtype: np.dtype):
        self._weights, self._path = weights, path
        self.shape, self.dtype = weights.shapes[path], dtype
        self.ndim, self.size = len(self.shape), int(np.prod(self.shape))
        self.nbytes = self.size * dtype.itemsize
        self.checksum = 0  # once it was read

    def read(self) -> np.ndarray:
        value = self._weights.read(self._path).astype(self.dtype, copy=False)
        self.checksum = host_checksum(value)
        return value


class _LaterHandler(ocp.type_handlers.NumpyHandler):
    """A handler for Orbax that writes `_Later`s one after the other."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(self, values: Sequence[Any], infos: Any, args: Any = None) -> Sequence[Any]:
        for value, info, arg in zip(values, infos, args, strict=True):
            for future in await super().serialize([value.read()], [info], [arg]):
                future.result()
        return []


def write_parameters(directory: Path, weights: Weights, dtypes: Mapping[str, np.dtype]) -> None:
    """Writes DIR/checkpoints/0/parameters with one parameter at a time in memory.

    The format is plain zarr, because OCDBT keeps an array in memory until all of it is written.

    Args:
      directory: DIR.
      weights: the parameters.
      dtypes: dtype of each parameter, by path.
    """
    registry = ocp.type_handlers.create_type_handler_registry(
        (_Later, _LaterHandler()),
        (jax.Array, ocp.type_handlers.ArrayHandler(array_metadata_store=None)),  # without one Orbax warns
    )
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
    # Plain zarr is complete as it is written: Orbax would look for parts to merge, and warn that there are none.
    handler.finalize = lambda directory: None  # type: ignore[method-assign]
    checkpoint = checkpoint_path(directory) / "checkpoints" / "0"
    tree = {path: _Later(weights, path, dtypes[path]) for path in sorted(weights.shapes)}
    # Orbax cuts `shard_axes` into single entries: here the layers of a stacked parameter.
    chunks = {path: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if "blocks/" in path else ())
              for path in tree}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(parameters=handler)) as checkpointer:
        checkpointer.save(
            checkpoint,
            args=ocp.args.Composite(parameters=ocp.args.PyTreeSave(tree, save_args=chunks)),
        )
    write_progress(checkpoint, {"checksums": {f"parameters/{path}": later.checksum for path, later in tree.items()}})
