"""The stages of configs/, for tests."""

import importlib.util
from pathlib import Path

from vocojax.training.config import StageConfig, stage_config

ROOT = Path(__file__).parent.parent.parent


def load(name: str, **changes) -> StageConfig:
    """A config file of the repository, with paths that nobody reads."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    values = module.get_config()
    values.data.update(tokenizer="-", path="-", image_root="-")
    values.update(changes)
    return stage_config(values, name)
