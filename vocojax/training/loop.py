"""The loop around an optimizer step: batches in, metrics out, checkpoints, and a stop when one is asked for.

It knows nothing of what is trained: a state, a jitted step and a stream of batches are its arguments.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
from tqdm import tqdm

from vocojax.errors import VocojaxError
from vocojax.parallel import processes
from vocojax.parallel.preemption import Preempted, StopRequest
from vocojax.runs.directory import run_path
from vocojax.training.checkpoints import Checkpoints
from vocojax.training.config import RunConfig
from vocojax.training.goodput import Goodput
from vocojax.training.run_log import RunLog
from vocojax.training.step import Step, TrainState
from vocojax.training.watchdog import Watchdog

# How many steps may be on their way to the device: one computes while the next one waits, and no more batches pile up.
IN_FLIGHT = 2


class NonFiniteLoss(VocojaxError, RuntimeError):
    """The loss became NaN or infinite."""


class Stream(Protocol):
    """Batches that can be saved and resumed."""

    def __next__(self) -> Mapping[str, Any]: ...

    def get_state(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class LoopConfig:
    """name: shown in the progress bar, on line `position`; steps: in all, those of earlier runs included;
    validate_every: steps between validations; 0 is none. One also follows the last step. A stop leaves out the one
      that is due or ends the one in progress, and it is not made up for; only that of the last step is always whole."""

    name: str
    steps: int
    log_every: int
    position: int = 0
    run: RunConfig = field(default_factory=RunConfig)
    validate_every: int = 0


@dataclass(frozen=True)
class Task:
    """What a loop runs.

    step: jitted (state, batch) -> (state, metrics), which donates the state; metrics hold at least `loss`; `tokens`
      gives tokens/s. place: puts a batch of the stream on the devices. merge: the streams' states of all processes as
      one. scalars: (sums of metrics over the last steps and their number as `steps`, their seconds, without those of
      compilation, validations and checkpoints) -> values to log. validate: (state, what it calls now and then:
      whether to go on) -> metrics on other data, {} if it was ended.
    """

    step: Step
    stream: Stream
    place: Callable[[Mapping[str, Any]], Any]
    merge: Callable[[list[dict[str, Any]]], dict[str, Any]] = lambda states: states[0]
    scalars: Callable[[Mapping[str, float], float], Mapping[str, float]] = lambda sums, seconds: {}
    validate: Callable[[TrainState, Callable[[], bool]], dict[str, float]] = lambda state, goes_on: {}


def run(
    config: LoopConfig,
    workdir: str | Path,
    task: Task,
    state: TrainState,
    first_step: int,
    checkpoints: Checkpoints,
    useful_seconds: float = 0.0,
) -> TrainState:
    """Trains from `first_step` to `config.steps`.

    The next batch is made and sent while the device computes. Metrics stay on the device and are fetched every
    `log_every` steps, when the next step is already under way.

    Args:
      useful_seconds: of the checkpoint that the run goes on from, see `Goodput`.

    Raises:
      NonFiniteLoss: names the step; the last checkpoint was written before it.
      Preempted: the run was told to stop, and is saved.
      CheckpointError: a checkpoint could not be written.
    """
    with ExitStack() as stack:
        stop_request = StopRequest()
        if first_step < config.steps and stop_request.reached():
            raise Preempted(f"{workdir}: told to stop before its next step; there is nothing new to save, and the same "
                            "command starts again")
        loop = _Loop(config, workdir, task, checkpoints, first_step, useful_seconds, stack)
        for number in range(first_step + 1, config.steps + 1):
            loop.start_profile(number)
            state = loop.take_step(number, state)
            if number == first_step + 1:  # compiled: from here on there is something to save
                stack.enter_context(stop_request.listening())
            stops, is_last = stop_request.reached(), number == config.steps
            if config.validate_every and is_last:
                loop.validate(number, state)
            elif config.validate_every and not stops and number % config.validate_every == 0:
                stops = loop.validate(number, state, stop_request)
            saves = stops or is_last or checkpoints.due(number)
            logs = number % config.log_every == 0
            if logs and not saves:
                saves = checkpoints.overdue()
            data_state = loop.data_state() if saves else None
            if not is_last and not stops:
                loop.fetch_batch()
            loop.report_until(number if saves else loop.logged)
            if logs:
                loop.logged = number
            if saves:
                loop.save(number, state, data_state)
            loop.stop_profile(number)
            if stops and not is_last:
                checkpoints.wait()
                raise Preempted(f"{workdir}: stopped behind step {number} of {config.steps} and saved; "
                                "the same command goes on")
        checkpoints.wait()
    return state


class _Loop:
    """What a loop holds between steps."""

    def __init__(self, config: LoopConfig, workdir: str | Path, task: Task, checkpoints: Checkpoints, first_step: int,
                 useful_seconds: float, stack: ExitStack):
        self._config, self._workdir, self._task, self._checkpoints = config, workdir, task, checkpoints
        self._goodput = Goodput(workdir, useful_seconds)
        self._log = RunLog(workdir, first_step, config.run.wandb_project, config.name)
        stack.callback(self._log.close)
        self._bar = tqdm(total=config.steps, initial=first_step, desc=config.name, unit="step", dynamic_ncols=True,
                         position=config.position, disable=not processes.is_first())
        stack.callback(self._bar.close)
        self._watchdog = stack.enter_context(Watchdog(config.run.hang_seconds))
        self.logged = 0  # the last step whose metrics are to be reported
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._last: dict[str, float] = {}  # what was last reported
        self._validated: dict[int, dict[str, float]] = {}  # the last step that was, and what came of it
        self._batch: Any = None
        self._first = True
        self._traces = False
        stack.callback(self.stop_profile)
        self._since = time.perf_counter()
        self._waited = self._lost = 0.0  # seconds since the last report: for data; for what is no step

    def fetch_batch(self) -> None:
        """Makes the next batch and starts its way to the devices."""
        before = time.perf_counter()
        self._batch = self._task.place(next(self._task.stream))
        newest: Any = self._pending[-1][1]["loss"] if self._pending else None
        if newest is None or newest.is_ready():  # the device has run out of work
            self._waited += time.perf_counter() - before

    def take_step(self, number: int, state: TrainState) -> TrainState:
        """Puts a step on its way."""
        if self._batch is None:
            self.fetch_batch()
        before = time.perf_counter()
        with jax.transfer_guard("disallow"):
            state, metrics = self._task.step(state, self._batch)
        if self._first:
            self._lost += time.perf_counter() - before  # compilation
        self._batch, self._first = None, False
        self._pending.append((number, metrics))
        if len(self._pending) > IN_FLIGHT:
            self._pending[-1 - IN_FLIGHT][1]["loss"].block_until_ready()
        self._watchdog.beat()
        return state

    def data_state(self) -> dict[str, Any]:
        """Where the data of all processes stand, on process 0."""
        states = processes.to_first("data state", self._task.stream.get_state())
        return {} if states is None else self._task.merge(states)

    def validate(self, number: int, state: TrainState, stop_request: StopRequest | None = None) -> bool:
        """Measures the state behind step `number`, and reports up to it; returns whether a stop ended it."""
        stopped = False

        def goes_on() -> bool:
            nonlocal stopped
            self._watchdog.beat()
            stopped = stop_request is not None and stop_request.reached()
            return not stopped

        self._pending[-1][1]["loss"].block_until_ready()
        before = time.perf_counter()
        self._validated = {number: self._task.validate(state, goes_on)}
        self._lost += time.perf_counter() - before
        self.report_until(number)
        return stopped

    def report_until(self, number: int) -> None:
        """Fetches and logs the metrics of steps up to `number` that have not been."""
        part = [(n, m) for n, m in self._pending if n <= number]
        if not part:
            return
        self._pending = self._pending[len(part):]
        fetched = [(n, {k: float(v) for k, v in m.items()}) for n, m in jax.device_get(part)]
        self._checkpoints.check()
        _require_finite(fetched, self._workdir, self._checkpoints)
        seconds = max(time.perf_counter() - self._since - self._lost, 1e-9)
        self._goodput.count(seconds - self._waited)
        sums: dict[str, float] = defaultdict(float, steps=len(fetched))
        for _, metrics in fetched:
            for key, value in metrics.items():
                sums[key] += value
        self._last = {key: value / len(fetched) for key, value in sums.items()}
        rate = sums["tokens"] / seconds
        values = {
            "tokens_per_second": rate, "steps_per_second": len(fetched) / seconds,
            "data_wait_share": min(self._waited / seconds, 1.0), "goodput": self._goodput.share,
            **self._task.scalars(sums, seconds),
        }
        try:
            self._log.write([(n, {**metrics, **self._validated.get(n, {})}) for n, metrics in fetched], values)
            if processes.is_first():
                self._goodput.write(fetched[-1][0])
        except OSError as error:
            raise self._checkpoints.failure(error) from error
        self._bar.set_postfix_str(f"loss {fetched[-1][1]['loss']:.4f}, {rate:,.0f} tokens/s")
        self._bar.update(len(fetched))
        self._since, self._waited, self._lost = time.perf_counter(), 0.0, 0.0

    def save(self, number: int, state: TrainState, data_state: dict[str, Any] | None) -> None:
        """Begins to write a checkpoint behind step `number`, whose metrics are reported."""
        before = time.perf_counter()
        progress = {"data": data_state, "useful_seconds": self._goodput.useful}
        try:
            self._log.flush()
        except OSError as error:
            raise self._checkpoints.failure(error) from error
        self._checkpoints.save(number, state, progress, {**self._last, **self._validated.get(number, {})})
        self._lost += time.perf_counter() - before
        self._watchdog.beat()

    def start_profile(self, number: int) -> None:
        """Begins the trace if one is asked for; a run that goes on inside its steps traces those that are left."""
        first, last = self._config.run.profile or (0, -1)
        if first <= number <= last and not self._traces:
            jax.profiler.start_trace(str(run_path(self._workdir) / "profile"))
            self._traces = True

    def stop_profile(self, number: int | None = None) -> None:
        """Writes the trace behind its last step, or now."""
        if self._traces and (number is None or number == self._config.run.profile[1]):
            self._traces = False
            jax.block_until_ready(self._pending)
            jax.profiler.stop_trace()


def _require_finite(
    fetched: list[tuple[int, dict[str, float]]], workdir: str | Path, checkpoints: Checkpoints
) -> None:
    for number, metrics in fetched:
        if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics.get("grad_norm", 0.0)):
            checkpoints.wait()
            kept = "no checkpoint was written before it" if checkpoints.latest is None else (
                f"the last good checkpoint is step {checkpoints.latest} in {workdir}")
            raise NonFiniteLoss(f"step {number}: loss {metrics['loss']}, gradient norm {metrics.get('grad_norm')}; "
                                f"{kept}. Lower optimizer.learning_rate or look at this step's data.")
