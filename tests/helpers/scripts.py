"""Scripts as tests run them: bash with an environment of its own, stand-ins for commands, and patience."""

import os
import stat
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH, GOLDEN = ROOT / "launch", ROOT / "tests" / "golden"


def bash(*arguments, environment=None, **options):
    """Runs bash with PATH and the given environment alone."""
    return subprocess.run(["bash", *map(str, arguments)], capture_output=True, text=True, timeout=60, cwd=ROOT,
                          env={"PATH": os.environ["PATH"], **(environment or {})}, **options)


def executable(path, text):
    """Writes a stand-in for a command."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def wait_for(condition, seconds=30):
    """Returns when the condition holds, and fails after some seconds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)
