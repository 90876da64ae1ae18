"""Which checkpoints are written and kept, and what becomes of damaged ones."""

import dataclasses
import json
import logging
import os
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vocojax.config import LoraConfig
from vocojax.data.loader import BatchStream
from vocojax.evaluation.report import loss_curve
from vocojax.files import LiteralPath
from vocojax.models.parameters import parameters_of
from vocojax.parallel.preemption import Preempted
from vocojax.runs.checksums import checksums, host_checksum
from vocojax.runs.parameters import SavedParameters, load_model
from vocojax.runs.weights import RunWeights
from vocojax.training.checkpoints import CheckpointError, Checkpoints
from vocojax.training.config import CheckpointConfig, OptimizerConfig
from vocojax.training.stage import train
from vocojax.training.step import TrainState

# Any dataclass will do for a run's config.
RUN, OTHER = OptimizerConfig(), OptimizerConfig(learning_rate=1.0)


def tiny_state(step, frozen=True):
    return TrainState(
        jnp.int32(step), {"a": jnp.full((3,), step, jnp.float32)},
        {"b": jnp.arange(4, dtype=jnp.bfloat16)} if frozen else {}, {"mu": jnp.full((3,), -step, jnp.float32)}, {})


def on_disk(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


def write(workdir, steps, config, metric=lambda step: {"loss": 1.0}):
    with Checkpoints(workdir, config, RUN) as checkpoints:
        for step in steps:
            checkpoints.save(step, tiny_state(step), {"data": step}, metric(step))


def damage(directory):
    """Changes one byte in the largest file of a directory."""
    file = max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(("best_is", "kept"), [("lowest", [5, 6]), ("highest", [4, 6])])
def test_a_run_that_is_resumed_may_be_kept_by_another_metric(best_is, kept, tmp_path):
    """Checkpoints that were saved with the earlier one alone are worse than any that has the new one."""
    by_accuracy = CheckpointConfig(keep=1, keep_best=1, best_metric="accuracy", best_is=best_is)
    accuracies = {4: 6.0, 5: 1.0, 6: 3.0}
    write(tmp_path, (1, 2, 3), CheckpointConfig(keep=2, keep_best=1), lambda step: {"loss": float(step)})
    with Checkpoints(tmp_path, by_accuracy, RUN) as checkpoints:
        checkpoints.restore(tiny_state(0))
        for step, accuracy in accuracies.items():
            checkpoints.save(step, tiny_state(step), {"data": step}, {"accuracy": accuracy})
    assert on_disk(tmp_path) == kept


@pytest.mark.parametrize("name", ["[v2] voco", "a*b? {0}", "~x", "100% über 模", "a:/b"])
def test_a_path_is_never_taken_for_a_pattern(name, tmp_path):
    workdir = tmp_path / name / "run"
    write(workdir, (1, 2), CheckpointConfig(keep=2))
    damage(workdir / "checkpoints" / "2" / "progress")
    with Checkpoints(workdir, CheckpointConfig(), RUN) as checkpoints:
        step, state, _ = checkpoints.restore(tiny_state(0))
    assert step == 1 and state.trained["a"].tolist() == [1, 1, 1] and state.frozen["b"].tolist() == [0, 1, 2, 3]
    assert SavedParameters(workdir).leaves.keys() == {"a", "b"}


@pytest.mark.parametrize(("name", "message"), [
    ("back\\slash", r"has a backslash in its path, which TensorStore reads as '/': rename the directory"),
    (os.fsdecode(b"\xff"), "has a path that is not UTF-8"),
])
def test_a_path_that_tensorstore_cannot_open_is_refused_before_anything_is_written(name, message, stage, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        train(stage, tmp_path / name)
    with pytest.raises(CheckpointError, match=message):
        RunWeights(tmp_path / name, LoraConfig())
    with pytest.raises(CheckpointError, match=r"'odd://run' has an unknown scheme before '://'"):
        train(stage, "odd://run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["parameters", "optimizer", "frozen"])
def test_the_first_checkpoint_is_read_back(part, tmp_path, monkeypatch):
    """Here Orbax does not merge the files of one part, as it happened in directories with brackets in their names."""
    glob = LiteralPath.glob
    monkeypatch.setattr(LiteralPath, "glob", lambda path, pattern: () if part in str(path) else glob(path, pattern))
    with Checkpoints(tmp_path, CheckpointConfig(), RUN) as checkpoints, pytest.raises(
        CheckpointError, match=rf"^{tmp_path}/checkpoints/1: was written, but can't be read back: .*Use a --workdir on"
    ):
        checkpoints.save(1, tiny_state(1), {})


def test_newest_permanent_and_best_ones_stay(tmp_path):
    losses = {2: 5.0, 4: 1.0, 6: 3.0, 8: 2.0, 10: 4.0, 12: 6.0, 14: 7.0}
    config = CheckpointConfig(every=2, keep=2, keep_every=10, keep_best=1)
    write(tmp_path, losses, config, lambda step: {"loss": losses[step]})
    assert on_disk(tmp_path) == [4, 10, 12, 14]


def test_what_does_not_train_is_written_once(tmp_path):
    write(tmp_path, (1,), CheckpointConfig())
    (frozen,) = tmp_path.glob("frozen/_METADATA")
    before = frozen.stat().st_mtime_ns
    with Checkpoints(tmp_path, CheckpointConfig(), RUN) as checkpoints:
        step, state, progress = checkpoints.restore(tiny_state(0))
        checkpoints.save(2, state, {"data": 2})
    assert frozen.stat().st_mtime_ns == before and (step, progress["data"]) == (1, 1)
    assert state.frozen["b"].tolist() == [0, 1, 2, 3] and state.trained["a"].tolist() == [1, 1, 1]
    assert {name for name, home in SavedParameters(tmp_path).homes.items() if home.name == "parameters"} == {"a"}


@pytest.mark.parametrize("item", ["parameters", "optimizer", "progress"])
def test_a_damaged_checkpoint_is_passed_over_and_put_aside(item, tmp_path, caplog):
    write(tmp_path, (1, 2, 3), CheckpointConfig(keep=3))
    for step in (2, 3):
        damage(tmp_path / "checkpoints" / str(step) / item)
    caplog.set_level(logging.ERROR, "vocojax")
    with Checkpoints(tmp_path, CheckpointConfig(), RUN) as checkpoints:
        step, state, _ = checkpoints.restore(tiny_state(0))
        assert step == 1 and state.trained["a"].tolist() == [1, 1, 1]
        checkpoints.save(2, tiny_state(2), {})
    assert sum("THE CHECKPOINT OF STEP" in record.getMessage() for record in caplog.records) == 2
    assert on_disk(tmp_path) == [1, 2]
    assert {path.name.split("-")[0] for path in (tmp_path / "damaged").iterdir()} == {"2", "3"}


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"loss": {}}'])
@pytest.mark.parametrize("file", ["metrics/metrics", "progress/metadata", "parameters/_METADATA", "optimizer/_METADATA",
                                  "_CHECKPOINT_METADATA", "parameters/array_metadatas/process_0"])
def test_whatever_damaged_metadata_raise_a_run_resumes(file, content, tmp_path):
    config = CheckpointConfig(keep=2, keep_best=1)
    write(tmp_path, (1, 2), config)
    (tmp_path / "checkpoints" / "2" / file).write_bytes(content)
    with Checkpoints(tmp_path, config, RUN) as checkpoints:
        step, state, _ = checkpoints.restore(tiny_state(0))
        assert state.trained["a"].tolist() == [step] * 3 and state.optimizer["mu"].tolist() == [-step] * 3
        assert step == 1 or file not in ("metrics/metrics", "progress/metadata", "parameters/_METADATA")
        assert (step == 1) == (tmp_path / "damaged").exists()


@pytest.mark.parametrize("file", ["_CHECKPOINT_METADATA", "metrics/metrics"])
def test_the_only_checkpoint_is_never_put_aside(file, tmp_path):
    """A run without it would begin again at step 0."""
    write(tmp_path, (1,), CheckpointConfig(keep_best=1))
    (tmp_path / "checkpoints" / "1" / file).write_bytes(b"{")
    with pytest.raises(CheckpointError, match=r"no checkpoint can be restored \(step 1: .*\)\. All are left"):
        Checkpoints(tmp_path, CheckpointConfig(keep_best=1), RUN)
    assert on_disk(tmp_path) == [1] and not (tmp_path / "damaged").exists()


def test_a_read_that_fails_once_puts_nothing_aside(tmp_path, monkeypatch):
    write(tmp_path, (1, 2), CheckpointConfig(keep=2))

    def failing(path):
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(LiteralPath, "read_bytes", failing)
        with pytest.raises(CheckpointError, match=r"can't be read: .*Run the same command again"):
            Checkpoints(tmp_path, CheckpointConfig(keep=2), RUN)
    with Checkpoints(tmp_path, CheckpointConfig(keep=2), RUN) as checkpoints:
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=r"2 can't be read: .*EIO"):
            patch.setattr("vocojax.training.checkpoints.read_progress", lambda path: failing("EIO"))
            checkpoints.restore(tiny_state(0))
        assert checkpoints.restore(tiny_state(0))[0] == 2


@pytest.mark.parametrize("lost", [False, True])
def test_what_all_checkpoints_share_is_named_once_if_it_is_damaged(lost, tmp_path, caplog):
    """And then is all that is asked for: once they are there again the run resumes from its newest step."""
    write(tmp_path / "run", (1, 2), CheckpointConfig(keep=2))
    write(tmp_path / "same", (1,), CheckpointConfig())
    frozen = tmp_path / "run" / "frozen"
    if lost:
        shutil.rmtree(frozen)
    else:
        damage(frozen)
    caplog.set_level(logging.ERROR, "vocojax")
    with Checkpoints(tmp_path / "run", CheckpointConfig(), RUN) as checkpoints:
        with pytest.raises(CheckpointError) as caught:
            checkpoints.restore(tiny_state(0))
        assert re.fullmatch(re.escape(str(frozen)) + r" IS DAMAGED: .*\. All checkpoints of the run need it, so an "
                            r"earlier one does not help\. Copy it from a backup, or from another run with the same "
                            r"config and init_from, which has the same", str(caught.value))
        assert not caplog.records and on_disk(tmp_path / "run") == [1, 2]
        shutil.copytree(tmp_path / "same" / "frozen", frozen, dirs_exist_ok=True)
        assert checkpoints.restore(tiny_state(0))[0] == 2
    assert not (tmp_path / "run" / "damaged").exists()


def test_nothing_is_moved_if_nothing_can_be_restored(tmp_path):
    write(tmp_path, (1, 2), CheckpointConfig())
    other = tiny_state(0)._replace(trained={"a": jnp.zeros(5)})
    with Checkpoints(tmp_path, CheckpointConfig(), RUN) as checkpoints, pytest.raises(
        CheckpointError, match=r"no checkpoint can be restored \(step 2: .*; step 1: .*\). All are left as they are"
    ):
        checkpoints.restore(other)
    assert on_disk(tmp_path) == [1, 2] and not (tmp_path / "damaged").exists()


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    write(tmp_path, (1,), CheckpointConfig())
    with Checkpoints(tmp_path, CheckpointConfig(), OTHER) as checkpoints, pytest.raises(
        CheckpointError, match=r"was written with another config \(differing: learning_rate\)"
    ):
        checkpoints.restore(tiny_state(0))


def test_a_half_written_one_is_never_picked(tmp_path):
    write(tmp_path, (1,), CheckpointConfig())
    partial = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    partial.mkdir()
    (partial / "progress").mkdir()
    with Checkpoints(tmp_path, CheckpointConfig(), RUN) as checkpoints:
        assert checkpoints.latest == 1
        assert checkpoints.restore(tiny_state(0))[0] == 1
        checkpoints.save(2, tiny_state(2), {})
    assert on_disk(tmp_path) == [1, 2] and not partial.exists()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 11), st.integers(0, 31), st.sampled_from(["float32", "bfloat16", "int32"]))
