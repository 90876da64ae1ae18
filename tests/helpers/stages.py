"""The stages of configs/, for tests."""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from vocojax.training.config import StageConfig, stage_config

ROOT = Path(__file__).parent.parent.parent
NO_DATA = {"tokenizer": "-", "path": "-", "image_root": "-"}


def load(name: str, *arguments: str, **changes) -> StageConfig:
    """Returns the stage of a config file, with paths that nobody reads.

    Args:
      name: of a file in configs/, without `.py`.
      arguments: of its `get_config`, such as a model preset.
      changes: keys over those of the file; a dict changes only what it names.
    """
    values = get_config(name, *arguments)
    values.data.update(NO_DATA)
    values.update(changes)
    return stage_config(values, name)


def load_for_a_pod(name: str, *arguments: str, **changes) -> StageConfig:
    """Returns `load` with the overrides that the config file's docstring gives for a pod."""
    overrides = {
        "voco": {"batch_size": 128, "steps": 5200},
        "alignment": {"data": {"row_length": 1280, "images_per_row": 2}, "batch_size": 128},
    }
    return load(name, *arguments, **(overrides[name] | changes))


def get_config(name: str, *arguments: str) -> ConfigDict:
    """Returns what a config file's `get_config` returns."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)
