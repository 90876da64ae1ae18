"""Work in processes of their own, to be killed: each is forked from a server that has imported everything."""

import contextlib
import functools
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import jax

from tests.helpers.environment import on_cpu
from vocojax.evaluation.training_scores import open_scorer
from vocojax.parallel.cluster import Cluster, initialize
from vocojax.parallel.preemption import Preempted, leave_on_sigterm
from vocojax.training.config import StageConfig
from vocojax.training.stage import train

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.helpers.run_processes", "tests.helpers.evaluation_work"])
HEARTBEAT = 10


def _child(work: Callable[[], None], log: str, cluster: Cluster | None, devices: int) -> None:
    leave_on_sigterm(0)  # before there is a log, for who waits for one
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(on_cpu(devices))
    status = 0
    try:
        initialize(cluster, 60, HEARTBEAT)
        print("starts", flush=True)
        work()
    except Preempted as stopped:
        print(stopped)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    if cluster and status == 0:
        jax.distributed.shutdown()
    os._exit(status)


def start(stage: StageConfig, workdir: Path, processes: int = 1, devices: int = 1) -> list:
    """Starts a run of training; see `start_work`."""
    work = functools.partial(train, stage, str(workdir), open_scorer=open_scorer)
    return start_work(work, workdir, processes, devices)


def start_work(work: Callable[[], None], workdir: Path, processes: int = 1, devices: int = 1) -> list:
    """Starts work in each of several processes, with `devices` virtual devices each.

    Args:
      work: can be pickled.
      workdir: logs are written beside it, see `logs`.
      processes: of one JAX cluster.
      devices: of each process.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    children = []
    for index in range(processes):
        cluster = Cluster(address, processes, index) if processes > 1 else None
        log = str(workdir.with_name(f"{workdir.name}.{index}.log"))
        children.append(CONTEXT.Process(target=_child, args=(work, log, cluster, devices)))
        children[-1].start()
    return children


def finish(children: list, limit: float = 300) -> list[int]:
    """Exit codes, of what is still alive after the limit those of SIGKILL."""
    deadline = time.monotonic() + limit
    for child in children:
        child.join(max(deadline - time.monotonic(), 0.1))
        if child.is_alive():
            child.kill()
            child.join()
    return [child.exitcode for child in children]


def run(stage: StageConfig, workdir: Path, processes: int = 1, devices: int = 1) -> None:
    """A run that must succeed."""
    codes = finish(start(stage, workdir, processes, devices))
    assert codes == [0] * processes, logs(workdir)


def logs(workdir: Path) -> str:
    return "\n".join(path.read_text()[-4000:] for path in sorted(workdir.parent.glob(f"{workdir.name}.*.log")))


def wait_until(condition, child, limit: float = 120) -> None:
    """Returns when the condition holds or the child has ended."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline and child.is_alive() and not condition():
        time.sleep(0.002)


def kill(child, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, number)
