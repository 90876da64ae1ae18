"""Orbax checkpoints as a source and a target of conversions, parameter by parameter.

A target looks like a run of training that has made no step, so that a stage can start from it (`init_from`):

    DIR/config.json               {"model": ..., "data": {"template": ..., "fit": ...}, "visibility": "voco"}
    DIR/tokenizer/                tokenizer files, `<voco>` included
    DIR/checkpoints/0/parameters  every parameter, a flat dict by path
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (teaches numpy the name bfloat16)
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vocojax.errors import ConvertError
from vocojax.runs.checksums import host_checksum
from vocojax.runs.directory import CheckpointError
from vocojax.runs.parameters import damaged, require_frozen, saved_checksums
from vocojax.weights import Index, Shape, Weights

_CHUNK_BYTES = 128 * 2**20  # at most, for the files that a parameter is cut into; stacked ones are cut by layers too


def is_run(directory: Path) -> bool:
    """Whether a directory looks like a run of training."""
    return (directory / "checkpoints").is_dir()


def tokenizer_directory(directory: Path, values: Mapping[str, Any]) -> Path:
    """Where the tokenizer of a run lies: beside a converted checkpoint, else where the stage's config says."""
    own = directory / "tokenizer"
    return own if own.is_dir() else Path(values.get("data", {}).get("tokenizer") or own)


class OrbaxWeights:
    """The parameters of a run's newest checkpoint, with or without the rest of the training state.

    One whole parameter is held in memory: slices of the one last read cost nothing.

    Raises:
      ConvertError: there is no complete checkpoint; or what is read is not what a run saved.
    """

    def __init__(self, directory: Path):
        steps = [int(path.name) for path in (directory / "checkpoints").iterdir()
                 if path.name.isdigit() and (path / "parameters" / "_METADATA").exists()]
        if not steps:
            raise ConvertError(f"{directory}/checkpoints: holds no complete checkpoint")
        newest = (directory / "checkpoints" / str(max(steps)) / "parameters").absolute()
        self.where = str(newest)
        try:
            self._checksums = saved_checksums(epath.Path(newest.parent))
        except CheckpointError as error:
            raise ConvertError(str(error)) from error
        self._checkpointer = ocp.PyTreeCheckpointer()
        self._tree: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        # What a run does not train is written once, beside its checkpoints.
        for path in filter(Path.exists, (newest, (directory / "frozen").absolute())):
            try:
                part = dict(self._checkpointer.metadata(path).item_metadata.tree)
            except Exception as error:  # whatever a damaged file makes of Orbax
                raise ConvertError(str(damaged(path, f"not a readable Orbax checkpoint: {error}"))) from error
            self._tree = part | self._tree
            self._paths = dict.fromkeys(part, path) | self._paths
        try:
            saved = (key.removeprefix("frozen/") for key in self._checksums if key.startswith("frozen/"))
            require_frozen(directory / "frozen", self._checksums, (name for name in saved if name not in self._tree))
        except CheckpointError as error:
            raise ConvertError(str(error)) from error
        self.shapes: dict[str, Shape] = {name: tuple(leaf.shape) for name, leaf in self._tree.items()}
        self._last: tuple[str, np.ndarray] | None = None

    def dtype(self, name: str) -> np.dtype:
        """The parameter's dtype."""
        return np.dtype(self._tree[name].dtype)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """A parameter, or the slice of it at `index`."""
        if self._last is None or self._last[0] != name:
            self._last = None  # lets go of the one before first
            self._last = name, self._read_whole(name)
        return self._last[1] if index is None else self._last[1][index].copy()  # a view would keep the whole alive


    def _read_whole(self, name: str) -> np.ndarray:
        path = self._paths[name]
        try:
            value = self._checkpointer.restore(path, args=ocp.args.PyTreeRestore(
                item={name: np.zeros(0)}, partial_restore=True,
                restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)},
            ))[name]
        except Exception as error:  # whatever a damaged file makes of Orbax and TensorStore
            raise ConvertError(str(damaged(path, f"{name} can't be read: {error}"))) from error
        key = f"{path.name}/{name}"
        if self._checksums and self._checksums.get(key) != host_checksum(value):
            raise ConvertError(str(damaged(path, f"not what was saved (checksum): {key}")))
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
    registry = ocp.type_handlers.create_type_handler_registry((_Later, _LaterHandler()))
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
    tree = {path: _Later(weights, path, dtypes[path]) for path in sorted(weights.shapes)}
    # Orbax cuts `shard_axes` into single entries: the layers of a stacked parameter, nothing of another.
    chunks = {path: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if "blocks/" in path else ())
              for path in tree}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(parameters=handler)) as checkpointer:
        checkpointer.save(
            (directory / "checkpoints" / "0").absolute(),
            args=ocp.args.Composite(parameters=ocp.args.PyTreeSave(tree, save_args=chunks)),
        )
