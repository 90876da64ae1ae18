"""Model configurations by name."""

import dataclasses
import types
from collections.abc import Mapping

from vocojax.config.model import DecoderConfig, ModelConfig, VisionConfig, VocoConfig
from vocojax.config.reader import ConfigError


def _clip_vicuna(image_size: int, decoder: DecoderConfig) -> ModelConfig:
    return ModelConfig(vision=VisionConfig(image_size=image_size), decoder=decoder)


# Vicuna's 32000 rows after a conversion: one more for <voco>, then padding to a multiple of 256.
_VICUNA_7B = DecoderConfig(vocab_size=32256, vocab_padding=255)
_VICUNA_13B = dataclasses.replace(_VICUNA_7B, width=5120, depth=40, num_heads=40, num_kv_heads=40, mlp_width=13824)

PRESETS: Mapping[str, ModelConfig] = types.MappingProxyType({
    "tiny": ModelConfig(
        vision=VisionConfig(image_size=64, patch_size=16, width=64, depth=2, num_heads=4, mlp_width=256),
        decoder=DecoderConfig(vocab_size=64, width=64, depth=3, num_heads=2, num_kv_heads=2, head_width=32,
                              mlp_width=128),
        voco=VocoConfig(token_id=63),
    ),
    "clip_l_336_vicuna_7b": _clip_vicuna(336, _VICUNA_7B),
    "clip_l_224_vicuna_7b": _clip_vicuna(224, _VICUNA_7B),
    "clip_l_336_vicuna_13b": _clip_vicuna(336, _VICUNA_13B),
})


def preset(name: str) -> ModelConfig:
    """Returns the model configuration of that name.

    Raises:
      ConfigError: there is no such preset; the message lists the names.
    """
    if name not in PRESETS:
        raise ConfigError("preset", f"must be one of {sorted(PRESETS)}, got {name!r}")
    return PRESETS[name]
