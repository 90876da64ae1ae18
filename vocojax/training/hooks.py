"""The work of a run between its steps: validating, logging, saving and tracing. `schedule.py` decides when."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from vocojax.errors import VocojaxError
from vocojax.parallel import processes
from vocojax.parallel.preemption import StopRequest
from vocojax.runs.directory import run_path
from vocojax.training.checkpoints import Checkpoints
from vocojax.training.goodput import Goodput, StepTimer
from vocojax.training.run_log import RunLog
from vocojax.training.schedule import Due
from vocojax.training.scoring import Sample, Scores
from vocojax.training.step import TrainState
from vocojax.training.watchdog import Watchdog

Scalars = Callable[[Mapping[str, float], float], Mapping[str, float]]
Validate = Callable[[TrainState, Callable[[], bool]], dict[str, float]]
Score = Callable[[TrainState, Callable[[], bool]], Scores]
Numbered = list[tuple[int, dict[str, float]]]


class NonFiniteLoss(VocojaxError, RuntimeError):
    """A loss or a gradient that became NaN or infinite."""


@dataclass(frozen=True)
class StepEvent:
    """A step that is on its way to the device, and what is due after it.

    Attributes:
      number: of the step, from 1 on.
      state: the state after it.
      due: what is due.
      data_state: where the data of all processes stand, on process 0; only if a checkpoint is due.
    """

    number: int
    state: TrainState
    due: Due
    data_state: dict[str, Any] | None


class MetricsInFlight:
    """Metrics of steps that are not logged yet. They stay on the device."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []

    def add(self, number: int, metrics: dict[str, jax.Array]) -> None:
        """Adds the metrics of a step that was put on its way."""
        self._pending.append((number, metrics))

    def wait_for(self, back: int) -> None:
        """Waits for the step that is `back` steps before the newest, if it is among those not logged."""
        if len(self._pending) > back:
            self._pending[-1 - back][1]["loss"].block_until_ready()

    @property
    def all_done(self) -> bool:
        """True if the device has computed all of them, and so has run out of work."""
        newest: Any = self._pending[-1][1]["loss"] if self._pending else None
        return newest is None or newest.is_ready()

    def take_until(self, number: int) -> Numbered:
        """Fetches the metrics of steps up to `number`, and holds them no longer."""
        part = [(n, metrics) for n, metrics in self._pending if n <= number]
        self._pending = self._pending[len(part):]
        return [(n, {key: float(value) for key, value in metrics.items()}) for n, metrics in jax.device_get(part)]


class Logger:
    """Metrics in the run's log, its progress bar and goodput.json; a context.

    Metrics of an interval are fetched at the end of the next one, when its steps are already under way, or before a
    checkpoint, so that no step is logged twice after a restart.

    Args:
      name, position: of the progress bar.
      steps: of the whole run.
      first_step: the steps that the run took before.
      scalars: see `loop.Task`.

    Attributes:
      last: means of the metrics that were last logged.
    """

    def __init__(
        self, workdir: str | Path, name: str, position: int, steps: int, first_step: int, wandb_project: str,
        scalars: Scalars, metrics: MetricsInFlight, timer: StepTimer, goodput: Goodput, checkpoints: Checkpoints,
    ):
        self._workdir, self._scalars, self._metrics = workdir, scalars, metrics
        self._timer, self._goodput, self._checkpoints = timer, goodput, checkpoints
        self._log = RunLog(workdir, first_step, wandb_project, name)
        self._bar = tqdm(total=steps, initial=first_step, desc=name, unit="step", dynamic_ncols=True,
                         position=position, disable=not processes.is_first())
        self._interval_end = 0  # the last step of the interval that is to be logged
        self._validated: tuple[int, dict[str, float]] = (0, {})
        self.last: dict[str, float] = {}

    def on_step(self, event: StepEvent) -> None:
        """Logs the interval before this one, or everything if a checkpoint follows."""
        self.log_until(event.number if event.due.save else self._interval_end)
        if event.due.log:
            self._interval_end = event.number

    def add_validation(self, number: int, values: dict[str, float], samples: Sequence[Sample] = ()) -> None:
        """Logs up to step `number`, its line with the values of a validation, and then samples of answers."""
        self._validated = (number, values)
        self.log_until(number)
        try:
            self._log.write_samples(number, samples)
        except OSError as error:
            raise self._checkpoints.failure(error) from error

    def validation_of(self, number: int) -> dict[str, float]:
        """Returns the values of the validation after step `number`, if there was one."""
        return self._validated[1] if self._validated[0] == number else {}

    def log_until(self, number: int) -> None:
        """Fetches and logs the metrics of steps up to `number` that are not logged yet.

        Raises:
          NonFiniteLoss: a step's loss or gradient is not finite.
          CheckpointError: a checkpoint or the log could not be written.
        """
        fetched = self._metrics.take_until(number)
        if not fetched:
            return
        self._checkpoints.check()
        bad = next((place for place, (_, metrics) in enumerate(fetched) if not _is_finite(metrics)), None)
        if bad is not None:
            self._write(fetched[: bad + 1], {})
            raise self._non_finite(*fetched[bad])
        seconds, waited = self._timer.seconds_of_steps(), self._timer.waited
        self._goodput.count(seconds - waited)
        sums: dict[str, float] = defaultdict(float, steps=len(fetched))
        for _, metrics in fetched:
            for key, value in metrics.items():
                sums[key] += value
        self.last = {key: value / len(fetched) for key, value in sums.items()}
        rate = sums["tokens"] / seconds
        self._write(fetched, {
            "tokens_per_second": rate, "steps_per_second": len(fetched) / seconds,
            "data_wait_seconds": waited, "data_wait_share": min(waited / seconds, 1.0),
            "goodput": self._goodput.share,
            **self._scalars(sums, seconds),
        })
        self._bar.set_postfix_str(f"loss {fetched[-1][1]['loss']:.4f}, {rate:,.0f} tokens/s")
        self._bar.update(len(fetched))
        self._timer.restart()

    def flush(self) -> None:
        """Writes everything that is logged to where the run keeps it; `CheckpointError` if that fails."""
        try:
            self._log.flush()
        except OSError as error:
            raise self._checkpoints.failure(error) from error

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._log.close()

    def _write(self, fetched: Numbered, values: Mapping[str, float]) -> None:
        try:
            self._log.write([(n, {**metrics, **self.validation_of(n)}) for n, metrics in fetched], values)
            if processes.is_first():
                self._goodput.write(fetched[-1][0])
        except OSError as error:
            raise self._checkpoints.failure(error) from error

    def _non_finite(self, number: int, metrics: Mapping[str, float]) -> NonFiniteLoss:
        self._checkpoints.wait()
        kept = "no checkpoint was written before it" if self._checkpoints.latest is None else (
            f"the last good checkpoint is step {self._checkpoints.latest} in {self._workdir}")
        return NonFiniteLoss(f"step {number}: loss {metrics['loss']}, gradient norm {metrics.get('grad_norm')}; "
                             f"{kept}. Lower optimizer.learning_rate or look at this step's data.")


