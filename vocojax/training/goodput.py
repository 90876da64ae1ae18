"""Where a run's wall time goes: the time of steps, and the share of it in everything since the run first began."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vocojax.files import write_atomically
from vocojax.runs.checkpoint_files import first_line
from vocojax.runs.directory import put_aside, run_path

LOG = logging.getLogger(__name__)


class StepTimer:
    """The wall time since metrics were last logged, without the work that is no step.

    Attributes:
      waited: seconds in which the device had no work because a batch was not ready.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Counts from now on."""
        self._since, self._lost, self.waited = time.perf_counter(), 0.0, 0.0

    @contextmanager
    def other_work(self) -> Iterator[None]:
        """Leaves the time in this context out: compilation, validations and checkpoints are no steps."""
        before = time.perf_counter()
        yield
        self._lost += time.perf_counter() - before

    @contextmanager
    def waiting(self, idle: Callable[[], bool]) -> Iterator[None]:
        """Counts the time in this context as waited if at its end `idle()` says that the device has no work."""
        before = time.perf_counter()
        yield
        if idle():
            self.waited += time.perf_counter() - before

    def seconds_of_steps(self) -> float:
        """Returns the seconds that went into steps, waiting included."""
        return max(time.perf_counter() - self._since - self._lost, 1e-9)


class Goodput:
    """The share of a run's wall time that went into steps it still has, interruptions and restarts included.

    Useful seconds are those of steps: no compilation, waiting for data or saving, and no step that is taken again.
    WORKDIR/goodput.json holds when the run first began, how often it was started, and the last figures. Useful seconds
    are saved in checkpoints, so that steps which a restart takes again are counted once.

    Args:
      workdir: the run's directory.
      useful: seconds at the checkpoint that the run resumes from; 0 for a new run.
      clock: seconds since 1970.
    """

    def __init__(self, workdir: str | Path, useful: float = 0.0, clock: Callable[[], float] = time.time):
        self._path, self._clock, self.useful = run_path(workdir) / "goodput.json", clock, useful
        began, starts = self._read() if self._path.exists() else (clock(), 0)
        self._began, self._starts = began, starts + 1

    def _read(self) -> tuple[float, int]:
        """Reads when the run first began, and how often it was started; a damaged file is put aside."""
        try:
            values = json.loads(self._path.read_text())
            began, starts = float(values["began"]), int(values["starts"])
            if not 0 < began <= self._clock() or starts < 0:
                raise ValueError(f"began {began}, starts {starts}")
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            LOG.warning("%s: is damaged (%s), moved to %s; goodput counts from now on", self._path, first_line(error),
                        put_aside(self._path))
            return self._clock(), 0
        return began, starts

    def count(self, seconds: float) -> None:
        """Adds seconds that went into steps since the last call."""
        self.useful += max(seconds, 0.0)

    @property
    def share(self) -> float:
        """Useful seconds divided by those since the run first began."""
        return self.useful / max(self._clock() - self._began, 1e-9)

    def write(self, step: int) -> None:
        """Replaces goodput.json."""
        figures = {"began": self._began, "starts": self._starts, "step": step, "useful_seconds": self.useful,
                   "wall_seconds": self._clock() - self._began, "goodput": self.share}
        write_atomically(self._path, json.dumps(figures, indent=2) + "\n")