def test_any_changed_bit_changes_the_checksum(index, bit, dtype):
    width = jnp.dtype(dtype).itemsize
    array = np.arange(12, dtype=np.float32).reshape(3, 4).astype(jnp.dtype(dtype))
    bits = array.copy().view(f"uint{8 * width}")
    bits.reshape(-1)[index] ^= np.array(1 << bit % (8 * width), bits.dtype)
    one, other = checksums({"x": jnp.asarray(array)}), checksums({"x": jnp.asarray(bits.view(array.dtype))})
    assert one.keys() == {"x"} and one != other


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=0, max_size=3), st.sampled_from(["float32", "bfloat16", "int8"]))
def test_a_checksum_is_the_same_without_a_device(shape, dtype):
    array = np.random.default_rng(0).integers(-100, 100, shape).astype(jnp.dtype(dtype))
    assert host_checksum(array) == checksums(array)[""]


def test_a_checksum_in_parts_is_that_of_the_whole():
    array = np.arange(700_000, dtype=np.float32)
    assert host_checksum(array) == checksums(array)[""]


def test_checksums_know_where_an_element_is():
    array = jnp.arange(6.0).reshape(2, 3)
    sums = {checksums(x)[""] for x in (array, array[::-1], array.T, array.reshape(3, 2)[:, ::-1])}
    assert len(sums) == 4 and checksums({}) == {}


