"""Runs that are killed, in every way there is, resume with the losses of one that was not, bit for bit."""

import contextlib
import dataclasses
import json
import os
import random
import resource
import signal
import subprocess
import time

import pytest

from tests.helpers import run_processes as runs
from vocojax.evaluation.report import loss_curve
from vocojax.parallel.mesh import MeshConfig
from vocojax.training.config import CheckpointConfig

pytestmark = pytest.mark.slow
STEPS = 24


@pytest.fixture(scope="module")
def easy_vqa(quickstart_stage):
    decoder = dataclasses.replace(quickstart_stage.model.decoder, depth=1)
    return dataclasses.replace(
        quickstart_stage, model=dataclasses.replace(quickstart_stage.model, decoder=decoder), batch_size=8, steps=STEPS,
        log_every=3, checkpoint=CheckpointConfig(every=2, keep=2, keep_every=8, minutes=0.0),
    )


@pytest.fixture(scope="module")
def whole(easy_vqa, tmp_path_factory):
    """The losses of a run that nobody disturbs."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    runs.run(easy_vqa, workdir)
    curve = loss_curve(workdir)
    assert [step for step, _ in curve] == list(range(1, STEPS + 1))
    return curve


def steps_on_disk(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal())


def assert_goes_on(stage, workdir, whole, **how):
    permanent = [step for step in steps_on_disk(workdir) if step % 8 == 0] if workdir.exists() else []
    runs.run(stage, workdir, **how)
    assert loss_curve(workdir) == whole, runs.logs(workdir)
    assert set(permanent) | {8, 16, 24} <= set(steps_on_disk(workdir))
    assert not list((workdir / "checkpoints").glob("*tmp*"))


def stop_while_writing(child, directory, number, delay):
    """Freezes the child within the writing of a checkpoint, of the `number`-th one or the first later one that it can
    be caught in, about `delay` seconds after the beginning; False if it ended before."""
    partial = lambda: {path.name for path in directory.glob("*tmp*")}
    seen: set[str] = set()
    while child.is_alive():
        runs.wait_until(lambda: not partial() <= seen, child)
        seen.update(partial())
        if len(seen) < number:
            continue
        time.sleep(delay)
        runs.kill(child, signal.SIGSTOP)
        time.sleep(0.02)  # until none of its threads runs
        if partial():
            return True
        runs.kill(child, signal.SIGCONT)
        delay /= 2
    return False


@pytest.mark.parametrize("trial", range(20))
def test_sigkill_at_random(trial, easy_vqa, whole, tmp_path):
    """Two kills per run: of odd trials the first one within the writing of a checkpoint."""
    chance = random.Random(trial)
    workdir = tmp_path / "run"
    for attempt in range(2):
        (child,) = runs.start(easy_vqa, workdir)
        if trial % 2 and attempt == 0:
            number, delay = chance.randrange(1, 8), chance.uniform(0, 0.03)
            assert stop_while_writing(child, workdir / "checkpoints", number, delay), runs.logs(workdir)
            runs.kill(child)
            assert runs.finish([child]) == [-signal.SIGKILL]
            assert list((workdir / "checkpoints").glob("*tmp*"))
            continue
        runs.wait_until(lambda: (workdir / "metrics.jsonl").exists(), child)
        time.sleep(chance.uniform(0, 2.5))
        runs.kill(child)
        assert runs.finish([child]) in ([-signal.SIGKILL], [0])
    assert_goes_on(easy_vqa, workdir, whole)


@pytest.mark.parametrize("trial", range(3))
def test_sigterm_saves_and_exits_with_0(trial, easy_vqa, whole, tmp_path):
    stage = dataclasses.replace(easy_vqa, checkpoint=dataclasses.replace(easy_vqa.checkpoint, every=1000))
    workdir = tmp_path / "run"
    (child,) = runs.start(stage, workdir)
    runs.wait_until(lambda: (workdir / "metrics.jsonl").exists(), child)
    time.sleep(0.1 * trial)
    runs.kill(child, signal.SIGTERM)
    assert runs.finish([child]) == [0]
    (last,) = (step for step in steps_on_disk(workdir) if step == max(steps_on_disk(workdir)))
    assert 3 <= last < STEPS and loss_curve(workdir) == whole[:last]
    assert_goes_on(stage, workdir, whole)


@pytest.mark.parametrize(("processes", "resumed"), [(1, False), (1, True), (2, False), (2, True)])
def test_sigterm_at_any_moment(processes, resumed, easy_vqa, whole, tmp_path):
    """From the first one on: all processes end with 0 and say whether there was something to save."""
    stage = dataclasses.replace(easy_vqa, mesh=MeshConfig(data=-1))
    workdir, after, said = tmp_path / "run", 0, []

    if resumed:
        children = runs.start(stage, workdir, processes)
        runs.wait_until(lambda: (workdir / "checkpoints" / "8").exists(), children[0])
        for child in children:
            runs.kill(child)
        runs.finish(children)
        after = max(steps_on_disk(workdir))
        assert after < STEPS

    def stopped(is_time):
        for log in tmp_path.glob("*.log"):
            log.unlink()
        children = runs.start(stage, workdir, processes)
        runs.wait_until(is_time, children[-1])
        runs.kill(children[-1], signal.SIGTERM)
        assert runs.finish(children, limit=120) == [0] * processes, runs.logs(workdir)
        return max(steps_on_disk(workdir), default=0)

    for wait in (0.0, 0.7, 1.4, 2.1):
        started = lambda wait=wait: "starts" in runs.logs(workdir) and time.sleep(wait) is None
        before, after = after, stopped(started)
        said += [(before, after, text) for text in ("nothing new to save", "checkpoint saved")
                 if text in runs.logs(workdir)]
    assert said[0][2] == "nothing new to save"
    for before, after, text in said:
        assert before == after if text == "nothing new to save" else before < after < STEPS, said
    runs.run(stage, workdir, processes)
    for (_, mine), (_, theirs) in zip(loss_curve(workdir), whole, strict=True):
        assert mine == theirs if processes == 1 else abs(mine - theirs) <= 1e-5 * theirs


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_one_of_two_processes(number, easy_vqa, whole, tmp_path):
    """SIGKILL: the other notices and ends by itself. SIGTERM: both save at the same step. Both resume."""
    stage = dataclasses.replace(easy_vqa, mesh=MeshConfig(data=-1))
    workdir = tmp_path / "run"
    children = runs.start(stage, workdir, processes=2)
    runs.wait_until(lambda: (workdir / "metrics.jsonl").exists(), children[0])
    runs.kill(children[1], number)
    codes = runs.finish(children, limit=120)
    if number == signal.SIGTERM:
        assert codes == [0, 0], runs.logs(workdir)
        assert "checkpoint saved. Run the same command to resume" in runs.logs(workdir)
    else:
        # It ended on its own, not by the limit, and not as if all were well.
        assert codes[1] == -signal.SIGKILL and codes[0] not in (0, -signal.SIGKILL), runs.logs(workdir)
    runs.run(stage, workdir, processes=2)
    together = tmp_path / "together"
    runs.run(stage, together, processes=2)
    assert loss_curve(workdir) == loss_curve(together), runs.logs(workdir)
    for (_, mine), (_, theirs) in zip(loss_curve(workdir), whole, strict=True):
        assert abs(mine - theirs) <= 1e-5 * theirs


@contextlib.contextmanager
def full_disk(workdir, child):
    """Someone else's file takes what is left of a small disk."""
    with (workdir / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
    yield
    (workdir / "filler").unlink()


@contextlib.contextmanager
def write_limit(workdir, child):
    """No file of the child's may grow beyond 64 KiB (its log stays below): the kernel refuses the write()."""
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (2**16, 2**16))
    yield


