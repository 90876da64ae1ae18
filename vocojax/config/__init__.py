"""Model configurations, the named presets, and the strict reader that builds them from a mapping."""

from vocojax.config.model import (
    PAPER_VOCO,
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
    VocoPlaces,
    VocoReads,
    VocoRows,
    VocoSees,
    levels_of,
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
    "PAPER_VOCO", "PRESETS", "SEEDS", "CompressorConfig", "ConfigError", "DecoderConfig", "LoraConfig", "ModelConfig",
    "Positions", "ProjectorConfig", "RopeScalingConfig", "VisionConfig", "VocoConfig", "VocoInit", "VocoPlaces",
    "VocoReads", "VocoRows", "VocoSees", "build", "config_to_dict", "differing_keys", "levels_of", "preset",
    "require", "require_positive", "require_seed",
]
