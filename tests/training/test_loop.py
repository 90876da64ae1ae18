"""The loop and what hangs on it: no implicit transfer, logs, hangs, goodput."""

import json
import os
import signal
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.metrics import lines
from vocojax.parallel.preemption import Preempted
from vocojax.training import goodput, loop, run_log
from vocojax.training.checkpoints import Checkpoints
from vocojax.training.config import CheckpointConfig, RunConfig
from vocojax.training.goodput import Goodput
from vocojax.training.run_log import RunLog
from vocojax.training.step import TrainState
from vocojax.training.watchdog import Watchdog


class Counting:
    """A stream of 1, 2, 3, ..."""

    def __init__(self):
        self.taken = 0

    def __next__(self):
        self.taken += 1
        return {"x": np.float32(self.taken)}

    def get_state(self):
        return {"taken": self.taken}


@jax.jit
def step(state, batch):
    trained = {"w": state.trained["w"] + batch["x"]}
    return state._replace(step=state.step + 1, trained=trained), {"loss": trained["w"], "tokens": jnp.float32(10)}


def fresh():
    return TrainState(jnp.int32(0), {"w": jnp.float32(0)}, {}, {"m": jnp.float32(0)}, {})


def run(workdir, steps=7, place=jax.device_put, first_step=0, task=None, **changes):
    stream = Counting()
    with Checkpoints(workdir, CheckpointConfig(every=3)) as checkpoints:
        shown = loop.LoopConfig("counting", steps, 2, **changes)
        whole = loop.Task(step, stream, place, **(task or {}))
        return stream, loop.run(shown, workdir, whole, fresh(), first_step, checkpoints)


def told_before(number):
    """Returns a `place` that sends SIGTERM after step `number` - 1, when that step no longer asks for stops."""
    def place(batch):
        if batch["x"] == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return jax.device_put(batch)
    return place


def test_the_state_saved_is_that_of_the_data_after_the_step(tmp_path):
    """Although the next batch is already taken; and the last step takes none."""
    stream, state = run(tmp_path)
    assert stream.taken == 7 and float(state.trained["w"]) == 28
    for number in (3, 6, 7):
        path = tmp_path / "checkpoints" / str(number) / "progress" / "metadata"
        assert not path.exists() or json.loads(path.read_text())["data"] == {"taken": number}
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(n, n * (n + 1) / 2) for n in range(1, 8)]


def test_a_batch_that_is_not_on_the_device_is_an_error(tmp_path):
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run(tmp_path, place=lambda batch: batch)


def test_a_stop_leaves_out_a_validation_but_not_the_last(tmp_path):
    task = {"validate": lambda state, goes_on: {"validation/loss": float(state.trained["w"])}}
    run(tmp_path / "last", 4, told_before(4), task=task, validate_every=4)
    assert [line.get("validation/loss") for line in lines(tmp_path / "last")] == [None, None, None, 10]
    with pytest.raises(Preempted, match="after step 4 of 5; checkpoint saved"):
        run(tmp_path / "before", 5, told_before(4), task=task, validate_every=2)
    assert [line.get("validation/loss") for line in lines(tmp_path / "before")] == [None, 3, None, None]


def test_a_stop_ends_the_validation_in_progress(tmp_path):
    asked = []

    def validate(state, goes_on):
        asked.append(goes_on())
        os.kill(os.getpid(), signal.SIGTERM)
        asked.append(goes_on())
        return {}

    with pytest.raises(Preempted, match="after step 4 of 7; checkpoint saved"):
        run(tmp_path, task={"validate": validate}, validate_every=4)
    assert asked == [True, False]
    progress = json.loads((tmp_path / "checkpoints" / "4" / "progress" / "metadata").read_text())
    assert progress["data"] == {"taken": 4}


def test_rates_are_those_of_steps(tmp_path, monkeypatch):
    """Each step has 10 tokens and takes a second; the clock only runs for batches, validations and checkpoints."""
    now, rates, seconds = [0.0], [], []

    def takes(duration, result):
        now[0] += duration
        return result

    monkeypatch.setattr(goodput, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(RunLog, "write", lambda self, rows, values: rates.append(
        (values["tokens_per_second"], values["steps_per_second"])))
    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda *arguments: takes(7.0, save(*arguments)))
    run(tmp_path, 8, lambda batch: takes(1.0, jax.device_put(batch)), validate_every=1, task={
        "validate": lambda state, goes_on: takes(100.0, {}),
        "scalars": lambda sums, duration: seconds.append(duration) or {}})
    assert rates == [(10.0, 1.0)] * 8 and seconds == [1.0] * 8
    assert now == [8 * 101.0 + 3 * 7]


def test_a_trace_of_some_steps(tmp_path):
    run(tmp_path, run=RunConfig(profile=(2, 3)))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_run_that_goes_on_inside_its_trace_traces_the_rest(tmp_path):
    """And one that ends inside it writes what there is."""
    run(tmp_path, first_step=2, run=RunConfig(profile=(2, 30)))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_hang_shows_the_stacks_of_all_threads(tmp_path):
    done = threading.Event()

    def a_thread_that_waits():
        done.wait(20)

    other = threading.Thread(target=a_thread_that_waits)
    other.start()
    with (tmp_path / "stacks").open("w+") as file:
        with Watchdog(0.2, file) as watchdog:
            watchdog.beat()
            threading.Event().wait(0.5)
        done.set()
        other.join()
        file.seek(0)
        stacks = file.read()
    assert "Timeout (0:00:00.2" in stacks and "a_thread_that_waits" in stacks and "test_a_hang_shows" in stacks


def test_goodput_counts_restarts_and_not_what_is_taken_twice(tmp_path):
    now = [1000.0]
    first = Goodput(tmp_path, clock=lambda: now[0])
    first.count(30.0)
    now[0] = 1060.0
    first.write(5)  # killed here; the checkpoint it resumes from holds 20 useful seconds
    now[0] = 1090.0
    second = Goodput(tmp_path, useful=20.0, clock=lambda: now[0])
    second.count(30.0)
    now[0] = 1100.0
    second.write(8)
    assert json.loads((tmp_path / "goodput.json").read_text()) == {
        "began": 1000.0, "starts": 2, "step": 8, "useful_seconds": 50.0, "wall_seconds": 100.0, "goodput": 0.5}


def test_a_resumed_log_forgets_later_steps_and_a_line_cut_off(tmp_path):
    whole = '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    log = RunLog(tmp_path, 2)
    log.write([(3, {"loss": 0.5})], {"goodput": 1.0})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == whole + '{"step": 3, "loss": 0.5, "goodput": 1.0}\n'


def test_a_remote_log_is_copied_whole(tmp_path, monkeypatch):
    """Written here, copied there when flushed; what is there is continued."""
    monkeypatch.setattr(run_log, "is_remote", lambda path: True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    log = RunLog(tmp_path, 1)
    log.write([(2, {"loss": 2.0})], {})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    log.flush()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1
    log.close()


def test_weights_and_biases_goes_on_under_the_same_id(tmp_path, monkeypatch):
    logged, ids = [], []
    fake = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    module = types.SimpleNamespace(init=lambda id, **_: ids.append(id) or fake)
    monkeypatch.setitem(sys.modules, "wandb", module)
    for first in (0, 1):
        log = RunLog(tmp_path, first, "project", "name")
        log.write([(first + 1, {"loss": 2.0})], {"goodput": 1.0})
        log.close()
    assert ids[0] == ids[1] and logged[1] == (2, {"train/loss": 2.0, "train/goodput": 1.0})
