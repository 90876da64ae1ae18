"""The command line of training: what it refuses before anything is loaded, and the status it ends with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vocojax.parallel.cluster import ClusterError, find_cluster

ROOT = Path(__file__).parents[2]
# launch/train.py with a training that is told to stop at once.
STOPPED = """
import runpy, sys
from vocojax.parallel import preemption
from vocojax.training import stage
def train(config, workdir, **_):
    raise preemption.Preempted(f"{workdir}: stopped and saved")
stage.train = train
sys.argv[0] = "launch/train.py"
runpy.run_path("launch/train.py", run_name="__main__")
"""


# And with one that never comes to its first step: it is within a call that does not return to the interpreter.
BUSY = STOPPED.replace('raise preemption.Preempted(f"{workdir}: stopped and saved")', """
    import hashlib, os, signal, threading
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)""")


def python(*arguments):
    stage = ["--config=configs/voco.py", "--workdir=runs/none", "--config.data.path=none.json",
             "--config.data.image_root=none", "--config.data.tokenizer=none", "--config.init_from=none"]
    return subprocess.run([sys.executable, *arguments, *stage], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"})


def test_a_stopped_run_ends_with_the_status_asked_for():
    done = python("-c", STOPPED, "--stopped_status=75")
    assert done.returncode == 75 and "runs/none: stopped and saved" in done.stderr, done.stderr


def test_so_does_one_told_before_its_first_step():
    done = python("-c", BUSY, "--stopped_status=75")
    assert done.returncode == 75 and "SIGTERM: nothing new to save" in done.stderr, done.stderr


@pytest.mark.parametrize(("told", "environment", "message"), [
    ({"process_id": 1}, {}, r"must be given together, got None, None and 1.*JAX_COORDINATOR_ADDRESS"),
    ({}, {"JAX_PROCESS_ID": "1"}, r"must be given together, got None, None and 1"),
    ({}, {"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES must be a whole number, got 'four'"),
    ({}, {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID must be a whole number, got '-1'"),
    ({}, {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "x"},
     "JOB_COMPLETION_INDEX must be a whole number, got 'x'"),
])
def test_a_process_that_is_half_told_who_it_is_does_not_run_on_its_own(told, environment, message):
    with pytest.raises(ClusterError, match=message):
        find_cluster(**told, environment=environment)
