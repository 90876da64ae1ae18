"""Names of checkpoints, RUN@STEP and RUN@best, wherever a run is read; and the list of a run's checkpoints."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from absl import flags

from vocojax.cli import checkpoints as command
from vocojax.errors import CheckpointError
from vocojax.models.parameters import parameters_of
from vocojax.pretrained.conversion import convert
from vocojax.pretrained.loading import load_card, load_model
from vocojax.runs.directory import run_config, run_path
from vocojax.runs.listing import list_checkpoints
from vocojax.runs.parameters import SavedParameters
from vocojax.runs.selection import split_name
from vocojax.training.checkpoints import Checkpoints
from vocojax.training.config import CheckpointConfig
from vocojax.training.stage import train

NAME = "projector/linear_in/kernel"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function that returns a run with checkpoints of steps 1 to 4; the best one, by its highest loss, is step 2, as
    the losses that they were saved with are replaced. It is trained once and only read."""
    root = tmp_path_factory.mktemp("selection")

    def trained(stage):
        if not (root / "run").exists():
            kept = CheckpointConfig(every=1, keep=4, keep_best=1, best_is="highest")
            train(dataclasses.replace(stage, log_every=1, checkpoint=kept), root / "run")
            for step, loss in ((1, 1.0), (2, 9.0), (3, 3.0), (4, 2.0)):
                metrics = root / "run" / "checkpoints" / str(step) / "metrics" / "metrics"
                assert json.loads(metrics.read_text()).keys() == {"loss"}
                metrics.write_text(json.dumps({"loss": loss}))
        return root / "run"

    return trained


def kernel(directory):
    return np.asarray(parameters_of(load_model(directory))[NAME])


def test_a_run_that_was_kept_by_a_metric_s_earlier_name(run, stage, tmp_path):
    """`validation_loss`, as the metric was called, is found, and a resumed run with today's name keeps by it."""
    shutil.copytree(run(stage), old := tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    config["checkpoint"] |= {"best_metric": "validation_loss", "best_is": "lowest"}
    (old / "config.json").write_text(json.dumps(config))
    (old / "SHA256SUMS").unlink()
    for step, loss in ((1, 4.0), (2, 3.0), (3, 1.0), (4, 2.0)):
        (old / "checkpoints" / str(step) / "metrics" / "metrics").write_text(json.dumps({"validation_loss": loss}))
    assert run_config(old)["checkpoint"]["best_metric"] == "validation/loss"
    assert SavedParameters(f"{old}@best").directory.name == "3"
    assert [one.step for one in list_checkpoints(old, check=False) if one.is_best] == [3]
    best = CheckpointConfig(every=1, keep=1, keep_best=1, best_metric="validation/loss")
    with Checkpoints(old, best) as checkpoints:
        assert checkpoints.latest == 4


def test_what_a_name_chooses(run, stage, tmp_path):
    run = run(stage)
    assert split_name(f"{run}@2") == (str(run), "2") and split_name(f"{run}@best") == (str(run), "best")
    for plain in (str(run), f"{run}@last", f"{tmp_path}@2", "hf://org/name@2", "@2", f"{run}@"):
        assert split_name(plain) == (plain, "")
    shutil.copytree(run, tmp_path / "my@2")
    assert split_name(tmp_path / "my@2") == (tmp_path / "my@2", "")
    assert SavedParameters(tmp_path / "my@2@3").directory == run_path(tmp_path) / "my@2" / "checkpoints" / "3"
    for name, step in ((run, 4), (f"{run}@3", 3), (f"{run}@best", 2)):
        assert SavedParameters(name).directory == run_path(run) / "checkpoints" / str(step)
    with pytest.raises(CheckpointError, match=r"has no checkpoint of step 7, but of 1, 2, 3, 4; name one of these"):
        load_model(f"{run}@7")
    with pytest.raises(CheckpointError, match=r"run@2: names a checkpoint of .*run, which is only read"):
        train(stage, f"{run}@2")


def test_loading_converting_and_starting_from_a_chosen_checkpoint(run, stage, tmp_path):
    run = run(stage)
    second, last = kernel(f"{run}@2"), kernel(run)
    assert (second != last).any() and (kernel(f"{run}@best") == second).all()
    assert load_card(f"{run}@2").model == stage.model
    convert(f"{run}@2", tmp_path / "orbax", "orbax", verify=True, report=lambda _: None)
    assert (kernel(tmp_path / "orbax") == second).all()
    frozen = ((NAME, "freeze"), ("decoder/.*", "freeze"), ("vision/.*", "freeze"), ("projector/.*", 1.0))
    train(dataclasses.replace(stage, init_from=f"{run}@best", steps=1, learning_rates=frozen), tmp_path / "next")
    assert (kernel(tmp_path / "next") == second).all()


def test_a_run_without_its_best_says_how_to_keep_it(run, stage, tmp_path):
    shutil.copytree(run(stage), tmp_path / "run")
    for metrics in tmp_path.glob("run/checkpoints/*/metrics"):
        shutil.rmtree(metrics)
    with pytest.raises(CheckpointError, match=r"none is known as the best; train with --config\.checkpoint\.keep_best"):
        load_model(f"{tmp_path / 'run'}@best")


def test_the_list(run, stage, tmp_path, capsys):
    """With one checkpoint that was cut off and one whose values were changed."""
    shutil.copytree(run(stage), tmp_path / "run")

    def listed(*arguments):
        values = flags.FlagValues()
        flags.DEFINE_bool("check", True, "", flag_values=values)
        flags.DEFINE_string("json", None, "", flag_values=values)
        rest = values(["checkpoints", *map(str, arguments)])[1:]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(command, "FLAGS", values)
            command.main(rest)
        return [line.split(maxsplit=4) for line in capsys.readouterr().out.splitlines()]

    head, *rows = listed(tmp_path / "run", f"--json={tmp_path}/list.json")
    assert head == ["step", "loss", "accuracy", "MiB", "state"]
    assert [(row[0], row[4]) for row in rows] == [
        ("1", "sound"), ("2", "sound, best"), ("3", "sound"), ("4", "sound")]
    found = json.loads((tmp_path / "list.json").read_text())
    assert [one["step"] for one in found] == [1, 2, 3, 4] and found[1]["metrics"]["loss"] == 9.0
    assert all(one["bytes"] > 10_000 and one["problem"] == "" for one in found)

    progress = tmp_path / "run" / "checkpoints" / "3" / "progress" / "metadata"
    progress.write_text(progress.read_text().replace('"useful_seconds": ', '"useful_seconds": 1'))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4" / "optimizer" / "d")
    states = [row[4] for row in listed(tmp_path / "run")[2:]]
    assert states[0] == "sound, best"
    assert states[1].startswith("DAMAGED: CheckpointError: the progress file was changed after it was saved")
    assert states[2].startswith("DAMAGED: optimizer: ")
    assert listed(tmp_path / "run", "--nocheck")[2][4] == "not checked, best"
