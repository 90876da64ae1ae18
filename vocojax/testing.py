"""The tiny model of the tests and its word tokenizer, for the tests of whoever builds on this package.

    tokenizer = vocojax.testing.tiny_tokenizer()
    model = vocojax.testing.tiny_model(vocojax.testing.tiny_config(tokenizer))
"""

import dataclasses
from collections.abc import Iterable

import jax.numpy as jnp
from flax import nnx

from vocojax.config import ModelConfig, preset
from vocojax.data.tokenizer import Tokenizer, word_tokenizer
from vocojax.models.voco import VocoLlama

SENTENCES = ("what color is the shape ? red green blue yes no USER: ASSISTANT: a picture of",)


def tiny_tokenizer(sentences: Iterable[str] = SENTENCES) -> Tokenizer:
    """Returns a tokenizer that knows the words of some sentences, `<voco>` included."""
    return word_tokenizer(sentences)


def tiny_config(tokenizer: Tokenizer) -> ModelConfig:
    """Returns the config of a model that runs in milliseconds.

    Images are 32 x 32 pixels in 16 vision tokens and 2 VoCo tokens; the decoder has 2 layers of width 32 and grouped
    key/value heads.

    Args:
      tokenizer: the model's vocabulary is this one's.
    """
    tiny = preset("tiny")
    return dataclasses.replace(
        tiny,
        vision=dataclasses.replace(tiny.vision, image_size=32, width=16, num_heads=2, mlp_width=32),
        decoder=dataclasses.replace(tiny.decoder, vocab_size=len(tokenizer), width=32, depth=2, num_heads=4,
                                    num_kv_heads=2, head_width=8, mlp_width=48),
        voco=dataclasses.replace(tiny.voco, num_vocos=2, token_id=tokenizer.voco_id),
    )


def tiny_model(config: ModelConfig, seed: int = 0) -> VocoLlama:
    """Returns a model with random fp32 parameters."""
    return VocoLlama(config, nnx.Rngs(seed), jnp.float32)
