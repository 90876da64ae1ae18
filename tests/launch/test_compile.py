"""The command line of the compile report: what it refuses before anything is compiled, and a search that is ended."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG, TOPOLOGY = "--config=configs/quickstart.py", "--topology=v5e:2x2"


def start(*arguments, **environment):
    return subprocess.Popen([sys.executable, "launch/compile_report.py", *arguments], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment})


def test_a_report_does_not_overwrite_a_search(tmp_path):
    search = tmp_path / "search.json"
    search.write_text(text := json.dumps({"question": {}, "reports": [], "skipped": []}))
    child = start(CONFIG, TOPOLOGY, f"--json={search}")
    output, errors = child.communicate(timeout=120)
    assert child.returncode == 1 and output == ""
    assert errors.startswith("error: json must name another file: ") and errors.count("\n") == 1
    assert search.read_text() == text


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu (extra `tpu`)")
@pytest.mark.slow
def test_a_search_that_is_ended_leaves_nothing_behind_and_goes_on(tmp_path):
    temporary, path = tmp_path / "temporary", tmp_path / "search.json"
    temporary.mkdir()
    command = [CONFIG, TOPOLOGY, "--search", "--policies=full,none", "--rows=1", "--meshes=1x4x1", f"--json={path}"]
    search = start(*command, TMPDIR=str(temporary))
    compiling = lambda: [pid for pid in filter(str.isdecimal, os.listdir("/proc")) if str(temporary) in arguments(pid)]
    while not (path.exists() and compiling()):  # the second of two
        assert search.poll() is None, search.communicate()[1]
        time.sleep(0.1)
    search.send_signal(signal.SIGTERM)
    _, errors = search.communicate(timeout=60)
    assert search.returncode == 1 and errors.endswith("ended; run the same command to resume\n"), errors
    assert not compiling() and not list(temporary.iterdir())
    (first,) = json.loads(path.read_text())["reports"]
    search = start(*command, TMPDIR=str(temporary))
    _, errors = search.communicate(timeout=300)
    reports = json.loads(path.read_text())["reports"]
    assert search.returncode == 0 and len(reports) == 2 and first in reports, errors
    assert all(report["fits"] for report in reports)


def arguments(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # it has ended
        return ""
