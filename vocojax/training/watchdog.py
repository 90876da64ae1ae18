"""Shows when a run hangs: the stacks of all threads of the process, on standard error."""

import faulthandler
import sys
from typing import TextIO


class Watchdog:
    """A timer that dumps the stacks of all threads whenever `beat` has not been called for some time; a context.

    The timer is C's, so it fires even if a thread holds the interpreter's lock. On a pod, the process whose main thread
    is not in a collective is the one that the others wait for.

    Args:
      seconds: the limit, from the first beat on.
      file: where to write, with a file descriptor; standard error by default.
    """

    def __init__(self, seconds: float, file: TextIO | None = None):
        self._seconds, self._file = seconds, file

    def beat(self) -> None:
        """Starts the time again."""
        faulthandler.dump_traceback_later(self._seconds, repeat=True, file=self._file or sys.__stderr__ or sys.stderr)

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
