"""Loss on held-out data: what it is, that it changes nothing, and checkpoints kept by it."""

import dataclasses
import itertools
import json
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import run_processes as runs
from tests.helpers.metrics import lines, of_steps
from vocojax.config import ConfigError, config_to_dict
from vocojax.data.loader import BatchStream
from vocojax.layout import IGNORE
from vocojax.models.voco import rows_from_batch
from vocojax.parallel.mesh import MeshConfig
from vocojax.parallel.preemption import Preempted, StopRequest
from vocojax.runs.parameters import load_model
from vocojax.training.config import CheckpointConfig, ValidationConfig, stage_config
from vocojax.training.stage import train
from vocojax.training.validation import validation_data


@pytest.fixture
def held_out(llava_data, tmp_path):
    """Four of the records."""
    path = tmp_path / "held_out.json"
    path.write_text(json.dumps(json.loads((llava_data / "records.json").read_text())[3:7]))
    return ValidationConfig(every=2, batches=2, path=str(path), image_root=str(llava_data / "images"))


def loss_of(workdir, stage, validation):
    """(mean loss, accuracy) per target of a run's model on the first batches, with no code of training's."""
    model = load_model(workdir)
    data = dataclasses.replace(stage.data, path=validation.path)
    stream = BatchStream(stage.model, data, stage.batch_size, stage.seed, "voco")
    logits = jax.jit(lambda batch: model.decoder.logits(
        jnp.take_along_axis(model(rows_from_batch(batch, ""))[0], batch["target_index"][..., None], axis=1)))
    losses, hits = [], []
    for batch in itertools.islice(stream, validation.batches):
        batch = {name: jnp.asarray(array) for name, array in batch.items()}
        logits_BTV = np.asarray(logits(batch), np.float64)
        for logits_V, target in zip(logits_BTV.reshape(-1, logits_BTV.shape[-1]), batch["target_ids"].reshape(-1),
                                    strict=True):
            if target != IGNORE:
                losses.append(np.log(np.exp(logits_V).sum()) - logits_V[target])
                hits.append(logits_V.argmax() == target)
    stream.close()
    return np.mean(losses), np.mean(hits)


def test_it_is_the_loss_on_the_same_batches_and_changes_no_step(stage, held_out, tmp_path):
    stage = dataclasses.replace(stage, steps=3, accumulate=2)
    train(stage, tmp_path / "without")
    train(dataclasses.replace(stage, validation=held_out), tmp_path / "with")
    validated = lines(tmp_path / "with")
    assert [line["step"] for line in validated if "validation/loss" in line] == [2, 3]
    for line in validated:
        if line["step"] == 3:
            loss, accuracy = loss_of(tmp_path / "with", stage, held_out)
            np.testing.assert_allclose(line.pop("validation/loss"), loss, rtol=1e-5)
            assert line.pop("validation/accuracy") == accuracy
    assert of_steps(tmp_path / "with") == of_steps(tmp_path / "without")


def test_a_run_is_kept_by_its_validation_and_goes_on_with_another(stage, held_out, tmp_path, monkeypatch):
    """The best of the checkpoints whose step was validated; the last steps' are the newest."""
    answers = iter([3.0, 1.0, 2.0, 4.0, 5.0])
    measure = lambda state, should_continue: {"validation/loss": next(answers)}
    monkeypatch.setattr("vocojax.training.stage.Validation", lambda *_: measure)
    stage = dataclasses.replace(stage, steps=8, validation=held_out)
    best = CheckpointConfig(every=2, keep=1, keep_best=1, best_metric="validation/loss")
    train(dataclasses.replace(stage, checkpoint=best), tmp_path)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == [4, 8]
    train(dataclasses.replace(stage, validation=dataclasses.replace(held_out, batches=3)), tmp_path)


