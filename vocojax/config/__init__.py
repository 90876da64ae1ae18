"""Model configurations, the named presets, and the strict reader that builds them from a mapping."""

from vocojax.config.model import (
    CompressorConfig,
    DecoderConfig,
    LoraConfig,
    ModelConfig,
    Positions,
    ProjectorConfig,
    RopeScalingConfig,
    VisionConfig,
    VocoConfig,
    VocoInit,
    VocoRows,
)
from vocojax.config.presets import PRESETS, preset
from vocojax.config.reader import (
    SEEDS,
    ConfigError,
    build,
    config_to_dict,
    differing_keys,
    require,
    require_positive,
    require_seed,
)

__all__ = [
    "PRESETS", "SEEDS", "CompressorConfig", "ConfigError", "DecoderConfig", "LoraConfig", "ModelConfig", "Positions",
    "ProjectorConfig", "RopeScalingConfig", "VisionConfig", "VocoConfig", "VocoInit", "VocoRows", "build",
    "config_to_dict", "differing_keys", "preset", "require", "require_positive", "require_seed",
]
