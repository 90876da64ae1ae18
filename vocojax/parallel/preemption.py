"""The request to stop: SIGTERM, which is also how a TPU's preemption, Kubernetes and SLURM announce themselves.

A run meets it in one of three ways:

* until its first step there is nothing new to save, and `leave_on_sigterm` ends the process at once;
* a run of one process then notes it and stops behind the step in progress (`StopRequest`);
* several processes agree: from `jax.distributed.initialize` on JAX's own service takes the signal, wherever it arrives,
  and finds a moment that none has passed yet, at which all stop. Threads of the runtimes settle it over the network:
  no device and no step waits for them.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

LOG = logging.getLogger(__name__)
_unanswered: list[int] = []  # signals that came while `leave_on_sigterm` held and have not ended the process (yet)


class Preempted(RuntimeError):
    """The run was told to stop and what there is to save is saved; the same command goes on with it."""


def leave_on_sigterm(status: int) -> None:
    """Lets SIGTERM end this process with `status`, whatever it is at, until something else takes the signal.

    For a run that has nothing new to save: what it writes before its first step is whole or not there. A thread watches
    for the signal, since Python's own handlers wait until a compilation or a transfer returns. Main thread only.
    """
    def watch() -> None:
        while True:
            if ours.recv(1)[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is _leaving:
                LOG.warning("SIGTERM: there is nothing new to save; the same command starts again")
                logging.shutdown()
                os._exit(status)

    def forget() -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    ours, told = socket.socketpair()
    told.setblocking(False)
    signal.signal(signal.SIGTERM, _leaving)
    signal.set_wakeup_fd(told.detach(), warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=forget)  # a worker that is terminated is not this process
    threading.Thread(target=watch, name="SIGTERM", daemon=True).start()


def _leaving(number: int, frame: FrameType | None) -> None:
    """Stands for the thread: where it is no longer the handler, something else has taken the signal over.

    That may be so before the thread has got to a signal, which what took over then finds in `_unanswered`.
    """
    _unanswered.append(number)


def _ignored(number: int, frame: FrameType | None) -> None:
    LOG.warning("SIGTERM: the run has failed and ends anyway")


@contextlib.contextmanager
def handed_to_jax() -> Iterator[None]:
    """In this context JAX's service comes to take SIGTERM; it is also told of one that arrived too early for it."""
    if not _is_main():
        yield
        return
    early: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: early.append(number))
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        raise
    if early or _unanswered:
        os.kill(os.getpid(), signal.SIGTERM)


class StopRequest:
    """Whether a run was told to stop."""

    def __init__(self) -> None:
        self._asked = False
        self._calls = 0

    def reached(self) -> bool:
        """Whether the run is to stop here; to be asked by all processes, in the same places."""
        if jax.process_count() == 1:
            return self._asked
        # The service takes a process that has not asked yet to be at 0. Numbers of steps would not do: of a run that
        # goes on behind step 100 it would choose 1 then, which never comes.
        self._calls += 1
        return multihost_utils.reached_preemption_sync_point(self._calls)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """In this context SIGTERM asks a run of one process to stop.

        Behind a failure the process ends with that one's status, though checkpoints are still being written then: what
        `leave_on_sigterm` holds does not get the signal back, and it is ignored.
        """
        if jax.process_count() > 1 or not _is_main():
            yield
            return
        before: Any = signal.signal(signal.SIGTERM, self._ask)
        if _unanswered:
            self._ask(_unanswered.pop(), None)
        after = before or signal.SIG_DFL
        try:
            yield
        except Preempted:
            raise
        except BaseException:
            after = _ignored if before is _leaving else after
            raise
        finally:
            signal.signal(signal.SIGTERM, after)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        LOG.warning("SIGTERM: saving behind the step in progress")


def _is_main() -> bool:
    """Whether this is the main thread, which alone may set handlers of signals."""
    return threading.current_thread() is threading.main_thread()