def _is_finite(metrics: Mapping[str, float]) -> bool:
    return math.isfinite(metrics["loss"]) and math.isfinite(metrics.get("grad_norm", 0.0))


class Validator:
    """Measures the state on held-out data and by benchmarks, where the schedule asks for it.

    Args:
      validate: see `loop.Task`.
      score: see `loop.Task`.
      last_step: of the whole run; its validation is never ended by a stop.
    """

    def __init__(
        self, validate: Validate, score: Score, last_step: int, metrics: MetricsInFlight, logger: Logger,
        timer: StepTimer, watchdog: Watchdog,
    ):
        self._validate, self._score, self._last_step, self._metrics = validate, score, last_step, metrics
        self._logger, self._timer, self._watchdog = logger, timer, watchdog

    def run(
        self, number: int, state: TrainState, stop_request: StopRequest, validates: bool = True, scores: bool = False
    ) -> bool:
        """Measures the state after step `number` and logs up to it; returns whether a requested stop ended it.

        Args:
          number: of the step.
          state: after it.
          stop_request: of the run.
          validates: whether held-out data is measured.
          scores: whether benchmarks are asked.
        """
        stopped = False

        def should_continue() -> bool:
            nonlocal stopped
            self._watchdog.beat()
            stopped = number != self._last_step and stop_request.reached()
            return not stopped

        self._metrics.wait_for(0)
        with self._timer.other_work():
            values = self._validate(state, should_continue) if validates else {}
            found = self._score(state, should_continue) if scores and not stopped else Scores()
        self._logger.add_validation(number, {**values, **found.values}, found.samples)
        return stopped


class Saver:
    """Begins to write the checkpoints that are due, after their steps are logged."""

    def __init__(
        self, checkpoints: Checkpoints, logger: Logger, timer: StepTimer, goodput: Goodput, watchdog: Watchdog
    ):
        self._checkpoints, self._logger, self._timer = checkpoints, logger, timer
        self._goodput, self._watchdog = goodput, watchdog

    def on_step(self, event: StepEvent) -> None:
        if not event.due.save:
            return
        with self._timer.other_work():
            self._logger.flush()
            progress = {"data": event.data_state, "useful_seconds": self._goodput.useful}
            metrics = {**self._logger.last, **self._logger.validation_of(event.number)}
            self._checkpoints.save(event.number, event.state, progress, metrics)
        self._watchdog.beat()


class Profiler:
    """A trace of some steps in WORKDIR/profile; a context.

    Args:
      span: the first and the last step to trace, or empty. A run that resumes between them traces those that are left.
    """

    def __init__(self, workdir: str | Path, span: tuple[int, ...], metrics: MetricsInFlight):
        self._directory, self._metrics = run_path(workdir) / "profile", metrics
        self._first, self._last = span or (0, -1)
        self._traces = False

    def before_step(self, number: int) -> None:
        """Begins the trace before its first step."""
        if self._first <= number <= self._last and not self._traces:
            jax.profiler.start_trace(str(self._directory))
            self._traces = True

    def on_step(self, event: StepEvent) -> None:
        """Writes the trace after its last step."""
        if event.number == self._last:
            self._stop()

    def _stop(self) -> None:
        if self._traces:
            self._traces = False
            self._metrics.wait_for(0)
            jax.profiler.stop_trace()

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
