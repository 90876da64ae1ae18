"""The loop around an optimizer step: batches in, metrics out, checkpoints, and a stop when one is asked for.

It does not know what is trained: a state, a jitted step and a stream of batches are its arguments.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax

from vocojax.parallel import processes
from vocojax.parallel.preemption import Preempted, StopRequest
from vocojax.training.checkpoints import Checkpoints
from vocojax.training.config import RunConfig
from vocojax.training.goodput import Goodput, StepTimer
from vocojax.training.hooks import (
    Logger,
    MetricsInFlight,
    NonFiniteLoss,
    Profiler,
    Saver,
    Scalars,
    Score,
    StepEvent,
    Validate,
    Validator,
)
from vocojax.training.schedule import Schedule
from vocojax.training.scoring import Scores
from vocojax.training.step import Step, TrainState
from vocojax.training.watchdog import Watchdog

__all__ = ["LoopConfig", "NonFiniteLoss", "Stream", "Task", "run"]

# How many steps may be on their way to the device: one computes while the next one waits, and no more batches pile up.
IN_FLIGHT = 2


class Stream(Protocol):
    """Batches that can be saved and resumed."""

    def __next__(self) -> Mapping[str, Any]: ...

    def get_state(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class LoopConfig:
    """The settings of a loop.

    Attributes:
      name: shown in the progress bar.
      steps: of the whole run, those of earlier starts included.
      log_every: steps between logged metrics.
      position: the terminal line of the progress bar.
      run: runtime options.
      validate_every: steps between validations; 0 is none. The last step has one as well. A requested stop leaves out
        the validation that is due, or ends the one in progress, and it is not made up for; only that of the last step
        is always whole.
      score_every: steps between scores of benchmarks, for which the same holds; 0 is none.
    """

    name: str
    steps: int
    log_every: int
    position: int = 0
    run: RunConfig = field(default_factory=RunConfig)
    validate_every: int = 0
    score_every: int = 0


@dataclass(frozen=True)
class Task:
    """The functions and data that a loop runs.

    Attributes:
      step: jitted (state, batch) -> (state, metrics), which donates the state. Metrics are scalars, at least `loss`;
        with `tokens` tokens/s are logged.
      stream: gives the batches.
      place: puts a batch of the stream on the devices.
      merge: makes one of the streams' states of all processes.
      scalars: (sums of metrics over the last steps and their number as `steps`, the seconds of these steps without
        compilation, validations and checkpoints) -> more values to log.
      validate: (state, a function to call now and then, which returns whether to continue) -> metrics on other data;
        {} if it did not continue.
      score: likewise, the scores of benchmarks and samples of answers.
    """

    step: Step
    stream: Stream
    place: Callable[[Mapping[str, Any]], Any]
    merge: Callable[[list[dict[str, Any]]], dict[str, Any]] = lambda states: states[0]
    scalars: Scalars = lambda sums, seconds: {}
    validate: Validate = lambda state, should_continue: {}
    score: Score = lambda state, should_continue: Scores()


def run(
    config: LoopConfig,
    workdir: str | Path,
    task: Task,
    state: TrainState,
    first_step: int,
    checkpoints: Checkpoints,
    useful_seconds: float = 0.0,
) -> TrainState:
    """Trains from `first_step` to `config.steps`; returns the last state.

    The next batch is made and sent while the device computes. Metrics stay on the device and are fetched every
    `log_every` steps, when the next step is already under way.

    Args:
      config: how long to train and what to log.
      workdir: the run's directory.
      task: what to run.
      state: after `first_step` steps; its buffers are donated.
      first_step: the steps that were taken before.
      checkpoints: of the run.
      useful_seconds: of the checkpoint that the run resumes from, see `Goodput`.

    Raises:
      NonFiniteLoss: names the step; the last checkpoint was written before it.
      Preempted: the run was asked to stop, and is saved.
      CheckpointError: a checkpoint could not be written.
    """
    with ExitStack() as stack:
        stop_request = StopRequest()
        if first_step < config.steps and stop_request.reached():
            raise Preempted(f"{workdir}: stopped before its next step; nothing new to save. "
                            "Run the same command to start again.")
        schedule = Schedule(config.steps, config.log_every, config.validate_every, checkpoints.config,
                            score_every=config.score_every)
        metrics, timer, goodput = MetricsInFlight(), StepTimer(), Goodput(workdir, useful_seconds)
        logger = stack.enter_context(Logger(
            workdir, config.name, config.position, config.steps, first_step, config.run.wandb_project, task.scalars,
            metrics, timer, goodput, checkpoints))
        watchdog = stack.enter_context(Watchdog(config.run.hang_seconds))
        validator = Validator(task.validate, task.score, config.steps, metrics, logger, timer, watchdog)
        saver = Saver(checkpoints, logger, timer, goodput, watchdog)
        profiler = stack.enter_context(Profiler(workdir, config.run.profile, metrics))
        feed = _Feed(task, metrics, timer, watchdog)
        timer.restart()

        number = first_step
        for number in range(first_step + 1, config.steps + 1):
            profiler.before_step(number)
            state = feed.take_step(number, state)
            if number == first_step + 1:  # compiled: from here on there is something to save
                stack.enter_context(stop_request.listening())
            stop_requested = stop_request.reached()
            validates, scores = (due(number, stop_requested) for due in (schedule.validates, schedule.scores))
            if validates or scores:
                stopped = validator.run(number, state, stop_request, validates, scores)
                stop_requested = stopped or stop_requested
            due = schedule.after(number, stop_requested)
            event = StepEvent(number, state, due, feed.data_state() if due.save else None)
            if not due.stop:
                feed.fetch_batch()
            for hook in (logger, saver, profiler):
                hook.on_step(event)
            if due.stop:
                break
        checkpoints.wait()
        if number < config.steps:
            raise Preempted(f"{workdir}: stopped after step {number} of {config.steps}; checkpoint saved. "
                            "Run the same command to resume.")
    return state


class _Feed:
    """The way of batches and steps to the devices."""

    def __init__(self, task: Task, metrics: MetricsInFlight, timer: StepTimer, watchdog: Watchdog):
        self._task, self._metrics, self._timer, self._watchdog = task, metrics, timer, watchdog
        self._batch: Any = None
        self._compiled = False

    def fetch_batch(self) -> None:
        """Makes the next batch and starts its way to the devices."""
        with self._timer.waiting(lambda: self._metrics.all_done):
            self._batch = self._task.place(next(self._task.stream))

    def take_step(self, number: int, state: TrainState) -> TrainState:
        """Puts a step on its way and returns the state after it; waits until no more than `IN_FLIGHT` are under way."""
        if self._batch is None:
            self.fetch_batch()
        with nullcontext() if self._compiled else self._timer.other_work(), jax.transfer_guard("disallow"):
            state, metrics = self._task.step(state, self._batch)
        self._batch, self._compiled = None, True
        self._metrics.add(number, metrics)
        self._metrics.wait_for(IN_FLIGHT)
        self._watchdog.beat()
        return state

    def data_state(self) -> dict[str, Any]:
        """Returns where the data of all processes stand, on process 0; {} on the others."""
        states = processes.to_first("data state", self._task.stream.get_state())
        return {} if states is None else self._task.merge(states)
