"""The request to stop: SIGTERM, which TPU preemption, Kubernetes and SLURM send as well.

A run handles it in one of three ways:

* Before its first step there is nothing new to save. `leave_on_sigterm` ends the process at once.
* After that a run of one process notes the signal and stops after the step in progress (`StopRequest`).
* Several processes agree on a step. Once `jax.distributed.initialize` has run, JAX's own service takes the signal in
  any process and finds a step that none has passed yet, after which all stop. Threads of the runtimes do this over the
  network: no device and no step waits for them.
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
    """The run was asked to stop and has saved a checkpoint; the same command resumes it."""


def leave_on_sigterm(status: int) -> None:
    """Lets SIGTERM end this process with `status` at any moment, until something else takes the signal.

    This is for a run that has nothing new to save: what it writes before its first step is whole or absent. A thread
    watches for the signal, because Python's own handlers wait until a compilation or a transfer returns. Main thread
    only.
    """
    def watch() -> None:
        while True:
            if ours.recv(1)[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is _leaving:
                LOG.warning("SIGTERM: nothing new to save; run the same command to start again")
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
    """Marks that the thread is in charge: if this is no longer the handler, something else has taken the signal over.

    That may happen before the thread has handled a signal. What took over then finds it in `_unanswered`.
    """
    _unanswered.append(number)


def _ignored(number: int, frame: FrameType | None) -> None:
    LOG.warning("SIGTERM: ignored, the run has failed and is ending")


@contextlib.contextmanager
def handed_to_jax() -> Iterator[None]:
    """In this context JAX's service starts to take SIGTERM. A signal that arrives too early for it is sent again."""
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
    """The request to stop a run, if there is one."""

    def __init__(self) -> None:
        self._asked = False
        self._calls = 0

    def reached(self) -> bool:
        """Returns whether the run has to stop here. All processes call this in the same places."""
        if jax.process_count() == 1:
            return self._asked
        # Calls are counted, not steps: for the service a process that has not called yet is at 0, and for a run that
        # resumes after step 100 it could choose step 1, which never comes.
        self._calls += 1
        return multihost_utils.reached_preemption_sync_point(self._calls)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """In this context SIGTERM asks a run of one process to stop.

        After a failure the signal is ignored, so that the process ends with the failure's status although checkpoints
        may still be written then: `leave_on_sigterm` does not get the signal back.
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
        LOG.warning("SIGTERM: saving after the step in progress")


def _is_main() -> bool:
    """Returns whether this is the main thread, the only one that may set handlers of signals."""
    return threading.current_thread() is threading.main_thread()
