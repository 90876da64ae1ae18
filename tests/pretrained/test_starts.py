"""A stage starts from, and learns from, a model in any layout; every device reads only its part of it."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from tests.helpers import checkpoints
from vocojax.config import ConfigError
from vocojax.convert.mapped import MappedWeights
from vocojax.errors import ConvertError
from vocojax.models.parameters import parameters_of
from vocojax.models.voco import VocoLlama
from vocojax.pretrained.loading import load_model, load_parameters, save_model
from vocojax.runs.card import ModelCard
from vocojax.runs.directory import CheckpointError
from vocojax.runs.parameters import load_model as load_run
from vocojax.training.config import DistillConfig
from vocojax.training.stage import train

LAYOUTS = ("orbax", "huggingface", "llava")


@pytest.fixture(scope="module")
def start(tiny_config, words, tmp_path_factory):
    """A model with parameters of its own, in all layouts."""
    root = tmp_path_factory.mktemp("start")
    model = VocoLlama(tiny_config, nnx.Rngs(5), np.float32)
    for layout in LAYOUTS:
        save_model(model, ModelCard(tiny_config, words), root / layout, layout)
    return model, root


def published(stage, directory):
    """The stage for the model as a published directory holds it."""
    return dataclasses.replace(stage, model=load_model(directory).config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stage_starts_from_any_layout(stage, start, tmp_path, layout):
    model, root = start
    stage = dataclasses.replace(published(stage, root / layout), steps=1, init_from=str(root / layout),
                                optimizer=dataclasses.replace(stage.optimizer, learning_rate=1e-30))
    train(stage, tmp_path / "run")
    started = parameters_of(load_run(tmp_path / "run"))
    tokens = model.config.decoder.num_tokens
    for name, value in parameters_of(model).items():
        kept = started[name]
        if name == "decoder/embedding":
            kept, value = kept[:tokens], value[:tokens]
        elif name == "decoder/head/kernel":
            kept, value = kept[:, :tokens], value[:, :tokens]
        np.testing.assert_allclose(kept, value, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("layout", ["huggingface", "llava"])
def test_a_teacher_may_have_any_layout(stage, start, tmp_path, layout):
    _, root = start
    stage = dataclasses.replace(published(stage, root / layout), steps=1, log_every=1, init_from=str(root / layout),
                                distill=DistillConfig(teacher=str(root / layout)))
    train(stage, tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert metrics["kl"] > 1e-6  # the teacher sees the vision tokens, the student does not
    other = dataclasses.replace(stage.model, decoder=dataclasses.replace(stage.model.decoder, rope_theta=5e5))
    with pytest.raises(ConfigError, match=r"distill\.teacher must be of the same model, but .* decoder\.rope_theta"):
        train(dataclasses.replace(stage, model=other, init_from=""), tmp_path / "other")


def test_a_run_without_its_tokenizer_is_a_start_and_a_teacher(stage, tmp_path):
    """Nothing of its tokenizer is needed for either."""
    train(dataclasses.replace(stage, steps=1), tmp_path / "first")
    shutil.rmtree(tmp_path / "first" / "tokenizer")
    first = str(tmp_path / "first")
    train(dataclasses.replace(stage, steps=1, init_from=first, distill=DistillConfig(teacher=first)), tmp_path / "next")


def test_random_parameters_that_are_frozen_are_warned_of(stage, tmp_path, caplog):
    train(dataclasses.replace(stage, steps=1), tmp_path / "run")
    assert any("parameters are random and frozen, so they never learn anything (vision/" in record.getMessage()
               for record in caplog.records)


def test_a_checkpoint_without_its_parameters_is_damaged(stage, tmp_path):
    train(dataclasses.replace(stage, steps=1), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "1" / "parameters")
    with pytest.raises(CheckpointError, match=r"parameters IS DAMAGED: .*run its command again"):
        load_run(tmp_path / "run")


def test_a_directory_that_does_not_fit_names_every_parameter(tmp_path):
    checkpoints.save_original(tmp_path / "source", checkpoints.original_tensors())
    leaf = jax.ShapeDtypeStruct((3, 4), np.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    with pytest.raises(ConvertError, match=r"does not fit the model: nowhere is missing; decoder/norm/scale has shape "
                                           r"\(32,\), expected \(3, 4\)"):
        load_parameters(tmp_path / "source", {"nowhere": leaf, "decoder/norm/scale": leaf})


def test_only_what_is_wanted_is_read(start, monkeypatch):
    _, root = start
    read, names = MappedWeights.read, []
    monkeypatch.setattr(MappedWeights, "read", lambda self, name, index=None: names.append((name, index)) or read(
        self, name, index))
    leaf = jax.ShapeDtypeStruct((32,), np.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    load_parameters(root / "huggingface", {"decoder/norm/scale": leaf})
    assert [name for name, _ in names] == ["decoder/norm/scale"] and names[0][1] is not None
