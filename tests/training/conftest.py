"""The quickstart's stage, for tests of training."""

import dataclasses

import pytest

from vocojax.training.config import StageConfig, stage_config


@pytest.fixture(scope="session")
def quickstart_stage(tmp_path_factory) -> StageConfig:
    """The quickstart's voco stage in float32, with random first parameters."""
    pytest.importorskip("easy_vqa")
    from configs.quickstart import get_config
    from vocojax.data.sources.easy_vqa import EasyVqaSource
    from vocojax.data.tokenizer import word_tokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    words = word_tokenizer(f"{q.text} {q.answer}" for group in EasyVqaSource("train").questions for q in group)
    words.save(directory)
    values = get_config("voco_1")
    values.data.tokenizer = str(directory)
    config = stage_config(values)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, num_threads=1, pack_window=8))
