"""A tiny model that answers with a few words, which depend on the question."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from vocojax import testing
from vocojax.models.parameters import parameters_of, with_parameters
from vocojax.pretrained.loading import save_model
from vocojax.runs.card import ModelCard

WORDS = ("is there a thing dog cat in the image ? 0 1 2 3 4 5 6 yes no Yes Yes. No Answer USER: ASSISTANT:",)


def save_yes_no_model(directory: Path) -> Path:
    """Writes the model in the Hugging Face layout and returns its directory."""
    tokenizer = testing.tiny_tokenizer(WORDS)
    config = testing.tiny_config(tokenizer)
    model = testing.tiny_model(config)
    parameters = parameters_of(model)
    head_EV = np.zeros(parameters["decoder/head/kernel"].shape, np.float32)
    said = [*(tokenizer.encode(word).ids[0] for word in ("yes", "no", "Yes.", "No")), tokenizer.eos_id]
    head_EV[:, said] = np.random.default_rng(11).normal(size=(len(head_EV), len(said)))
    parameters |= {name: 3 * value for name, value in parameters.items()
                   if name.startswith("decoder/blocks") and "kernel" in name}  # or else all questions are alike
    parameters["decoder/head/kernel"] = jnp.asarray(head_EV)
    save_model(with_parameters(model, parameters), ModelCard(config, tokenizer, "short", "pad", "voco"), directory)
    return directory
