"""One export of a tiny model, opened by PyTorch and by vocojax; what the tests compute with both is compared."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from vocojax.inference.assistant import Assistant
from vocojax.models.parameters import abstract, parameters_of, with_parameters
from vocojax.models.voco import VocoLlama
from vocojax.pretrained.loading import save_model
from vocojax.runs.card import ModelCard


@dataclass(frozen=True, repr=False)
class Pair:
    """A model in PyTorch and in vocojax.

    Attributes:
      directory: the export that both are opened from.
      model: the model in PyTorch.
      processor: its processor.
      assistant: the model in vocojax.
    """

    directory: Path
    model: Any
    processor: Any
    assistant: Assistant


def open_pair(directory: Path, **settings: Any) -> Pair:
    """Opens an export with both."""
    model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True, **settings)
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    return Pair(directory, model.eval(), processor, Assistant.from_pretrained(directory))


@pytest.fixture(scope="session")
def voco(tiny_config, tiny_model, words, tmp_path_factory) -> Pair:
    """A model with the VoCo mask and two VoCo tokens."""
    directory = tmp_path_factory.mktemp("torch") / "voco"
    save_model(tiny_model, ModelCard(tiny_config, words, "short", "pad", "voco"), directory)
    return open_pair(directory)


@pytest.fixture(scope="session")
def causal(tiny_config, tiny_model, words, tmp_path_factory) -> Pair:
    """The same weights as an upper bound."""
    directory = tmp_path_factory.mktemp("torch") / "causal"
    save_model(tiny_model, ModelCard(tiny_config, words, "short", "pad", "causal"), directory)
    return open_pair(directory)


@pytest.fixture(scope="session")
def sequential(tiny_config, tiny_model, words, tmp_path_factory) -> Pair:
    """The same weights, with images numbered one after the other."""
    config = dataclasses.replace(tiny_config, voco=dataclasses.replace(tiny_config.voco, positions="sequential"))
    directory = tmp_path_factory.mktemp("torch") / "sequential"
    model = with_parameters(abstract(lambda: VocoLlama(config, nnx.Rngs(0), np.float32)), parameters_of(tiny_model))
    save_model(model, ModelCard(config, words, "short", "pad", "voco"), directory)
    return open_pair(directory)


@pytest.fixture(scope="session")
def nested(tiny_config, tiny_model, words, tmp_path_factory) -> Pair:
    """The same weights with four VoCo tokens, with the means of nested windows and offsets of their own."""
    voco = dataclasses.replace(tiny_config.voco, num_vocos=4, init="pool_nested", rows="own")
    directory = tmp_path_factory.mktemp("torch") / "nested"
    config = dataclasses.replace(tiny_config, voco=voco)
    offsets = 0.1 * np.random.default_rng(1).normal(size=(4, config.decoder.width)).astype(np.float32)
    model = with_parameters(abstract(lambda: VocoLlama(config, nnx.Rngs(0), np.float32)),
                            {**parameters_of(tiny_model), "decoder/voco_offsets": jnp.asarray(offsets)})
    save_model(model, ModelCard(config, words, "short", "pad", "voco"), directory)
    return open_pair(directory)


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    """Images of different shapes."""
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
            for height, width in ((32, 32), (20, 45), (70, 33))]
