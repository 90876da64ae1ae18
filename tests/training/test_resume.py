"""Resuming compares content, not spelling. A finished run can get more steps."""

import dataclasses
import logging
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from vocojax.data.config import PartConfig
from vocojax.data.loader import StreamStateError
from vocojax.errors import CheckpointError
from vocojax.evaluation.report import loss_curve
from vocojax.runs.directory import changed_keys, fixed_keys, run_config
from vocojax.training.checkpoints import Checkpoints
from vocojax.training.config import CheckpointConfig
from vocojax.training.stage import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function that copies a finished run of four steps; it is trained once."""
    root = tmp_path_factory.mktemp("trained")

    def copy(stage, target):
        if not (root / "run").exists():
            train(dataclasses.replace(stage, log_every=1), root / "run")
        shutil.copytree(root / "run", target)
        return target

    return copy


def test_data_and_tokenizer_elsewhere_and_what_changes_no_step(stage, trained, llava_data, tmp_path, caplog):
    """The log names what changed; the losses are those of the run as it was."""
    run, whole = trained(stage, tmp_path / "run"), trained(stage, tmp_path / "whole")
    shutil.rmtree(run / "checkpoints" / "4")
    shutil.copytree(llava_data, tmp_path / "moved")
    data = dataclasses.replace(
        stage.data, path=str(tmp_path / "moved" / "records.json"), image_root=str(tmp_path / "moved" / "images"),
        tokenizer=str(tmp_path / "moved" / "tokenizer"))
    changed = dataclasses.replace(stage, data=data, name="other", init_from="/gone", log_every=1, accumulate=2)
    with caplog.at_level(logging.INFO, "vocojax"):
        train(changed, run)
    for key in ("name", "init_from", "accumulate", "data.path", "data.image_root", "data.tokenizer"):
        assert any(f"resumes with a changed config: {key} is now " in message for message in caplog.messages), key
    np.testing.assert_allclose(loss_curve(run), loss_curve(whole), rtol=1e-5)
    assert run_config(run)["name"] == "other"

    records = (tmp_path / "moved" / "records.json")
    records.write_text(records.read_text().replace("red", "blue", 1))
    shutil.rmtree(run / "checkpoints" / "4")
    with pytest.raises(StreamStateError, match="the saved data state is of another stream, with content "):
        train(changed, run)


def test_a_mixture_may_move_but_not_change(stage):
    mixed = lambda *paths, weight=1.0: dataclasses.replace(stage, data=dataclasses.replace(
        stage.data, path="", image_root="", mixture=tuple(
            PartConfig(path=path, image_root=f"{path}/images", weight=weight) for path in paths)))
    saved = fixed_keys(mixed("a", "b"))
    assert saved["data"]["mixture"][0].keys() == {"source", "split", "threads_per_sample", "weight"}
    assert changed_keys(saved, mixed("c", "d")) == []
    assert changed_keys(saved, mixed("a")) == ["data.mixture"]
    assert changed_keys(saved, mixed("a", "b", weight=2.0)) == ["data.mixture"]


def test_a_finished_run_is_extended_when_asked_to(stage, trained, tmp_path, caplog):
    run, longer = trained(stage, tmp_path / "run"), dataclasses.replace(stage, steps=6, log_every=1)
    with pytest.raises(CheckpointError, match="holds a run of 4 steps, and the config has 6: pass --extend to train"):
        train(longer, run)
    shutil.copytree(run, tmp_path / "unfinished")
    shutil.rmtree(tmp_path / "unfinished" / "checkpoints" / "4")
    with pytest.raises(CheckpointError, match="is at step 2 of 4: run its own command to finish it before"):
        train(longer, tmp_path / "unfinished", extend=True)
    with pytest.raises(CheckpointError, match=r"another config \(differing: steps\)"):
        train(dataclasses.replace(stage, steps=3), run, extend=True)
    with caplog.at_level(logging.INFO, "vocojax"):
        train(longer, run, extend=True)
    # 1e-2 x (1 + cos(pi x 4 / 6)) / 2 at the fifth step, whose count is 4; the last step's count is 5
    assert any("extends the run from 4 to 6 steps. Its learning rate is now that of a run of 6 steps: a cosine, "
               "0.0025 at step 5, 0.00067 at step 6" in message for message in caplog.messages)
    assert [step for step, _ in loss_curve(run)] == [1, 2, 3, 4, 5, 6]
    assert run_config(run)["steps"] == 6
    train(longer, run)  # finished: the plain command has nothing to do


def test_a_teacher_is_known_by_its_parameters(tmp_path):
    teacher, other = {"decoder/norm/scale": jnp.ones(3)}, {"decoder/norm/scale": jnp.zeros(3)}
    with Checkpoints(tmp_path / "a", CheckpointConfig()) as checkpoints:
        digest = checkpoints._digest_of(teacher)
        checkpoints.require_teacher(teacher, {"teacher": digest}, "moved")
    for index, (found, progress, name) in enumerate([
        (other, {"teacher": digest}, "runs/teacher"), ({}, {"teacher": digest}, ""), (teacher, {"teacher": ""}, "new"),
        (teacher, {"config": {"distill": {"teacher": "old"}}}, "new"),
    ]):
        with Checkpoints(tmp_path / str(index), CheckpointConfig()) as checkpoints, pytest.raises(
                CheckpointError, match=f"distill.teacher '{name}' is not the teacher that this run has"):
            checkpoints.require_teacher(found, progress, name)
