"""Stages: resume, init from an earlier stage, teachers, and the errors a user meets."""

import dataclasses
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils.epath.backend import fsspec_backend
from fsspec.registry import _registry

from tests.helpers.metrics import lines
from vocojax.config import ConfigError, config_to_dict
from vocojax.data.loader import BatchStream
from vocojax.errors import ConvertError
from vocojax.evaluation.report import loss_curve
from vocojax.models.parameters import parameters_of
from vocojax.runs import checkpoint_files, directory
from vocojax.runs.parameters import load_model, load_parameters
from vocojax.training import checkpoints
from vocojax.training.checkpoints import CheckpointError
from vocojax.training.config import CheckpointConfig, DistillConfig, stage_config
from vocojax.training.loop import NonFiniteLoss
from vocojax.training.stage import train


class Killed(BaseException):
    pass


def killed_at(last):
    save = checkpoints.Checkpoints.save

    def kill(self, step, *rest):
        if step == last:
            raise Killed
        save(self, step, *rest)

    return kill


def test_a_killed_run_goes_on_as_if_nothing_had_happened(stage, tmp_path, monkeypatch):
    train(stage, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "save", killed_at(4))
        with pytest.raises(Killed):
            train(stage, tmp_path / "killed")
    assert loss_curve(tmp_path / "killed")[-1][0] == 4
    train(stage, tmp_path / "killed")
    assert loss_curve(tmp_path / "killed") == loss_curve(tmp_path / "whole")
    whole, resumed = (parameters_of(load_model(tmp_path / name)) for name in ("whole", "killed"))
    for name in whole:
        assert (whole[name] == resumed[name]).all(), name


def test_a_finished_run_is_left_alone(stage, tmp_path, monkeypatch):
    train(stage, tmp_path)
    before = loss_curve(tmp_path)
    monkeypatch.setattr(BatchStream, "__next__", lambda self: pytest.fail("a finished run took another batch"))
    train(stage, tmp_path)
    assert loss_curve(tmp_path) == before and len(before) == stage.steps


def test_a_run_that_never_trained_does_not_hold_its_config(stage, tmp_path):
    """A mistake found at the start is corrected in the same directory."""
    with pytest.raises(ConfigError, match="init_new has the regex 'nothing/"):
        train(dataclasses.replace(stage, init_new=("nothing/.*",)), tmp_path)
    train(stage, tmp_path)


def test_a_bucket_needs_the_package_that_opens_it(stage, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it is not installed
    for name in ("gs", "gcs"):  # where another test has opened a bucket
        monkeypatch.delitem(_registry, name, raising=False)
    type(fsspec_backend)._get_filesystem.cache_clear()
    with pytest.raises(CheckpointError, match=r"'gs://bucket/run' can't be reached: .*pip install -e '\.\[gcs\]'"):
        train(stage, "gs://bucket/run")


def test_a_bucket_that_is_not_reached_is_one_line(stage, monkeypatch):
    def unreachable(path):
        raise OSError("Cannot connect to host storage.googleapis.com:443")

    monkeypatch.setattr(type(directory.epath.Path("gs://bucket/run")), "exists", unreachable)
    with pytest.raises(CheckpointError, match=r"workdir 'gs://bucket/run' can't be reached: Cannot connect to host"):
        directory.run_path("gs://bucket/run")


def test_run_files_say_what_ran(stage, tmp_path):
    train(stage, tmp_path)
    assert stage_config(json.loads((tmp_path / "config.json").read_text())) == stage
    assert json.loads((tmp_path / "versions.json").read_text())["jax"] == jax.__version__
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir()) if path.name.isdigit()] == ["2", "4"]


def test_a_run_with_another_config_is_refused(stage, tmp_path):
    train(stage, tmp_path)
    with pytest.raises(CheckpointError, match=r"holds a run with another config \(differing: seed, steps\)"):
        train(dataclasses.replace(stage, steps=6, seed=1), tmp_path)
    train(dataclasses.replace(stage, log_every=1, checkpoint=CheckpointConfig(every=1)), tmp_path)


def test_a_run_older_than_a_key_of_the_config_goes_on(stage, tmp_path):
    """A key that its files lack counts as the default; other differences are still refused by name."""
    train(dataclasses.replace(stage, steps=4), tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoints.Checkpoints, "save", killed_at(4))
        train(stage, tmp_path / "run")
    newer = (("visibility",), ("data", "frames"), ("optimizer", "eps"), ("model", "decoder", "rope_theta"))
    progress = tmp_path / "run" / "checkpoints" / "2" / "progress" / "metadata"
    about = json.loads(progress.read_text())
    forget(about["config"], newer)
    del about["data"]["frames"], about["sha256"]
    progress.write_text(json.dumps({**about, "sha256": checkpoint_files.sha256(about)}))
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps(forget(json.loads(path.read_text()), newer)))
    for changed, key in (({"visibility": "causal"}, "visibility"), ({"seed": 3}, "seed")):
        with pytest.raises(CheckpointError, match=rf"another config \(differing: {key}\)"):
            train(dataclasses.replace(stage, **changed), tmp_path / "run")
    train(stage, tmp_path / "run")
    assert loss_curve(tmp_path / "run") == loss_curve(tmp_path / "whole")
    path.write_text(json.dumps({**json.loads(path.read_text()), "given_up": 1}))
    with pytest.raises(CheckpointError, match=r"another config \(differing: given_up\)"):
        train(stage, tmp_path / "run")


def forget(values, keys):
    for *parts, last in keys:
        inner = values
        for part in parts:
            inner = inner[part]
        del inner[last]
    return values