def test_a_stop_ends_it_after_the_batch_in_progress(stage, held_out, tmp_path, monkeypatch):
    """Asked for at the start, after steps 1 and 2, and after two of the batches."""
    answers = iter([False, False, False, False, True])
    monkeypatch.setattr(StopRequest, "reached", lambda self: next(answers))
    with pytest.raises(Preempted, match="after step 2 of 4; checkpoint saved"):
        train(dataclasses.replace(stage, validation=dataclasses.replace(held_out, batches=3)), tmp_path)
    assert next(answers, None) is None
    assert [(line["step"], "validation/loss" in line) for line in lines(tmp_path)] == [(1, False), (2, False)]


@pytest.mark.parametrize(("validation", "checkpoint", "message"), [
    ({"every": 2}, {}, "validation.path must name the file of a llava source"),
    ({"batches": 0}, {}, "validation.batches must be >= 1, got 0"),
    ({}, {"keep_best": 1, "best_metric": "validation/loss"},
     "checkpoint.every must be a multiple of validation.every 0"),
    ({}, {"keep_best": 1, "best_metric": "kl"}, "checkpoint.best_metric must be another one: without distill.teacher "),
    ({"every": 4}, {"every": 6, "keep_best": 1, "best_metric": "validation/loss"},
     "checkpoint.every must be a multiple of validation.every 4"),
])
def test_errors_name_the_key(stage, held_out, validation, checkpoint, message):
    values = config_to_dict(stage)
    files = {"path": "a.json", "image_root": "images"} if checkpoint else {}
    values["validation"].update(files | validation)
    values["checkpoint"].update(checkpoint)
    with pytest.raises(ConfigError) as error:
        stage_config(values)
    assert str(error.value).startswith(message)


@pytest.mark.slow
def test_processes_and_meshes_agree(quickstart_stage, tmp_path):
    stage = dataclasses.replace(
        quickstart_stage, batch_size=8, steps=2, checkpoint=CheckpointConfig(every=2),
        validation=ValidationConfig(every=1, batches=2, source="easy_vqa", split="test"),
    )
    runs.run(stage, tmp_path / "one")
    one = [line["validation/loss"] for line in lines(tmp_path / "one")]
    for name, processes, devices, mesh in (
        ("two", 2, 1, MeshConfig()), ("eight", 1, 8, MeshConfig(data=2, fsdp=2, tensor=2)),
        ("four", 4, 2, MeshConfig(data=1, fsdp=8)),
    ):
        runs.run(dataclasses.replace(stage, mesh=mesh), tmp_path / name, processes, devices)
        np.testing.assert_allclose([line["validation/loss"] for line in lines(tmp_path / name)], one, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_ends_it_in_all_processes(processes, quickstart_stage, tmp_path):
    """After step 3, whose validation would take minutes; the last one, after step 4, is of the run that resumes."""
    endless = ValidationConfig(every=3, batches=10**5, source="easy_vqa", split="test")
    stage = dataclasses.replace(quickstart_stage, batch_size=8, steps=4, checkpoint=CheckpointConfig(every=2),
                                mesh=MeshConfig(data=-1), validation=endless)
    children = runs.start(stage, tmp_path / "run", processes)
    runs.wait_until(lambda: (tmp_path / "run" / "checkpoints" / "2").exists(), children[0])
    time.sleep(5)
    runs.kill(children[-1], signal.SIGTERM)
    assert runs.finish(children, limit=60) == [0] * processes, runs.logs(tmp_path / "run")
    assert "stopped after step 3 of 4; checkpoint saved" in runs.logs(tmp_path / "run")
    short = dataclasses.replace(stage, validation=dataclasses.replace(endless, batches=1))
    runs.run(short, tmp_path / "run", processes)
    validated = [(line["step"], "validation/loss" in line) for line in lines(tmp_path / "run")]
    assert validated == [(1, False), (2, False), (3, False), (4, True)]


def test_frames_of_held_out_videos_are_not_drawn_at_random(stage, held_out):
    data = dataclasses.replace(stage.data, frame_jitter=True, keep_in_memory=False)
    assert not validation_data(data, held_out).frame_jitter
