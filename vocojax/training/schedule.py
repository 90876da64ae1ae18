"""Decides what follows each optimizer step: validating, logging, saving and stopping."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from vocojax.parallel import processes
from vocojax.training.config import CheckpointConfig


@dataclass(frozen=True)
class Due:
    """The work that is due after a step, on all processes alike.

    Attributes:
      log: the step closes an interval of logged metrics.
      save: a checkpoint is to be written.
      stop: no further step is to be taken.
    """

    log: bool
    save: bool
    stop: bool


class Schedule:
    """The rules of when a run validates, logs, saves and stops.

    Args:
      steps: of the whole run; the last one is always validated (if any is) and saved.
      log_every: steps between logged metrics.
      validate_every: steps between validations; 0 is none.
      checkpoint: when to save. The time counts from here on.
      clock: seconds. Where there are several processes, the clock of process 0 decides.
      score_every: steps between scores of benchmarks; 0 is none.
    """

    def __init__(
        self, steps: int, log_every: int, validate_every: int, checkpoint: CheckpointConfig,
        clock: Callable[[], float] = time.monotonic, score_every: int = 0,
    ):
        self._steps, self._log_every, self._validate_every = steps, log_every, validate_every
        self._score_every = score_every
        self._checkpoint, self._clock, self._saved_at = checkpoint, clock, clock()

    def validates(self, step: int, stop_requested: bool) -> bool:
        """Returns whether a validation is due after a step. A requested stop leaves it out, except after the last."""
        return self._is_measured(self._validate_every, step, stop_requested)

    def scores(self, step: int, stop_requested: bool) -> bool:
        """Returns whether scores are due after a step; a requested stop leaves them out as it does a validation."""
        return self._is_measured(self._score_every, step, stop_requested)

    def after(self, step: int, stop_requested: bool) -> Due:
        """Returns what is due after a step; to be called once per step, when its validation is over.

        Args:
          step: the number of steps taken.
          stop_requested: whether the run was asked to stop.
        """
        log, stop = step % self._log_every == 0, stop_requested or step == self._steps
        save = stop or self._saves_at(step) or (log and self._is_overdue())
        if save:
            self._saved_at = self._clock()
        return Due(log, save, stop)

    def _is_measured(self, every: int, step: int, stop_requested: bool) -> bool:
        return every > 0 and (step == self._steps or (not stop_requested and step % every == 0))

    def _saves_at(self, step: int) -> bool:
        return any(every and step % every == 0 for every in (self._checkpoint.every, self._checkpoint.keep_every))

    def _is_overdue(self) -> bool:
        limit = 60 * self._checkpoint.minutes
        late = limit > 0 and self._clock() - self._saved_at >= limit
        return limit > 0 and processes.from_first("checkpoint by time", late)
