"""Schedules of the learning rate, and moving averages of what trains: made, kept, resumed, measured and read."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.helpers import run_processes as runs
from tests.helpers.metrics import lines, of_steps
from tests.training.test_validation import loss_of
from vocojax.config import ConfigError, config_to_dict
from vocojax.errors import CheckpointError
from vocojax.parallel.mesh import MeshConfig
from vocojax.pretrained.conversion import convert
from vocojax.runs.listing import list_checkpoints
from vocojax.runs.weights import StoredWeights
from vocojax.training import stage as stages
from vocojax.training.config import OptimizerConfig, ValidationConfig, stage_config
from vocojax.training.optimizer import described_schedule, make_schedule
from vocojax.training.stage import train

DECAY = 0.7


@pytest.mark.parametrize(("config", "rates"), [
    (OptimizerConfig(1.0, 0.2), [0, 0.5, 1, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060, 0]),
    (OptimizerConfig(1.0, 0.0, "constant"), [1] * 11),
    (OptimizerConfig(2.0, 0.4, "constant"), [0, 0.5, 1, 1.5, 2, 2, 2, 2, 2, 2, 2]),
    (OptimizerConfig(1.0, 0.2, "wsd", 0.4), [0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]),
    (OptimizerConfig(3.0, 0.0, "wsd", 1.0), [3, 2.7, 2.4, 2.1, 1.8, 1.5, 1.2, 0.9, 0.6, 0.3, 0]),
    (OptimizerConfig(1.0, 0.0, "wsd", 0.01), [1] * 10 + [0]),
])
def test_schedules_of_ten_steps(config, rates):
    schedule = make_schedule(config, 10)
    np.testing.assert_allclose([float(schedule(taken)) for taken in range(11)], rates, rtol=1e-5, atol=1e-6)


def test_a_schedule_in_words():
    assert described_schedule(OptimizerConfig(1.0, 0.2, "wsd", 0.4), 10, 6) == (
        "constant until it falls in the last 40% of the steps, 1 at step 6, 0.75 at step 8, 0.25 at step 10")
    assert described_schedule(OptimizerConfig(0.5, 0.0, "constant"), 4, 4) == (
        "constant after the warm-up, 0.5 at step 4")


@pytest.mark.parametrize(("changes", "message"), [
    ({"schedule": "linear"}, "optimizer.schedule must be one of 'cosine', 'constant', 'wsd', got 'linear'"),
    ({"ema": 1.0}, "optimizer.ema must be in [0, 1); 0 keeps no average, got 1.0"),
    ({"decay_share": 0.0}, "optimizer.decay_share must be in (0, 1], got 0.0"),
    ({"schedule": "wsd", "warmup_share": 0.5, "decay_share": 0.6},
     "optimizer.decay_share must leave room for warmup_share 0.5: together they are more than 1, got 0.6"),
])
def test_errors_name_the_key(stage, changes, message):
    values = config_to_dict(stage)
    values["optimizer"].update(changes)
    with pytest.raises(ConfigError) as error:
        stage_config(values)
    assert str(error.value) == message


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A function that returns a stage with averages, and copies its finished run, which is trained once.

    The run keeps the checkpoints of all four steps; the parameters before the first one are its checkpoint 0.
    """
    root = tmp_path_factory.mktemp("averaged")

    def copy(stage, target):
        held_out = ValidationConfig(every=4, batches=1, path=stage.data.path, image_root=stage.data.image_root)
        optimizer = dataclasses.replace(stage.optimizer, ema=DECAY, schedule="wsd", decay_share=0.5, warmup_share=0.0)
        config = dataclasses.replace(
            stage, optimizer=optimizer, validation=held_out,
            checkpoint=dataclasses.replace(stage.checkpoint, every=1, keep=4))
        if not (root / "run").exists():
            train(config, root / "run")
        shutil.copytree(root / "run", target)
        return config, target

    return copy


def saved(run, step, part):
    """Returns the arrays of a part of a checkpoint, as Orbax reads them."""
    return ocp.PyTreeCheckpointer().restore(run / "checkpoints" / str(step) / part)


