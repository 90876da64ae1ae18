"""Processes as files name them: which one writes or owns something, and whether it still lives."""

import contextlib
import hashlib
import os
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessName:
    """A process, told from every other one on any machine.

    Attributes:
      host: name of the machine, for messages.
      machine: 8 hexadecimal digits, the same for processes that see each other's ids: one kernel, one container.
      pid: its id.
      started: ticks from the machine's boot to its start, which tell it from a later process with the same id; 0 where
        the system does not say.
    """

    host: str
    machine: str
    pid: int
    started: int = 0

    @property
    def is_on_this_machine(self) -> bool:
        """True if this process could see it."""
        return self.machine == _machine()

    @property
    def is_dead(self) -> bool:
        """True if it is known to have ended. Of a process on another machine nothing is known."""
        if not self.is_on_this_machine:
            return False
        state, started = _state(self.pid)
        return state in "ZX" or bool(self.started and started and self.started != started)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def this_process() -> ProcessName:
    """Returns the name of this process."""
    return ProcessName(socket.gethostname(), _machine(), os.getpid(), _state(os.getpid())[1])


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return _digest(f"{boot} {os.stat('/proc/self/ns/pid').st_ino}")
    except OSError:  # no Linux
        return _digest(f"{socket.gethostname()} {uuid.getnode()}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _state(pid: int) -> tuple[str, int]:
    """Returns the state of a process on this machine as in /proc/PID/stat ("X" if there is none), and when it started.

    A killed process whose parent has not yet asked for its status is a "Z".
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[19])
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return "X", 0
    except PermissionError:  # another user's
        pass
    return "R", 0
