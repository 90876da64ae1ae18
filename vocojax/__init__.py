"""vocojax: VoCo-LLaMA (arXiv 2406.12275) in JAX/Flax for TPU and GPU.

    import vocojax

    assistant = vocojax.load("runs/voco")              # a run, a Hugging Face directory, a LLaVA, ...
    cache = assistant.compress("photo.png")            # once
    assistant.read(cache, "What is in the picture?")   # as often as you like

The names below are the public API. Each is imported when it is first used, so that `import vocojax` is fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

from vocojax import _moved

if TYPE_CHECKING:
    from vocojax.config import PRESETS, ConfigError, ModelConfig, preset
    from vocojax.data.tokenizer import Tokenizer
    from vocojax.errors import ConvertError, VocojaxError
    from vocojax.inference.assistant import Assistant
    from vocojax.inference.caches.cache import VocoCache
    from vocojax.inference.caches.store import Store
    from vocojax.inference.decoding.sampling import SamplingConfig
    from vocojax.inference.many import answer_many
    from vocojax.inference.requests import Answer, Request
    from vocojax.inference.visuals import Video
    from vocojax.kernels.interval_attention import IntervalMask, interval_attention
    from vocojax.pretrained.conversion import convert as convert_weights
    from vocojax.pretrained.loading import load_card, load_model, save_model
    from vocojax.pretrained.processor import Processor
    from vocojax.runs.card import ModelCard
    from vocojax.training.config import StageConfig, stage_config
    from vocojax.training.stage import train

    load = Assistant.from_pretrained

__version__ = "0.2.0"
__all__ = [
    "PRESETS", "Answer", "Assistant", "ConfigError", "ConvertError", "IntervalMask", "ModelCard", "ModelConfig",
    "Processor", "Request", "SamplingConfig", "StageConfig", "Store", "Tokenizer", "Video", "VocoCache",
    "VocojaxError", "answer_many", "convert_weights", "interval_attention", "load", "load_card", "load_model", "preset",
    "save_model", "stage_config", "train",
]
# Public name -> its module.
_HOMES = {
    "PRESETS": "vocojax.config",
    "Answer": "vocojax.inference.requests",
    "Assistant": "vocojax.inference.assistant",
    "ConfigError": "vocojax.config",
    "ConvertError": "vocojax.errors",
    "IntervalMask": "vocojax.kernels.interval_attention",
    "ModelCard": "vocojax.runs.card",
    "ModelConfig": "vocojax.config",
    "Processor": "vocojax.pretrained.processor",
    "Request": "vocojax.inference.requests",
    "SamplingConfig": "vocojax.inference.decoding.sampling",
    "StageConfig": "vocojax.training.config",
    "Store": "vocojax.inference.caches.store",
    "Tokenizer": "vocojax.data.tokenizer",
    "Video": "vocojax.inference.visuals",
    "VocoCache": "vocojax.inference.caches.cache",
    "VocojaxError": "vocojax.errors",
    "answer_many": "vocojax.inference.many",
    "interval_attention": "vocojax.kernels.interval_attention",
    "load_card": "vocojax.pretrained.loading",
    "load_model": "vocojax.pretrained.loading",
    "preset": "vocojax.config",
    "save_model": "vocojax.pretrained.loading",
    "stage_config": "vocojax.training.config",
    "train": "vocojax.training.stage",
}


if not TYPE_CHECKING:  # type checkers read the imports above, and report a name that is not there

    def __getattr__(name: str) -> Any:
        if name == "load":
            value = __getattr__("Assistant").from_pretrained
        elif name == "convert_weights":
            value = importlib.import_module("vocojax.pretrained.conversion").convert
        elif name in _HOMES:
            value = getattr(importlib.import_module(_HOMES[name]), name)
        else:
            raise AttributeError(f"module 'vocojax' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


_moved.install()
