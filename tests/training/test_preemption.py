"""SIGTERM at moments when there is nothing to save, and the agreement of several processes on where to stop."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A worker that is terminated leaves the process alone; then one call that no handler of Python's can interrupt.
BUSY = """
import hashlib, os, signal, time
from vocojax.parallel.preemption import StopRequest, leave_on_sigterm
leave_on_sigterm(75)
worker = os.fork()
if worker == 0:
    time.sleep(60)
    os._exit(0)
time.sleep(0.5)
os.kill(worker, signal.SIGTERM)
assert os.WTERMSIG(os.waitpid(worker, 0)[1]) == signal.SIGTERM
stop = StopRequest()
with stop.listening():
    assert not stop.reached()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    assert stop.reached()
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
# A signal that the thread has not got to when another handler comes: no other thread runs unless this one waits.
HANDED_OVER = """
import os, signal, sys, time
import jax
from vocojax.parallel.preemption import StopRequest, handed_to_jax, leave_on_sigterm
jax.process_count()
leave_on_sigterm(7)
sys.setswitchinterval(100)
os.kill(os.getpid(), signal.SIGTERM)
if sys.argv[1] == "run":
    stop = StopRequest()
    with stop.listening():
        time.sleep(0.5)
        print(stop.reached())
else:
    told = []
    with handed_to_jax():
        signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    time.sleep(0.5)
    print(*told)
"""
# A run that ends by an error, or because it was asked to, and gets a signal as its last checkpoint is being written.
ENDING = """
import os, signal, sys, time
import jax
from vocojax.parallel.preemption import Preempted, StopRequest, leave_on_sigterm
leave_on_sigterm(75)
try:
    with StopRequest().listening():
        raise Preempted() if sys.argv[1] == "stop" else ValueError()
finally:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
"""
# One of two processes, which asks every 10 ms, at first after some time, until it is to stop.
ASKING = """
import sys, time
from vocojax.parallel import cluster
from vocojax.parallel.preemption import StopRequest, leave_on_sigterm
address, index, wait = sys.argv[1:]
leave_on_sigterm(1)
cluster.initialize(cluster.Cluster(address, 2, int(index)), 60, 10)
print("joined", flush=True)
time.sleep(float(wait))
stop, asked = StopRequest(), 1
while not stop.reached():
    asked += 1
    if asked == 20:
        print("under way", flush=True)
    time.sleep(0.01 * (1 + int(index)))
print(asked, flush=True)
"""


def python(script, *arguments):
    return subprocess.Popen([sys.executable, "-c", script, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "JAX_PLATFORMS": "cpu"})


def test_it_ends_at_once_with_the_status_asked_for_whatever_the_main_thread_is_at():
    with python(BUSY) as process:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 75
        assert "SIGTERM: nothing new to save; run the same command to start again" in process.stderr.read()


@pytest.mark.parametrize("to", ["run", "jax"])
def test_a_signal_that_comes_as_the_handlers_change_is_not_lost(to):
    with python(HANDED_OVER, to) as process:
        out, errors = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "True\n"), errors


@pytest.mark.parametrize(("by", "status"), [("error", 1), ("stop", 75)])
def test_a_run_that_failed_ends_with_its_own_status(by, status):
    with python(ENDING, by) as process:
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == status, errors
        assert ("ValueError" in errors) == (by == "error")


@pytest.mark.parametrize(("wait", "told_at"), [("2.5", "joined"), ("0", "under way")])
def test_two_processes_stop_in_the_same_place(wait, told_at):
    """Also if one gets the signal before any had asked: both then stop the first time that they ask."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with python(ASKING, address, "0", wait) as one, python(ASKING, address, "1", wait) as other:
        for line in other.stdout:
            if line.strip() == told_at:
                other.send_signal(signal.SIGTERM)
                break
        stopped = [process.communicate(timeout=60)[0].split()[-1] for process in (one, other)]
        assert (one.returncode, other.returncode) == (0, 0)
    assert stopped[0] == stopped[1]
    assert (stopped[0] == "1") == (told_at == "joined")