@pytest.fixture(params=[full_disk, write_limit])
def writes_fail(request, tmp_path):
    """(a work directory, what makes writes in it fail); a small disk is a tmpfs of 16 MiB, which needs root."""
    workdir = tmp_path / "disk"
    workdir.mkdir()
    if request.param is not full_disk:
        yield workdir, request.param
        return
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(workdir)], capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("mounting a tmpfs is not permitted")
    yield workdir, request.param
    subprocess.run(["umount", "--lazy", str(workdir)], check=True)


def test_a_full_disk(easy_vqa, whole, writes_fail):
    """The run ends with a clear message, earlier checkpoints are whole, and with room it resumes."""
    workdir, fail = writes_fail  # the run's log is next to it
    (child,) = runs.start(easy_vqa, workdir)
    runs.wait_until(lambda: (workdir / "checkpoints" / "8").exists(), child)
    with fail(workdir, child):
        assert runs.finish([child]) == [1], runs.logs(workdir)
        log = runs.logs(workdir)
        said = "A FILE IS TOO LARGE" if fail is write_limit else "THE DISK IS FULL"
        assert said in log and "are intact" in log, log
        assert 8 in steps_on_disk(workdir)
    assert_goes_on(easy_vqa, workdir, whole)
    assert json.loads((workdir / "goodput.json").read_text())["starts"] == 2