def test_averages_are_those_of_numpy_and_what_readers_get(stage, averaged, tmp_path):
    config, run = averaged(stage, tmp_path / "run")
    with jax.set_mesh(stages.make_mesh(config.mesh)):
        first = stages._initial_state(config, stages.make_program(config, stages.make_mesh(config.mesh))).trained
    average = {name: np.asarray(value, np.float64) for name, value in first.items()}
    for step in range(1, 5):
        trained = saved(run, step, "parameters")
        average = {name: DECAY * average[name] + (1 - DECAY) * trained[name] for name in average}
        found = saved(run, step, "ema")
        for name, value in average.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=f"{name} after step {step}")
    assert any(np.abs(average[name] - trained[name]).max() > 1e-3 for name in average)

    # Everything that reads the run gets them: the model, an export, and the validation while it trained.
    read = StoredWeights(run)
    assert all((read.read(name) == found[name]).all() for name in found)
    convert(run, tmp_path / "export", target_layout="orbax")
    again = StoredWeights(tmp_path / "export")
    assert all((again.read(name) == found[name]).all() for name in found)
    listed = list_checkpoints(run)
    assert [one.problem for one in listed] == [""] * 4
    loss, _ = loss_of(run, stage, config.validation)
    np.testing.assert_allclose(lines(run)[-1]["validation/loss"], loss, rtol=1e-5)
    np.testing.assert_allclose([line["learning_rate"] for line in lines(run)], [1e-2, 1e-2, 1e-2, 5e-3], rtol=1e-6)
    moved = lambda one, other: np.sqrt(sum(np.square(one[name] - other[name]).sum() for name in one))
    np.testing.assert_allclose(lines(run)[3]["update_norm"], moved(saved(run, 4, "parameters"),
                                                                   saved(run, 3, "parameters")), rtol=1e-4)


def test_a_resumed_run_has_the_same_averages_and_a_damaged_one_is_found(stage, averaged, tmp_path):
    config, run = averaged(stage, tmp_path / "run")
    whole, losses = saved(run, 4, "ema"), of_steps(run)
    for step in (3, 4):
        shutil.rmtree(run / "checkpoints" / str(step))
    train(config, run)
    assert of_steps(run) == losses
    assert all((saved(run, 4, "ema")[name] == whole[name]).all() for name in whole)

    progress = json.loads((run / "checkpoints" / "4" / "progress" / "metadata").read_text())
    assert {key.partition("/")[0] for key in progress["checksums"]} == {"parameters", "optimizer", "ema", "frozen"}
    shutil.rmtree(run / "checkpoints" / "4" / "ema")
    with pytest.raises(CheckpointError, match=r"checkpoints/4/ema IS DAMAGED: .* missing"):
        StoredWeights(run)
    train(config, run)  # puts the damaged checkpoint aside, and takes its step again
    assert all((saved(run, 4, "ema")[name] == whole[name]).all() for name in whole)


@pytest.mark.slow
def test_averages_are_the_same_on_every_mesh(stage, tmp_path):
    """And what is measured of them; their parts lie on the devices as those of the parameters do."""
    held_out = ValidationConfig(every=2, batches=2, path=stage.data.path, image_root=stage.data.image_root)
    config = dataclasses.replace(
        stage, batch_size=8, steps=2, validation=held_out, optimizer=dataclasses.replace(stage.optimizer, ema=DECAY))
    runs.run(config, tmp_path / "one")
    whole = saved(tmp_path / "one", 2, "ema")
    for name, processes, devices, mesh in (
        ("two", 2, 1, MeshConfig(data=-1)), ("four", 1, 4, MeshConfig(data=2, fsdp=2)),
        ("eight", 2, 4, MeshConfig(fsdp=4, tensor=2)),
    ):
        runs.run(dataclasses.replace(config, mesh=mesh), tmp_path / name, processes, devices)
        found = StoredWeights(tmp_path / name)
        assert {key for key in found.shapes if not key.startswith("vision/")} == whole.keys()
        for key, value in whole.items():
            np.testing.assert_allclose(found.read(key), value, rtol=1e-4, atol=1e-5, err_msg=f"{key}, {name}")
        for line, other in zip(lines(tmp_path / name), lines(tmp_path / "one"), strict=True):
            for key in ("learning_rate", "update_norm", *(("validation/loss",) if line["step"] == 2 else ())):
                np.testing.assert_allclose(line[key], other[key], rtol=1e-4, err_msg=key)
