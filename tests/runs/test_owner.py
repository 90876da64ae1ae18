"""One run at a time owns a directory; what a killed owner leaves is no obstacle."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest
from etils import epath

from tests.inference.test_store import Bucket
from tests.training.test_checkpoints import RUN, tiny_state
from vocojax.liveness import this_process
from vocojax.runs import owner
from vocojax.runs.directory import CheckpointError, run_path
from vocojax.runs.owner import RunInUse, owned, taken_over
from vocojax.training.checkpoints import Checkpoints
from vocojax.training.config import CheckpointConfig
from vocojax.training.stage import train

ROOT = Path(__file__).parents[2]
OWNER = """
import sys
from vocojax.runs.owner import owned
with owned(sys.argv[1]):
    print("owns", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def another_run(tmp_path):
    """A process that owns `tmp_path/run` until its standard input is closed."""
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path / "run")], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"})
    assert process.stdout.readline() == "owns\n"
    yield process
    process.kill()
    process.wait()


def claim(directory, seconds_ago=0.0, **changes):
    """Writes a claim of a process on another machine."""
    directory.mkdir(exist_ok=True)
    values = {"host": "far", "machine": "00000000", "pid": 7, "started": 1, "time": time.time() - seconds_ago}
    (directory / "owner.json").write_text(json.dumps(values | changes))


def test_a_second_start_is_refused_by_host_and_pid_and_changes_nothing(another_run, stage, tmp_path):
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(RunInUse, match=rf"^{tmp_path}/run is in use by process {another_run.pid} on "
                                       rf"{socket.gethostname()}, which trains there: wait until it ends, stop it "
                                       rf"\(kill {another_run.pid} on that host\), or use another --workdir$"):
        train(stage, tmp_path / "run")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    another_run.communicate("end\n", timeout=60)
    assert another_run.returncode == 0 and list((tmp_path / "run").iterdir()) == []
    with owned(tmp_path / "run"):
        pass


def test_a_killed_owner_is_followed_at_once(another_run, tmp_path):
    another_run.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    # Dead, but its parent has not asked for its status.
    while Path(f"/proc/{another_run.pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
    began = time.monotonic()
    with owned(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / "owner.json").read_text())["pid"] == os.getpid()
    assert time.monotonic() - began < 5 and list((tmp_path / "run").iterdir()) == []


def test_a_later_process_with_the_same_id_is_not_the_owner(tmp_path):
    values = dataclasses.asdict(this_process())
    claim(tmp_path, **values)
    with pytest.raises(RunInUse), owned(tmp_path):
        pass
    claim(tmp_path, **values | {"started": values["started"] - 1})
    with owned(tmp_path):
        pass


def test_an_owner_on_another_machine_is_waited_for(tmp_path, monkeypatch):
    """It counts as dead when it renews nothing, or was last there long ago; a sign of life refuses the start."""
    monkeypatch.setattr(owner, "STALE", 0.5)
    claim(tmp_path)
    began = time.monotonic()
    with owned(tmp_path):
        assert 0.5 <= time.monotonic() - began < 5
    claim(tmp_path, seconds_ago=601)
    began = time.monotonic()
    with owned(tmp_path):
        assert time.monotonic() - began < 0.5
    monkeypatch.setattr(owner, "STALE", 30)
    claim(tmp_path)
    renewal = threading.Timer(0.3, claim, (tmp_path,))
    renewal.start()
    with pytest.raises(RunInUse, match="is in use by process 7 on far, which trains there"), owned(tmp_path):
        pass
    renewal.join()


def test_a_claim_is_renewed_but_never_anothers(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "BEAT", 0.05)
    seen = lambda: json.loads((tmp_path / "owner.json").read_text())
    with owned(tmp_path):
        first, deadline = seen(), time.monotonic() + 30
        while seen() == first:
            assert time.monotonic() < deadline
        assert taken_over(run_path(tmp_path)) == ""
        with owner._alone(run_path(tmp_path)):
            claim(tmp_path)
        time.sleep(0.2)
        assert seen()["host"] == "far"
        with Checkpoints(tmp_path, CheckpointConfig(), RUN) as checkpoints, pytest.raises(
            CheckpointError, match=rf"^{tmp_path} was taken over by process 7 on far, because .* saves nothing more$"
        ):
            checkpoints.save(1, tiny_state(1), {})
    assert seen()["host"] == "far" and list((tmp_path / "checkpoints").iterdir()) == []


class HttpError(Exception):
    """As object stores raise: no OSError."""


def test_a_renewal_that_fails_is_followed_by_others(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "BEAT", 0.02)
    written, write = [], owner._write

    def sometimes(path):
        written.append(path)
        if len(written) == 2:
            raise HttpError("503")
        write(path)

    monkeypatch.setattr(owner, "_write", sometimes)
    with owned(tmp_path):
        deadline = time.monotonic() + 30
        while len(written) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_an_owner_that_can_not_be_read_stops_no_run(tmp_path, monkeypatch):
    def failing(path):
        raise HttpError("503")

    with owned(tmp_path), Checkpoints(tmp_path, CheckpointConfig(), RUN) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(owner, "_read", failing)
            checkpoints.save(1, tiny_state(1), {})
        assert checkpoints.restore(tiny_state(0))[0] == 1


def test_starts_look_twice_where_directories_can_not_be_locked(tmp_path, monkeypatch):
    """NFS refuses to lock a directory; two starts at the same time then both write their claim."""

    def refused(descriptor, operation):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", refused)
    monkeypatch.setattr(owner, "ARRIVAL", 0.0)
    monkeypatch.setattr("time.sleep", lambda seconds: claim(tmp_path))
    with pytest.raises(RunInUse, match="was taken over by process 7 on far"), owned(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', "\x00" * 9, "[" * 100_000, '{"pid": 1e999}'])
def test_a_damaged_claim_is_none(content, tmp_path):
    (tmp_path / "owner.json").write_text(content)
    with owned(tmp_path):
        assert json.loads((tmp_path / "owner.json").read_text())["pid"] == os.getpid()


def test_an_object_store_has_owners_as_well(monkeypatch):
    """There are no locks: two starts at the same time are told apart by who is seen a moment later."""
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.setenv("EPATH_USE_TF", "false")
    monkeypatch.setattr(owner, "STALE", 0.2)
    file = epath.Path("gs://bucket/owned/owner.json")
    far = {"host": "far", "machine": "00000000", "pid": 7, "started": 1, "time": time.time()}

    def arrive(seconds: float) -> None:
        if seconds == owner.ARRIVAL:
            file.write_text(json.dumps(far))

    with owned("gs://bucket/owned"):
        assert json.loads(file.read_text())["pid"] == os.getpid()
        with pytest.raises(RunInUse, match=r"^gs://bucket/owned is in use by process \d+ on"), owned("gs://bucket/owned"):
            pass
    assert not file.exists()
    with monkeypatch.context() as patch, pytest.raises(RunInUse, match="was taken over by process 7 on far"):
        patch.setattr(owner.time, "sleep", arrive)
        with owned("gs://bucket/owned"):
            pass
    assert json.loads(file.read_text()) == far
    with owned("gs://bucket/owned"):
        assert json.loads(file.read_text())["pid"] == os.getpid()
