"""Alignment starts from published parts: a LLaMA and a CLIP tower, converted, and a projector that is new."""

import dataclasses
import json
import logging

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import checkpoints
from vocojax.config import LoraConfig, ModelConfig, build
from vocojax.data.config import DataConfig
from vocojax.pretrained.conversion import convert
from vocojax.runs.weights import RunWeights
from vocojax.training.checkpoints import CheckpointError
from vocojax.training.config import StageConfig
from vocojax.training.stage import train


def test_alignment_from_a_llama_and_a_tower(tmp_path, llava_data, caplog):
    parts = checkpoints.save_parts(tmp_path)
    convert(parts["source"], tmp_path / "pretrained", "orbax", vision=parts["vision"], report=lambda _: None,
            allow_missing=[r"model\.mm_projector\..*"])
    values = json.loads((tmp_path / "pretrained" / "config.json").read_text())
    values["model"]["decoder"]["rope_theta"] = 500000.0  # no shape tells that it is another
    stage = StageConfig(
        name="alignment", model=build(ModelConfig, values["model"]),
        data=DataConfig(path=str(llava_data / "records.json"), image_root=str(llava_data / "images"),
                        tokenizer=str(tmp_path / "pretrained" / "tokenizer"), template="plain", row_length=48,
                        images_per_row=2, max_targets=12, num_threads=1),
        learning_rates=(("projector/.*", 1.0), (".*", "freeze")), visibility="causal", batch_size=2, steps=1,
        dtype="float32", remat="none", init_from=str(tmp_path / "pretrained"), init_new=("projector/.*",),
    )
    with pytest.raises(CheckpointError) as caught:
        train(dataclasses.replace(stage, init_new=("projector/.*/bias",)), tmp_path / "short_list")
    assert str(caught.value).startswith(f"{tmp_path / 'pretrained'}/checkpoints/0 does not fit the model: "
                                        "projector/linear_in/kernel is missing; projector/linear_out/kernel is missing")
    with caplog.at_level(logging.INFO, "vocojax"):
        train(stage, tmp_path / "alignment")
    messages = [record.getMessage() for record in caplog.records]
    (_, *rows, _) = (tmp_path / "alignment" / "parameters.txt").read_text().splitlines()
    origins = {row.split()[0]: row.split()[-1] for row in rows}
    assert {name for name, origin in origins.items() if origin == "random"} == {
        f"projector/linear_{part}" for part in ("in/bias", "in/kernel", "out/bias", "out/kernel")}
    assert set(origins.values()) == {"random", str(tmp_path / "pretrained")}
    assert (f"model.decoder.rope_theta is not what {tmp_path / 'pretrained'}, where the parameters come from, was made "
            "with") in messages
    pretrained, aligned = (
        RunWeights(tmp_path / name, LoraConfig()) for name in ("pretrained", "alignment"))
    assert len(pretrained.shapes) == 51 and len(aligned.shapes) == 55
    for name in pretrained.shapes:
        np.testing.assert_array_equal(aligned.read(name), pretrained.read(name).astype(jnp.bfloat16), err_msg=name)
