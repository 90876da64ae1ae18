"""The share of a run's wall time that went into steps it still has, interruptions and restarts included."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vocojax.files import write_atomically
from vocojax.runs.directory import run_path


class Goodput:
    """Counts useful seconds: those of steps, without compilation, waiting for data, saving, and steps taken twice.

    WORKDIR/goodput.json holds when the run first began, how often it was started, and the last figures. Useful seconds
    are saved in checkpoints, so that what a restart takes again is counted once.

    Args:
      useful: seconds behind the checkpoint that the run goes on from; 0 for a new run.
      clock: seconds since 1970.
    """

    def __init__(self, workdir: str | Path, useful: float = 0.0, clock: Callable[[], float] = time.time):
        self._path, self._clock, self.useful = run_path(workdir) / "goodput.json", clock, useful
        before: dict[str, Any] = {}
        if self._path.exists():
            before = json.loads(self._path.read_text())
        self._began, self._starts = before.get("began", clock()), before.get("starts", 0) + 1

    def count(self, seconds: float) -> None:
        """Seconds that went into steps since the last call."""
        self.useful += max(seconds, 0.0)

    @property
    def share(self) -> float:
        """Useful seconds by those since the run first began."""
        return self.useful / max(self._clock() - self._began, 1e-9)

    def write(self, step: int) -> None:
        """Replaces goodput.json."""
        figures = {"began": self._began, "starts": self._starts, "step": step, "useful_seconds": self.useful,
                   "wall_seconds": self._clock() - self._began, "goodput": self.share}
        write_atomically(self._path, json.dumps(figures, indent=2) + "\n")
