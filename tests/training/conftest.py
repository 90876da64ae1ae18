"""A stage of four steps on the tests' own LLaVA records."""

import dataclasses

import pytest

from vocojax.data.config import DataConfig
from vocojax.training.config import CheckpointConfig, OptimizerConfig, StageConfig, stage_config


@pytest.fixture
def stage(tiny_config, llava_data) -> StageConfig:
    return StageConfig(
        name="test",
        model=tiny_config,
        data=DataConfig(
            path=str(llava_data / "records.json"), image_root=str(llava_data / "images"),
            tokenizer=str(llava_data / "tokenizer"), template="short", row_length=48, images_per_row=2, pack_window=6,
            max_targets=12, num_threads=1,
        ),
        learning_rates=(("projector/.*", 1.0), ("decoder/.*", 1.0), ("vision/.*", "freeze")),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        checkpoint=CheckpointConfig(every=2, keep=2),
        batch_size=4,
        steps=4,
        dtype="float32",
        frozen_dtype="float32",
        remat="none",
        log_every=2,
    )


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
