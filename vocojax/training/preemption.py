"""The request to stop: SIGTERM, which is also how a TPU's preemption, Kubernetes and SLURM announce themselves."""

import logging
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

LOG = logging.getLogger(__name__)


class Preempted(RuntimeError):
    """The run was told to stop and has saved its state; the same command goes on with it."""


class StopRequest:
    """A context in which SIGTERM asks the run to stop instead of ending it.

    With several processes JAX's own service takes the signal wherever it arrives and finds a step that none has passed
    yet, at which all stop.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None
        # A signal has a handler only in the main thread.
        self._own = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()

    def reached(self, step: int) -> bool:
        """Whether the run is to stop behind this step; to be asked behind every one, by all processes."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        LOG.warning("%s: saving behind the step in progress", signal.Signals(number).name)

    def __enter__(self) -> "StopRequest":
        if self._own:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._own:
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)
