"""A stage of four steps on the tests' own LLaVA records."""

import pytest

from vocojax.data.config import DataConfig
from vocojax.training.config import CheckpointConfig, OptimizerConfig, StageConfig


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
        train=("projector/.*", "decoder/.*"),
        freeze=("vision/.*",),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        checkpoint=CheckpointConfig(every=2, keep=2),
        batch_size=4,
        steps=4,
        dtype="float32",
        frozen_dtype="float32",
        remat="none",
        log_every=2,
    )
