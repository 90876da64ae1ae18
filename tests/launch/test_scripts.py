"""The shell for SLURM, Kubernetes and this machine: sound, and doing what it says as far as that shows here."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.helpers.scripts import LAUNCH, ROOT, bash, executable, wait_for

SHELL = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def shellcheck(text):
    command = [SHELLCHECK, "--external-sources", "--source-path", str(ROOT), "-"]
    return subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_scripts_are_sound(script):
    assert bash("-n", script).returncode == 0
    assert shellcheck(script.read_text()) == ""


def test_style_is_checked_the_same_way_whatever_lies_in_the_checkout(tmp_path):
    """The command of launch/test.sh, where the quickstart's runs and directories named like packages are."""
    (command,) = re.findall(r"^\.venv/bin/(ruff check .*)$", (LAUNCH / "test.sh").read_text(), re.MULTILINE)
    names = command.split()[2:]
    assert {"vocojax", "configs", "launch", "tests"} <= set(names)
    for name in ("launch", "tests", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in ("runs", "jax", "numpy", "pytest", "absl"):  # imports of theirs would be sorted as this project's own
        executable(tmp_path / name / "faulty.py", "import os, sys")
    ruff = [Path(sys.executable).with_name("ruff"), "check", "--no-cache", *sorted({"launch", "tests", "configs"})]
    done = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def jobset():
    return yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


def test_jobset():
    """What in it must agree."""
    manifest = jobset()
    (jobs,) = manifest["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    topology = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    machines = topology // chips
    assert job["parallelism"] == job["completions"] == int(variables["JAX_NUM_PROCESSES"]) == machines > 1
    assert f"--config.mesh.fsdp={topology}" in container["args"]
    host, port = variables["JAX_COORDINATOR_ADDRESS"].split(":")
    name = manifest["metadata"]["name"]
    assert host == f"{name}-{jobs['name']}-0-0.{name}" and manifest["spec"]["network"]["enableDNSHostnames"]
    assert int(port) in {entry["containerPort"] for entry in container["ports"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    # A pod that ends restarts all of them, not itself.
    assert (job["completionMode"], job["backoffLimit"], pod["restartPolicy"]) == ("Indexed", 0, "Never")
    # A mistake ends the whole set; every other failure starts it again.
    (on_mistake,) = job["podFailurePolicy"]["rules"]
    assert on_mistake["onExitCodes"] == {"containerName": "train", "operator": "In",
                                         "values": [int(variables["VOCOJAX_MISTAKE_STATUS"])]}
    assert on_mistake["action"] == "FailJob" and manifest["spec"]["failurePolicy"]["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    assert "kueue.x-k8s.io/queue-name" in manifest["metadata"]["labels"]
    annotations = job["template"]["metadata"]["annotations"]
    assert {f"gke-gcsfuse/{limit}-limit" for limit in ("cpu", "memory", "ephemeral-storage")} <= annotations.keys()
    (bucket,) = (volume["csi"] for volume in pod["volumes"] if "csi" in volume)
    assert bucket["volumeAttributes"]["mountOptions"] == "implicit-dirs"
    head = (LAUNCH / "gke_jobset.yaml").read_text().split("apiVersion")[0]
    assert f"kubectl delete jobset {name}" in head and f"jobset-name={name}," in head
    assert "serviceAccountName" in pod and "service account" in head
    assert container["command"] == ["bash", "-c"]
    assert shellcheck("#!/usr/bin/env bash\n" + container["args"][0]) == ""


def test_the_dockerfile_is_sound():
    """Known instructions, a pinned base, files that are there, and everything that training needs."""
    lines = [line for line in (LAUNCH / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    instructions = [tuple(line.split(maxsplit=1)) for line in lines]
    assert {word for word, _ in instructions} <= {"FROM", "WORKDIR", "COPY", "RUN", "ENV"}
    assert instructions[0][0] == "FROM" and re.fullmatch(r"python:3\.1\d\.\d+-slim-\w+", instructions[0][1])
    copied = [word for kind, rest in instructions if kind == "COPY" for word in rest.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert {"requirements.lock", "setup.py", "README.md", "vocojax", "configs", "launch"} <= set(copied)
    for kind, rest in instructions:
        if kind == "RUN":
            assert shellcheck(f"#!/bin/sh\n{rest}\n") == ""
            assert "--no-cache-dir" in rest and "--constraint requirements.lock" in rest


def test_scripts_of_ones_own_machine_run_with_macos_tools():
    """macOS has bash 3.2 and BSD's tools."""
    newer = (r"@Q\}|declare -[Ag]|local -n|mapfile|readarray|,,\}|\^\^\}|wait -n|;;&|"  # bash
             r"--suffix|sed -i|readlink -f|grep -P|date -d")  # GNU
    for name in ("tpu_pod.sh", "quickstart.sh", "test.sh"):
        assert not re.findall(newer, (LAUNCH / name).read_text()), name
    assert "needs bash >= 5.1, this is $BASH_VERSION (on macOS: brew install bash)" in (
        LAUNCH / "local_multiprocess.sh").read_text()


# launch/train.py as the scripts around it see it: it runs until SIGTERM, saves, and ends with the status asked for.
TRAINING = r"""#!/usr/bin/env bash
echo "$@" > arguments
stopped=0
for word in "$@"; do case $word in --stopped_status=*) stopped=${word#*=} ;; esac; done
trap 'echo saved >> saved; exit "$stopped"' TERM
echo $$ > task
[ -z "$ENDS" ] || exit "$ENDS"
while :; do sleep 0.1; done
"""


@pytest.mark.parametrize(("ends", "status"), [("0", 0), ("7", 7), ("", 143)])
def test_a_pod_that_was_told_to_stop_is_no_finished_job(tmp_path, ends, status):
    arguments = jobset()["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["args"]
    executable(tmp_path / "bin" / "python", TRAINING)
    (tmp_path / "launch").mkdir()
    shutil.copy(LAUNCH / "xla_flags.sh", tmp_path / "launch")
    pod = subprocess.Popen(["bash", "-c", *arguments], cwd=tmp_path,
                           env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "ENDS": ends})
    if not ends:
        wait_for(lambda: (tmp_path / "task").exists())
        pod.send_signal(signal.SIGTERM)
    assert pod.wait(timeout=30) == status
    assert (tmp_path / "saved").exists() == (not ends)
    assert (tmp_path / "arguments").read_text().startswith(
        "launch/train.py --stopped_status=143 --config=configs/voco.py --workdir=gs://")


# Like SLURM's own, srun kills its task when it gets SIGTERM itself; scancel signals the task.
SRUN = r"""#!/usr/bin/env bash
echo "$@" > srun
while [ "$1" != .venv/bin/python ]; do shift; done
shift
./training "$@" &
task=$!
trap 'kill -KILL $task; echo "srun: forcing job termination" >&2; exit 137' TERM
wait $task
"""
SCANCEL = '#!/usr/bin/env bash\necho "$@" > scancel\nkill -TERM "$(cat task)"\n'


@pytest.mark.parametrize(("ends", "told", "status", "requeued"), [
    ("0", None, 0, False), ("3", None, 3, False), ("", "script", 0, True), ("", "tasks", 0, True)])
def test_a_slurm_job_that_was_told_to_stop_goes_back_to_the_queue(tmp_path, ends, told, status, requeued):
    """Near its time limit SLURM tells the script, at preemption the tasks."""
    executable(tmp_path / "training", TRAINING)
    executable(tmp_path / "bin" / "srun", SRUN)
    executable(tmp_path / "bin" / "scancel", SCANCEL)
    executable(tmp_path / "bin" / "scontrol", '#!/usr/bin/env bash\necho "$@" > scontrol\n')
    job = slurm_job(tmp_path, ENDS=ends)
    if told:
        wait_for(lambda: (tmp_path / "task").exists() and (tmp_path / "task").read_text())
        os.kill(job.pid if told == "script" else int((tmp_path / "task").read_text()), signal.SIGTERM)
    assert job.wait(timeout=30) == status
    assert (tmp_path / "srun").read_text().startswith("--cpus-per-task=12 --kill-on-bad-exit=0 ")
    assert (tmp_path / "arguments").read_text() == "launch/train.py --stopped_status=75 --config=c.py --workdir=w\n"
    assert (tmp_path / "saved").exists() == requeued
    assert (tmp_path / "scontrol").exists() == requeued
    assert not requeued or (tmp_path / "scontrol").read_text() == "requeue incomplete 42\n"
    if told == "script":
        assert (tmp_path / "scancel").read_text() == "--signal=TERM 42\n"


def test_a_slurm_job_of_an_unknown_generation_does_not_start(tmp_path):
    executable(tmp_path / "bin" / "srun", SRUN)
    assert slurm_job(tmp_path, GENERATION="a100").wait(timeout=30) == 2
    assert not (tmp_path / "srun").exists()


def slurm_job(directory, **environment):
    (directory / "launch").mkdir()
    shutil.copy(LAUNCH / "xla_flags.sh", directory / "launch")
    return subprocess.Popen(["bash", str(LAUNCH / "slurm.sbatch"), "--config=c.py", "--workdir=w"], env={
        "PATH": f"{directory / 'bin'}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(directory), "SLURM_JOB_ID": "42",
        "SLURM_CPUS_PER_TASK": "12", **environment})


def local(number, script, **environment):
    return bash(LAUNCH / "local_multiprocess.sh", number, "bash", "-c", script, environment=environment)


def test_local_processes_know_who_they_are():
    done = local(3, 'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS"')
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    port = lines[0].rpartition(":")[2]
    assert 1024 < int(port) < 65536
    assert lines == [f"{who} of 3 at 127.0.0.1:{port}" for who in ("0", "[1] 1", "[2] 2")]


def test_one_local_failure_ends_all_with_its_status():
    began = time.monotonic()
    done = local(3, """if [ $JAX_PROCESS_ID = 1 ]; then sleep 1; exit 5; fi
                       trap "echo told; exit 0" TERM; while :; do sleep 0.1; done""")
    assert done.returncode == 5 and time.monotonic() - began < 20
    assert sorted(done.stdout.splitlines()) == ["[2] told", "told"]
    assert "process 1 of 3 ended with status 5" in done.stderr


def test_a_local_process_that_does_not_stop_is_killed():
    began = time.monotonic()
    done = local(2, """if [ $JAX_PROCESS_ID = 1 ]; then sleep 0.5; exit 5; fi
                       trap "" TERM; for i in {1..90}; do sleep 0.5; done""", GRACE_SECONDS="1")
    assert done.returncode == 5 and time.monotonic() - began < 20


def test_signals_reach_local_processes(tmp_path):
    script = f'trap "echo saved; exit 0" TERM; touch {tmp_path}/$JAX_PROCESS_ID; while :; do sleep 0.1; done'
    run = subprocess.Popen(["bash", str(LAUNCH / "local_multiprocess.sh"), "2", "bash", "-c", script],
                           stdout=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
    run.send_signal(signal.SIGTERM)
    assert sorted(run.communicate(timeout=30)[0].splitlines()) == ["[1] saved", "saved"]
    assert run.returncode == 0


@pytest.mark.parametrize("arguments", [[], ["2"], ["0", "true"], ["two", "true"]])
def test_local_usage(arguments):
    done = bash(LAUNCH / "local_multiprocess.sh", *arguments)
    assert done.returncode == 2 and done.stderr.startswith("usage: bash launch/local_multiprocess.sh NUMBER COMMAND")


HELLO = """
import jax, jax.numpy as jnp
from jax._src.xla_bridge import CUDA_VISIBLE_DEVICES
from jax.experimental import multihost_utils
from vocojax.parallel import cluster
cluster.initialize(cluster.find_cluster())
total = int(multihost_utils.process_allgather(jnp.array(jax.process_index() + 1)).sum())
print("sum", total, "on GPU", CUDA_VISIBLE_DEVICES.value)
"""


@pytest.mark.slow
def test_two_jax_processes_meet():
    """And each would have a GPU of its own."""
    done = bash(LAUNCH / "local_multiprocess.sh", 2, sys.executable, "-c", HELLO, environment={"JAX_PLATFORMS": "cpu"})
    said = [line for line in sorted(done.stdout.splitlines()) if "sum" in line]
    assert said == ["[1] sum 3 on GPU 1", "sum 3 on GPU 0"], done.stderr


def flags(generation, variable, **environment):
    done = bash("-c", f'. launch/xla_flags.sh {generation} && echo "${variable}"', environment=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_own_flags_come_last():
    assert flags("v5p", "LIBTPU_INIT_ARGS", LIBTPU_INIT_ARGS="--mine=1")[-1] == "--mine=1"
    assert flags("v5p", "XLA_FLAGS", XLA_FLAGS="--mine=1") == ["--mine=1"]
    assert flags("h100", "XLA_FLAGS", XLA_FLAGS="--mine=1")[-1] == "--mine=1"
    refused = bash("-c", ". launch/xla_flags.sh v3; echo on")
    assert "the generation must be v4, v5e, v5p, v6e, tpu7x or h100, got 'v3'" in refused.stderr


def jax_with(code, **environment):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu", **environment})


def test_the_gpu_flags_are_jaxlibs():
    ours = " ".join(flags("h100", "XLA_FLAGS"))
    assert jax_with("import jax; jax.devices()", XLA_FLAGS=ours).returncode == 0
    wrong = jax_with("import jax; jax.devices()", XLA_FLAGS=ours + " --xla_gpu_no_such_flag=1")
    assert wrong.returncode != 0 and "no_such_flag" in wrong.stderr


COMPILE = """
import sys, jax, jax.numpy as jnp
from jax.experimental import topologies
device = jax.sharding.SingleDeviceSharding(topologies.get_topology_desc(sys.argv[1], "tpu").devices[0])
jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=device)).compile()
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("generation", "topology"),
                         [("v4", "v4:2x2x1"), ("v5e", "v5e:2x2"), ("v5p", "v5p:2x2x1"), ("v6e", "v6e:2x2"),
                          ("tpu7x", "tpu7x:2x2x1")])
def test_the_tpu_flags_are_libtpus(generation, topology):
    pytest.importorskip("libtpu")
    ours = " ".join(flags(generation, "LIBTPU_INIT_ARGS"))
    code = COMPILE.replace("sys.argv[1]", repr(topology))
    tpu = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = jax_with(code, LIBTPU_INIT_ARGS=ours, **tpu)
    assert done.stdout == "compiled\n", done.stderr
    assert jax_with(code, LIBTPU_INIT_ARGS=ours + " --xla_tpu_no_such_flag=1", **tpu).stdout != "compiled\n"
