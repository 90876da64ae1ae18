"""Models in memory from weights on disk, in any layout, and back."""

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
from vocojax.weights import ParametersInMemory, read_parameters


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
    seed: int = 0,
) -> VocoLlama:
    """Loads a model from weights in any layout that `open_source` knows.

    Args:
      directory: see `open_source`, as for vision, projector, tokenizer, num_vocos and allow_missing.
      mesh: where the parameters go, by their logical axes; every device is sent only its part. None: the first device.
      dtype: of the parameters and of the computation; None keeps the decoder's on disk.
      seed: of the random values of parameters whose tensors are missing and may be.

    Raises:
      ConvertError, CheckpointError: see `open_source`; the directory holds a decoder alone.
    """
    source = open_source(directory, vision=vision, projector=projector, tokenizer=tokenizer, num_vocos=num_vocos,
                         allow_missing=allow_missing)
    return model_of(source, directory, mesh=mesh, dtype=dtype, seed=seed)


def model_of(
    source: Source, directory: str | Path, *, mesh: Mesh | None = None, dtype: DTypeLike | None = None, seed: int = 0
) -> VocoLlama:
    """Loads the model of a directory that is open already; arguments as `load_model`'s."""
    if source.decoder_only:
        raise ConvertError(f"{directory}: holds a decoder alone; name a vision tower (vision=...) or use load_decoder")
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
    """Loads the decoder alone, from weights in any layout that `open_source` knows.

    Args:
      directory: see `open_source`.
      mesh: as for `load_model`.
      dtype: of the parameters; None keeps the decoder's on disk.

    Raises:
      ConvertError, CheckpointError: see `open_source`.
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
    """Loads some parameters of a model in any layout, for a stage that starts from it or learns from it.

    All processes of a cluster call this alike; every device reads only its part.

    Args:
      directory: see `open_source`; a run may also be a vision tower's alone.
      wanted: shapes, dtypes and shardings by name.

    Raises:
      ConvertError, CheckpointError: see `open_source`; parameters are missing or have another shape (all are named).
    """
    if is_run(directory):
        return run_parameters.load_parameters(directory, wanted)
    source = open_source(directory)
    shapes = source.weights.shapes
    problems = [f"{name} is missing" for name in wanted if name not in shapes]
    problems += [f"{name} has shape {tuple(shapes[name])}, expected {leaf.shape}" for name, leaf in wanted.items()
                 if name in shapes and tuple(shapes[name]) != tuple(leaf.shape)]
    if problems:
        raise ConvertError(f"{source.weights.where} does not fit the model: {'; '.join(problems)} (set config.model as "
                           "its config.json says; init_new names what a stage does not take from it)")
    return read_parameters(source.weights, wanted)


def save_model(model: VocoLlama, card: ModelCard, directory: str | Path, layout: Layout = "huggingface") -> None:
    """Writes a model with its tokenizer to a new directory; see `export`.

    Args:
      model: its parameters must be within this process's reach.
      card: the model's; `vocojax.load_card` reads that of the directory it was loaded from.
      directory: it appears when everything is in it.
      layout: `huggingface`, `llava` or `orbax`.

    Raises:
      ConvertError: the card is another model's, the directory exists, or the layout has no place for the model.
    """
    if card.model != model.config:
        raise ConvertError("the card is another model's: its config is not the model's")
    if card.tokenizer.voco_id != model.config.voco.token_id:
        raise ConvertError(f"the model's <voco> is token {model.config.voco.token_id}, the tokenizer's is "
                           f"{card.tokenizer.voco_id}: it is another model's")
    export(Source(card, ParametersInMemory(parameters_of(model))), directory, layout)


def load_card(directory: str | Path) -> ModelCard:
    """Reads what a directory in any layout that `open_source` knows says about its model.

    Raises:
      ConvertError, CheckpointError: see `open_source`.
    """
    return read_card(directory) if is_run(directory) else open_source(directory).card


def _read(source: Source, directory: str | Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Parameters:
    """Reads a run in parallel, every device its part; other layouts tensor by tensor."""
    if is_run(directory):
        return run_parameters.load_parameters(directory, wanted)
    return read_parameters(source.weights, wanted)


def _shardings(model: Model, mesh: Mesh | None) -> Mapping[str, Sharding]:
    if mesh is not None:
        return parameter_shardings(model, mesh)
    return dict.fromkeys(variables_of(model), SingleDeviceSharding(jax.local_devices()[0]))
