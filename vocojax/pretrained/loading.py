"""Models in memory from weights on disk, and back."""

from collections.abc import Collection, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from vocojax.data.tokenizer import Tokenizer
from vocojax.errors import ConvertError
from vocojax.models.llama import Decoder
from vocojax.models.parameters import Model, abstract, parameters_of, variables_of, with_parameters
from vocojax.models.voco import VocoLlama
from vocojax.parallel.shardings import parameter_shardings
from vocojax.pretrained.export import Layout, export
from vocojax.pretrained.source import Source, open_source
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
    """A model from weights in any layout that `open_source` knows.

    Args:
      directory, vision, projector, tokenizer, num_vocos, allow_missing: see `open_source`.
      mesh: where the parameters go, by their logical axes; every device is sent only its part. None: the first device.
      dtype: of the parameters and of the computation; None keeps the decoder's on disk.
      seed: of the random values that parameters get whose tensors are missing and may be.

    Raises:
      ConvertError: see `open_source`; the directory holds a decoder alone.
    """
    source = open_source(directory, vision=vision, projector=projector, tokenizer=tokenizer, num_vocos=num_vocos,
                         allow_missing=allow_missing)
    if source.decoder_only:
        raise ConvertError(f"{directory}: holds a decoder alone; name a vision tower (vision=...) or use load_decoder")
    dtype = jnp.dtype(dtype or source.weights.dtype("decoder/embedding"))
    model = abstract(lambda: VocoLlama(source.config, nnx.Rngs(seed), dtype))
    shardings = _shardings(model, mesh)
    parameters = read_parameters(source.weights, shardings, dtype)
    if absent := shardings.keys() - parameters.keys():
        create = lambda: {path: value.astype(dtype) for path, value in
                          parameters_of(VocoLlama(source.config, nnx.Rngs(seed), dtype)).items() if path in absent}
        parameters |= jax.jit(create, out_shardings={path: shardings[path] for path in absent})()
    return with_parameters(model, parameters)


def load_decoder(directory: str | Path, *, mesh: Mesh | None = None, dtype: DTypeLike | None = None) -> Decoder:
    """The decoder alone, from weights in any layout that `open_source` knows; `dtype` is of the parameters.

    Raises:
      ConvertError: see `open_source`.
    """
    source = open_source(directory)
    dtype = jnp.dtype(dtype or source.weights.dtype("decoder/embedding"))
    decoder = abstract(lambda: Decoder(source.config.decoder, nnx.Rngs(0)))
    shardings = {f"decoder/{path}": sharding for path, sharding in _shardings(decoder, mesh).items()}
    parameters = read_parameters(source.weights, shardings, dtype)
    return with_parameters(decoder, {path.removeprefix("decoder/"): value for path, value in parameters.items()})


def save_model(
    model: VocoLlama, directory: str | Path, layout: Layout = "huggingface", *, tokenizer: Tokenizer
) -> None:
    """Writes a model with its tokenizer to a new directory; see `export`.

    Args:
      model: the parameters to write; every device's part must be within this process's reach.
      directory: it appears when everything is in it.
      layout: `huggingface`, `llava` or `orbax`.
      tokenizer: the model's.

    Raises:
      ConvertError: the tokenizer is another model's, the directory exists, or the layout has no place for the model.
    """
    if tokenizer.voco_id != model.config.voco.token_id:
        raise ConvertError(f"the model's <voco> is token {model.config.voco.token_id}, the tokenizer's is "
                           f"{tokenizer.voco_id}: it is another model's")
    export(Source(model.config, ParametersInMemory(parameters_of(model)), tokenizer), directory, layout)


def _shardings(model: Model, mesh: Mesh | None) -> Mapping[str, Sharding]:
    if mesh is not None:
        return parameter_shardings(model, mesh)
    return dict.fromkeys(variables_of(model), SingleDeviceSharding(jax.local_devices()[0]))
