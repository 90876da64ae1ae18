"""The owner of a run's directory: one training run at a time writes there.

    WORKDIR/owner.json   the owner's host and process id, and a time that it renews every few seconds

The file is removed when the run ends. What a killed owner leaves is no obstacle: on the same machine its process is
seen to be dead, so the next start takes over at once. From elsewhere (a shared file system, `gs://`) an owner counts as
dead when it has not renewed the file for `STALE` seconds. Of several processes the first one owns for all.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from etils import epath

from vocojax.errors import os_problem
from vocojax.files import is_remote, write_atomically
from vocojax.liveness import ProcessName, this_process
from vocojax.parallel import processes
from vocojax.runs.directory import CheckpointError, checkpoint_path

LOG = logging.getLogger(__name__)
FILE = "owner.json"
BEAT = 10.0  # seconds between renewals
STALE = 60.0  # seconds without a renewal after which the owner counts as dead
LONG_AGO = 600.0  # seconds: more than the clocks of two machines differ
ARRIVAL = 2.0  # seconds that two starts give each other to be seen where there are no locks: object stores, NFS


class RunInUse(CheckpointError):
    """A run's directory that another training run writes."""


class _Claim(NamedTuple):
    owner: ProcessName
    time: float  # of the last renewal, by the owner's clock


@contextlib.contextmanager
def owned(workdir: str | os.PathLike) -> Iterator[None]:
    """Makes this run the owner of its directory within the context. All processes call it alike.

    Args:
      workdir: the run's directory; made if it is missing.

    Raises:
      RunInUse: on all processes, if another run owns it.
      CheckpointError: on all processes, if the directory can't be written.
    """
    path, problem, in_use = checkpoint_path(workdir) / FILE, "", False
    if processes.is_first():
        try:
            _claim(path)
        except Exception as error:  # object stores have exceptions of their own, and other processes wait
            text = os_problem(error) if isinstance(error, OSError) else str(error)
            problem, in_use = text or type(error).__name__, isinstance(error, RunInUse)
    problem, in_use = processes.from_first("owner", (problem, in_use))
    if problem:
        raise (RunInUse if in_use else CheckpointError)(problem)
    with _renewed(path) if processes.is_first() else contextlib.nullcontext():
        yield


def taken_over(workdir: epath.Path) -> str:
    """Returns a problem if the directory has another owner than this process, else ''."""
    claim = _read(workdir / FILE)
    if claim is None or claim.owner == this_process():
        return ""
    return (f"{workdir} was taken over by {claim.owner}, because this run gave no sign of life for {STALE:g} s; this "
            "run stops and saves nothing more")


def _claim(path: epath.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    first: _Claim | None = None
    since = time.monotonic()
    while True:
        with _alone(path.parent) as locked:
            claim = _read(path)
            if claim is None or claim.owner.is_dead or _is_stale(claim, first, since):
                _write(path)
                break
            if claim.owner.is_on_this_machine or first not in (None, claim):
                raise RunInUse(f"{path.parent} is in use by {claim.owner}, which trains there: wait until it ends, "
                               f"stop it (kill {claim.owner.pid} on that host), or use another --workdir")
        if first is None:
            LOG.warning("%s: %s was its owner; waiting up to %g s for a sign of its life", path.parent, claim.owner,
                        STALE)
            first = claim
        time.sleep(min(BEAT, STALE) / 10)
    if not locked:
        time.sleep(ARRIVAL)
        if (claim := _read(path)) is None or claim.owner != this_process():
            raise RunInUse(f"{path.parent} was taken over by {claim.owner if claim else 'another'}, which started at "
                           "the same time: leave it to that one, or use another --workdir")


def _is_stale(claim: _Claim, first: _Claim | None, since: float) -> bool:
    """Returns whether an owner on another machine is dead: it has not renewed its claim since it was first seen."""
    if claim.owner.is_on_this_machine:
        return False
    return time.time() - claim.time > LONG_AGO or (claim == first and time.monotonic() - since > STALE)


@contextlib.contextmanager
def _renewed(path: epath.Path) -> Iterator[None]:
    """Renews the claim within the context, and removes it at the end."""
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(BEAT):
            try:
                with _alone(path.parent):
                    if not ended.is_set() and not taken_over(path.parent):
                        _write(path)
            except Exception as error:  # object stores have exceptions of their own; the next renewal may succeed
                LOG.warning("%s can't be renewed: %s", path, error)

    thread = threading.Thread(target=renew, name="owner of the run", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(Exception), _alone(path.parent):
            if not taken_over(path.parent):
                path.unlink(missing_ok=True)


def _read(path: epath.Path) -> _Claim | None:
    """Reads the claim; None if there is none, or none that makes sense."""
    try:
        values = json.loads(path.read_text())
        owner = ProcessName(str(values["host"]), str(values["machine"]), int(values["pid"]), int(values["started"]))
        return _Claim(owner, float(values["time"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _write(path: epath.Path) -> None:
    values = {**dataclasses.asdict(this_process()), "time": time.time()}
    write_atomically(path, json.dumps(values, indent=2) + "\n")


@contextlib.contextmanager
def _alone(directory: epath.Path) -> Iterator[bool]:
    """Keeps other processes out of this context, where the file system has locks; yields whether it has."""
    if is_remote(directory):
        yield False
        return
    descriptor = os.open(Path(directory), os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            locked = True
        except OSError:  # NFS locks no directories
            locked = False
        yield locked
    finally:
        os.close(descriptor)  # which gives the lock back