def test_sigterm_saves_and_the_run_goes_on(stage, tmp_path, monkeypatch):
    config = dataclasses.replace(stage, checkpoint=CheckpointConfig(every=100))
    train(config, tmp_path / "whole")
    take, taken = BatchStream.__next__, []

    def terminated(self):
        taken.append(1)
        if len(taken) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self)

    with monkeypatch.context() as patch, pytest.raises(Preempted, match="checkpoint saved"):
        patch.setattr(BatchStream, "__next__", terminated)
        train(config, tmp_path / "stopped")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    (stopped_at,) = on_disk(tmp_path / "stopped")
    assert stopped_at < 4 and loss_curve(tmp_path / "stopped")[-1][0] == stopped_at
    train(config, tmp_path / "stopped")
    assert loss_curve(tmp_path / "stopped") == loss_curve(tmp_path / "whole")
    goodput = json.loads((tmp_path / "stopped" / "goodput.json").read_text())
    assert goodput["starts"] == 2 and goodput["step"] == 4
    assert 0 < goodput["useful_seconds"] < goodput["wall_seconds"]
    for name, value in parameters_of(load_model(tmp_path / "whole")).items():
        assert (value == parameters_of(load_model(tmp_path / "stopped"))[name]).all()


def loaded(run):
    """Reads a run's parameters as training and inference do."""
    return parameters_of(load_model(run))


