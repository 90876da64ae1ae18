"""Runs that are killed, in every way there is, go on with the losses of one that was not, bit for bit."""

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import time

import pytest
import runs

from vocojax.evaluation.report import loss_curve
from vocojax.training.config import CheckpointConfig, MeshConfig

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
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())


def assert_goes_on(stage, workdir, whole, **how):
    permanent = [step for step in steps_on_disk(workdir) if step % 8 == 0] if workdir.exists() else []
    runs.run(stage, workdir, **how)
    assert loss_curve(workdir) == whole, runs.logs(workdir)
    assert set(permanent) | {8, 16, 24} <= set(steps_on_disk(workdir))
    assert not list((workdir / "checkpoints").glob("*tmp*"))


@pytest.fixture(scope="module")
def hits():
    """How many kills of each trial fell into the writing of a checkpoint; most of the odd trials' should."""
    counts: dict[int, int] = {}
    yield counts
    aimed = [count for trial, count in counts.items() if trial % 2]
    assert 3 * sum(map(bool, aimed)) >= len(aimed), counts


@pytest.mark.parametrize("trial", range(20))
def test_sigkill_at_random(trial, easy_vqa, whole, tmp_path, hits):
    """Two kills per run: of odd trials the first one while a checkpoint is being written."""
    chance = random.Random(trial)
    workdir = tmp_path / "run"
    writing = workdir / "checkpoints"
    hits[trial] = 0
    for attempt in range(2):
        (child,) = runs.start(easy_vqa, workdir)
        if trial % 2 and attempt == 0:
            number = chance.randrange(1, 8)
            seen: set[str] = set()

            def in_writing(seen=seen, number=number):
                seen.update(p.name for p in writing.glob("*tmp*"))
                return len(seen) >= number

            runs.wait_until(in_writing, child)
            time.sleep(chance.uniform(0, 0.03))
        else:
            runs.wait_until(lambda: (workdir / "metrics.jsonl").exists(), child)
            time.sleep(chance.uniform(0, 2.5))
        runs.kill(child)
        assert runs.finish([child]) in ([-signal.SIGKILL], [0])
        hits[trial] += bool(list(writing.glob("*tmp*"))) if writing.exists() else 0
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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_one_of_two_processes(number, easy_vqa, whole, tmp_path):
    """SIGKILL: the other notices and ends by itself. SIGTERM: both save at the same step. Both go on."""
    stage = dataclasses.replace(easy_vqa, mesh=MeshConfig(data=-1))
    workdir = tmp_path / "run"
    children = runs.start(stage, workdir, processes=2)
    runs.wait_until(lambda: (workdir / "metrics.jsonl").exists(), children[0])
    runs.kill(children[1], number)
    codes = runs.finish(children, limit=120)
    if number == signal.SIGTERM:
        assert codes == [0, 0], runs.logs(workdir)
        assert "saved; the same command goes on" in runs.logs(workdir)
    else:
        # It ended on its own, not by the limit, and not as if all were well.
        assert codes[1] == -signal.SIGKILL and codes[0] not in (0, -signal.SIGKILL), runs.logs(workdir)
    runs.run(stage, workdir, processes=2)
    together = tmp_path / "together"
    runs.run(stage, together, processes=2)
    assert loss_curve(workdir) == loss_curve(together), runs.logs(workdir)
    for (_, mine), (_, theirs) in zip(loss_curve(workdir), whole, strict=True):
        assert abs(mine - theirs) <= 1e-5 * theirs


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MiB; mounting needs root."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path)], capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("mounting a tmpfs is not permitted")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_full_disk(easy_vqa, whole, tmp_path, small_disk):
    """The run ends with a clear message, earlier checkpoints are whole, and with room it goes on."""
    workdir = small_disk  # its log lies beside it
    (child,) = runs.start(easy_vqa, workdir)
    runs.wait_until(lambda: (workdir / "checkpoints" / "8").exists(), child)
    # Someone else's file takes what is left.
    with (small_disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
    assert runs.finish([child]) == [1]
    log = runs.logs(workdir)
    assert "THE DISK IS FULL" in log and "are intact" in log, log
    kept = steps_on_disk(workdir)
    assert 8 in kept
    (small_disk / "filler").unlink()
    assert_goes_on(easy_vqa, workdir, whole)
    assert json.loads((workdir / "goodput.json").read_text())["starts"] == 2
