"""Loading of models from directories in any layout, and saving."""

from collections.abc import Collection, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from vocojax.errors import ConvertError
from vocojax.models.llama import Decoder
from vocojax.models.parameters import Model, Parameters, abstract, parameters_of, variables_of, with_parameters
from vocojax.models.voco import VocoLlama
from vocojax.parallel.shardings import parameter_shardings
from vocojax.pretrained.export import Layout, export
from vocojax.pretrained.source import Source, open_source
from vocojax.runs import parameters as run_parameters
from vocojax.runs.card import ModelCard, read_card
from vocojax.runs.directory import is_run
from vocojax.weights import ParametersInMemory, misfit, read_parameters


def load_model(
    directory: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    vision: str | Path | None = None,
    projector: str | Path | None = None,
    tokenizer: str | Path | None = None,
    num_vocos: int | None = None,
    allow_missing: Collection[str] = (),
    base: str | Path | None = None,
    seed: int = 0,
) -> VocoLlama:
    """Loads a model from weights in any layout that `open_source` knows.

    Args:
      directory: see `open_source`.
      mesh: devices for the parameters, which are sharded by their logical axes; each device reads only its part. None:
        the first device.
      dtype: dtype of the parameters and of the computation; None: the decoder's on disk.
      vision: see `open_source`.
      projector: see `open_source`.
      tokenizer: see `open_source`.
      num_vocos: see `open_source`.
      allow_missing: see `open_source`.
      base: see `open_source`.
      seed: for the random values of parameters whose tensors are allowed to be missing.

    Raises:
      ConvertError: see `open_source`; or the directory holds a decoder alone.
      CheckpointError: see `open_source`.
    """
    source = open_source(directory, vision=vision, projector=projector, tokenizer=tokenizer, num_vocos=num_vocos,
                         allow_missing=allow_missing, base=base)
    return model_of(source, directory, mesh=mesh, dtype=dtype, seed=seed)


def model_of(
    source: Source, directory: str | Path, *, mesh: Mesh | None = None, dtype: DTypeLike | None = None, seed: int = 0
) -> VocoLlama:
    """Loads the model of a directory that is already open.

    Args:
      source: the open directory.
      directory: its path.
      mesh: see `load_model`.
      dtype: see `load_model`.
      seed: see `load_model`.

    Raises:
      ConvertError: the directory holds a decoder alone.
      CheckpointError: a run's arrays are damaged.
    """
    if source.decoder_only:
        raise ConvertError(f"{directory}: holds a decoder alone; pass a vision tower (vision=...) or use load_decoder")
    dtype = jnp.dtype(dtype or source.weights.dtype("decoder/embedding"))
    model = abstract(lambda: VocoLlama(source.config, nnx.Rngs(seed), dtype))
    shapes = {path: variable.shape for path, variable in variables_of(model).items()}
    shardings = _shardings(model, mesh)
    wanted = {path: jax.ShapeDtypeStruct(shapes[path], dtype, sharding=shardings[path]) for path in shapes}
    absent = wanted.keys() - source.weights.shapes.keys()
    parameters = _read(source, directory, {path: leaf for path, leaf in wanted.items() if path not in absent})
    if absent:
        create = lambda: {path: value.astype(dtype) for path, value in
                          parameters_of(VocoLlama(source.config, nnx.Rngs(seed), dtype)).items() if path in absent}
        parameters |= jax.jit(create, out_shardings={path: shardings[path] for path in absent})()
    return with_parameters(model, parameters)


def load_decoder(directory: str | Path, *, mesh: Mesh | None = None, dtype: DTypeLike | None = None) -> Decoder:
    """Loads the decoder alone from weights in any layout that `open_source` knows.

    Args:
      directory: see `open_source`.
      mesh: see `load_model`.
      dtype: dtype of the parameters; None: the decoder's on disk.

    Raises:
      ConvertError: see `open_source`.
      CheckpointError: see `open_source`.
    """
    source = open_source(directory)
    dtype = jnp.dtype(dtype or source.weights.dtype("decoder/embedding"))
    decoder = abstract(lambda: Decoder(source.config.decoder, nnx.Rngs(0)))
    shapes = {path: variable.shape for path, variable in variables_of(decoder).items()}
    wanted = {f"decoder/{path}": jax.ShapeDtypeStruct(shapes[path], dtype, sharding=sharding)
              for path, sharding in _shardings(decoder, mesh).items()}
    parameters = _read(source, directory, wanted)
    return with_parameters(decoder, {path.removeprefix("decoder/"): value for path, value in parameters.items()})


def load_parameters(directory: str | Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Parameters:
    """Loads some parameters of a model in any layout, for a stage that starts from it or has it as a teacher.

    All processes of a cluster call this with the same arguments; each device reads only its part.

    Args:
      directory: see `open_source`; also a run that trained only a vision tower.
      wanted: shapes, dtypes and shardings by name.

    Raises:
      ConvertError: see `open_source`; or parameters are missing or have another shape (all are named).
      CheckpointError: the same, of a run.
    """
    if is_run(directory):
        return run_parameters.load_parameters(directory, wanted)
    source = open_source(directory)
    if problem := misfit(source.weights.where, source.weights.shapes, wanted):
        rows = source.config.decoder  # the vocabulary has grown to a size that shards
        raise ConvertError(f"{problem}. Its vocabulary is read as --config.model.decoder.vocab_size={rows.vocab_size} "
                           f"--config.model.decoder.vocab_padding={rows.vocab_padding}")
    return read_parameters(source.weights, wanted)


def save_model(model: VocoLlama, card: ModelCard, directory: str | Path, layout: Layout = "huggingface") -> None:
    """Writes a model with its card and its tokenizer to a new directory.

    Args:
      model: the model; this process must be able to read all of its parameters.
      card: the model's card; `load_card` reads that of the directory which the model was loaded from.
      directory: the new directory. It appears when it is complete.
      layout: see `export`.

    Raises:
      ConvertError: the card is another model's, the directory exists, or the layout does not support the model.
    """
    if card.model != model.config:
        raise ConvertError("the card's config is not the model's; pass load_card of the directory that the model was "
                           "loaded from")
    if card.tokenizer.voco_id != model.config.voco.token_id:
        raise ConvertError(f"<voco> is token {model.config.voco.token_id} in the model and token "
                           f"{card.tokenizer.voco_id} in the card's tokenizer; pass the model's own card")
    export(Source(card, ParametersInMemory(parameters_of(model))), directory, layout)


def load_card(directory: str | Path) -> ModelCard:
    """Reads the card of the model in a directory in any layout that `open_source` knows.

    Raises:
      ConvertError: see `open_source`.
      CheckpointError: see `open_source`.
    """
    return read_card(directory) if is_run(directory) else open_source(directory).card


def _read(source: Source, directory: str | Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Parameters:
    """Reads a run's parameters in parallel, those of another layout one by one; each device reads only its part."""
    if is_run(directory):
        return run_parameters.load_parameters(directory, wanted)
    return read_parameters(source.weights, wanted)


def _shardings(model: Model, mesh: Mesh | None) -> Mapping[str, Sharding]:
    if mesh is not None:
        return parameter_shardings(model, mesh)
    return dict.fromkeys(variables_of(model), SingleDeviceSharding(jax.local_devices()[0]))
