"""Tells when a run hangs: the stacks of all threads of the process, on standard error."""

import faulthandler
import sys
from typing import TextIO


class Watchdog:
    """Dumps the stacks of all threads whenever `beat` has not been called for so many seconds.

    The timer is C's, so it fires although a thread holds the interpreter's lock. On a pod the process whose main thread
    is not in a collective is the one that the others wait for.

    Args:
      seconds: the limit; counts from the first beat.
      file: with a file descriptor; standard error by default.
    """

    def __init__(self, seconds: float, file: TextIO | None = None):
        self._seconds, self._file = seconds, file

    def beat(self) -> None:
        """Work goes on; starts the clock again."""
        faulthandler.dump_traceback_later(self._seconds, repeat=True, file=self._file or sys.__stderr__ or sys.stderr)

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