def test_a_stage_starts_from_an_earlier_one(stage, tmp_path):
    train(stage, tmp_path / "first")
    frozen = dataclasses.replace(
        stage, steps=1, init_from=str(tmp_path / "first"), init_new=("projector/.*",), seed=3,
        learning_rates=(("projector/.*", 1.0), (".*", "freeze")),
    )
    train(frozen, tmp_path / "second")
    first, second = (parameters_of(load_model(tmp_path / name)) for name in ("first", "second"))
    for name in first:
        assert (first[name] == second[name]).all() == (not name.startswith("projector/")), name


def test_init_from_another_model_names_every_parameter(stage, tmp_path):
    train(stage, tmp_path / "first")
    wider = dataclasses.replace(stage.model, decoder=dataclasses.replace(stage.model.decoder, mlp_width=64))
    with pytest.raises(CheckpointError, match=r"does not fit the model: decoder/blocks/down/kernel has shape"):
        train(dataclasses.replace(stage, model=wider, init_from=str(tmp_path / "first")), tmp_path / "second")
    with pytest.raises(ConvertError, match="nothing: no such directory"):
        train(dataclasses.replace(stage, init_from=str(tmp_path / "nothing")), tmp_path / "third")


def test_a_teacher_pulls_the_student_towards_it(stage, tmp_path):
    train(dataclasses.replace(stage, visibility="causal", steps=8), tmp_path / "teacher")
    student = dataclasses.replace(stage, distill=DistillConfig(str(tmp_path / "teacher"), 5.0, 2.0), steps=8, seed=5)
    train(student, tmp_path / "student")
    found = lines(tmp_path / "student")
    assert found[-1]["kl"] < 0.5 * found[0]["kl"]
    for line in found:
        np.testing.assert_allclose(line["loss"], line["cross_entropy"] + 5.0 * line["kl"], rtol=1e-5)


def test_a_teacher_of_another_model_is_refused(stage, tmp_path):
    train(stage, tmp_path / "teacher")
    more = dataclasses.replace(stage.model, voco=dataclasses.replace(stage.model.voco, num_vocos=1))
    with pytest.raises(ConfigError, match=r"distill\.teacher must be of the same model, but .*voco\.num_vocos"):
        train(dataclasses.replace(stage, model=more, distill=DistillConfig(str(tmp_path / "teacher"))), tmp_path / "s")


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_checkpoint(stage, tmp_path, monkeypatch):
    from vocojax.training import program as module

    make_step = module.make_step

    def poisoned(*args):
        step = make_step(*args)

        def run(state, batch):
            state, metrics = step(state, batch)
            return state, {**metrics, "loss": jnp.where(state.step == 3, jnp.nan, metrics["loss"])}

        return run

    monkeypatch.setattr(module, "make_step", poisoned)
    with pytest.raises(NonFiniteLoss, match=r"step 3: loss nan.*the last good checkpoint is step 2"):
        train(stage, tmp_path)
    assert all(jnp.isfinite(p).all() for p in parameters_of(load_model(tmp_path)).values())
    assert [(line["step"], math.isfinite(line["loss"])) for line in lines(tmp_path)] == [
        (1, True), (2, True), (3, False)]
    assert "kl" not in lines(tmp_path)[0]


def test_frozen_parameters_are_held_in_their_dtype(stage, tmp_path):
    train(dataclasses.replace(stage, steps=1, frozen_dtype="bfloat16", dtype="bfloat16"), tmp_path)
    wanted = {"vision/patch_embedding": jax.ShapeDtypeStruct((768, 16), jnp.float32)}
    stored = load_parameters(tmp_path, wanted)["vision/patch_embedding"]
    assert (stored == stored.astype(jnp.bfloat16)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"voco": {"num_vocos": 0}}}, "x.py: model.voco.num_vocos must be >= 1, got 0"),
        ({"learning_rate": 1}, "x.py: learning_rate is not a key of StageConfig"),
        ({"accumulate": 3}, "x.py: accumulate must divide batch_size 4, got 3"),
        ({"remat": "some"}, "x.py: remat must be one of"),
        ({"learning_rates": [["(", 1.0]]}, "x.py: learning_rates has the invalid regex '('"),
        ({"learning_rates": [[".*", "freeze"]]}, "x.py: learning_rates must name what trains"),
        ({"learning_rates": [[".*", 0.0]]}, "x.py: learning_rates has for '.*' a multiplier that is not > 0"),
        ({"learning_rates": [[".*", "frozen"]]},
         "x.py: learning_rates[0][1] must be of type float or must be one of 'freeze', got 'frozen'"),
        ({"learning_rates": ["vision/.*", "freeze"]}, "x.py: learning_rates[0] must be a list, got 'vision/.*'"),
        ({"learning_rates": [["vision/.*"]]}, "x.py: learning_rates[0] must be a list of 2, got ['vision/.*']"),
        ({"optimizer": {"learning_rate": 0.0}}, "x.py: optimizer.learning_rate must be > 0, got 0.0"),
    ],
)
def test_config_errors_name_file_and_key(stage, change, message):
    with pytest.raises(ConfigError) as error:
        stage_config({**config_to_dict(stage), **change}, "x.py")
    assert str(error.value).startswith(message)


def test_baselines_need_the_causal_view(stage):
    values = config_to_dict(stage)
    values["model"]["compressor"] = {"kind": "avg_pool"}
    with pytest.raises(ConfigError, match="visibility must be 'causal' for the baseline 'avg_pool'"):
        stage_config(values)