def converted(run):
    """Reads a run's parameters as a conversion does."""
    weights = RunWeights(run, LoraConfig())
    return {name: weights.read(name) for name in weights.shapes}


def test_weights_of_a_run_are_compared_with_their_checksums(stage, tmp_path):
    """Wherever a byte is flipped, loading the run gives what was saved, or an error."""
    run = tmp_path / "run"
    train(dataclasses.replace(stage, steps=1), run)
    whole = loaded(run)
    step = run / "checkpoints" / "1"
    parts = (step / "parameters", step / "progress", run / "frozen")
    sizes = {path: path.stat().st_size for part in parts for path in part.rglob("*") if path.is_file()}
    files = sorted((path for path in sizes if sizes[path]), key=lambda path: -sizes[path])
    assert len(files) > 8
    reported = set()
    for number, file in enumerate(files[:8]):
        content = file.read_bytes()
        changed = bytearray(content)
        changed[len(changed) * (number + 1) // 10] ^= 4
        file.write_bytes(changed)
        for read in (loaded, converted):
            try:
                for name, value in read(run).items():
                    assert (value == whole[name]).all(), (file, name)
            except CheckpointError as problem:
                reported.add(number)
                assert "DAMAGED" in str(problem), problem
                part = "All checkpoints of the run need it" if "frozen" in file.parts else "If a training run wrote it"
                assert part in str(problem), problem
        file.write_bytes(content)
    assert {0, 1} <= reported
    (run / "frozen").rename(tmp_path / "gone")
    for read in (loaded, converted):
        with pytest.raises(CheckpointError, match=r"frozen IS DAMAGED: .* missing\. All checkpoints of the run need"):
            read(run)
    (tmp_path / "gone").rename(run / "frozen")
    damage(step / "parameters")
    second = dataclasses.replace(stage, steps=1, init_from=str(run))
    with pytest.raises(CheckpointError, match=r"parameters IS DAMAGED: .*\. If a training run wrote it, run its "):
        train(second, tmp_path / "second")
    assert on_disk(tmp_path / "run") == [1]


def test_a_damaged_newest_one_costs_its_steps_only(stage, tmp_path):
    train(stage, tmp_path)
    before = loss_curve(tmp_path)
    damage(tmp_path / "checkpoints" / "4" / "optimizer")
    train(stage, tmp_path)
    assert loss_curve(tmp_path) == before and on_disk(tmp_path) == [2, 4]
    assert len(list((tmp_path / "damaged").iterdir())) == 1
    assert jax.tree.all(jax.tree.map(lambda p: bool(jnp.isfinite(p).all()), parameters_of(load_model(tmp_path))))
