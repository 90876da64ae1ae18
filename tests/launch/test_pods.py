"""launch/tpu_pod.sh: its commands, its mistakes, and a pod from nothing to a resumed run with stand-ins."""

import os
import signal

import pytest

from tests.helpers.scripts import GOLDEN, LAUNCH, bash, executable, wait_for

POD = {"POD": "voco", "TPU_TYPE": "v5litepod-16", "ZONE": "us-west4-a"}


def test_pod_commands_are_those_of_the_golden_file():
    lines = []
    run = ["run", "--config=configs/voco.py", "--workdir=gs://b/voco", "--config.name=two words"]
    resume = ["resume", "--config=c", "--workdir=w"]
    for arguments in (["create"], ["install"], run, ["tail"], ["stop"], resume, ["delete"]):
        done = bash("launch/tpu_pod.sh", "--dry-run", *arguments, environment={
            **POD, "PROJECT": "p", "SPOT": "1", "CREATE_ARGS": "--data-disk=source=d,mode=read-only --reserved",
            "SETUP": "mountpoint -q /data || sudo mount /dev/sdb /data"})
        assert done.returncode == 0, done.stderr
        lines.append(f"# {' '.join(arguments)}\n{done.stdout}")
    assert "\n".join(lines) == (GOLDEN / "tpu_pod_dry_run.txt").read_text()


@pytest.mark.parametrize(("arguments", "changes", "message"), [
    (["create"], {"ZONE": ""}, "ZONE: is where it is"),
    (["create"], {"TPU_TYPE": "v3-8"}, "TPU_TYPE must begin with v4-, v5litepod-, v5p- or v6e-, got v3-8"),
    (["run"], {}, "run needs launch/train.py's arguments"),
    (["run", "--config.name=x", "--workdir=w"], {}, "run needs launch/train.py's arguments"),
    (["resume", "--config=c"], {}, "resume needs launch/train.py's arguments: --config=... --workdir=..."),
    (["run", "now", "--config=c", "--workdir=w"], {}, "unexpected argument: now"),
    (["run", "--config=c", "--workdir=w", "--dry_run"], {}, "it is written --dry-run"),
    (["begin"], {}, "bash launch/tpu_pod.sh create"),
    ([], {}, "bash launch/tpu_pod.sh create"),
])
def test_pod_mistakes(arguments, changes, message):
    done = bash("launch/tpu_pod.sh", *arguments, environment=POD | changes)
    assert done.returncode != 0 and message in done.stderr and done.stdout == ""


@pytest.mark.parametrize("arguments", [["create"], ["install"], ["tail"], ["stop"], ["delete"],
                                       ["run", "--config=c", "--workdir=w"], ["resume", "--config=c", "--workdir=w"]])
def test_a_dry_run_runs_nothing_wherever_it_is_asked_for(arguments, tmp_path):
    """Whatever would reach the cloud is a program that leaves a trace."""
    for program in ("gcloud", "git"):
        executable(tmp_path / "bin" / program, f"#!/usr/bin/env bash\necho {program} >> {tmp_path}/ran\n")
    environment = {**POD, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    printed = set()
    for place in range(len(arguments) + 1):
        words = [*arguments[:place], "--dry-run", *arguments[place:]]
        done = bash("launch/tpu_pod.sh", *words, environment=environment)
        assert done.returncode == 0 and "gcloud compute tpus tpu-vm" in done.stdout, done.stderr
        printed.add(done.stdout)
    assert len(printed) == 1 and "--dry-run" not in printed.pop() and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("verb", ["create", "install", "tail", "stop", "delete"])
@pytest.mark.parametrize("stray", ["now", "--force", "--dry_run", "--dry-run=1", "--dryrun", "-n"])
def test_a_stray_argument_is_an_error_and_nothing_is_done(verb, stray, tmp_path):
    executable(tmp_path / "bin" / "gcloud", f"#!/usr/bin/env bash\ntouch {tmp_path}/ran\n")
    done = bash("launch/tpu_pod.sh", verb, stray, environment={
        **POD, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})
    assert done.returncode == 2 and stray in done.stderr and not (tmp_path / "ran").exists()


# What runs where gcloud would: copies to and commands on a machine whose home is $HOME.
GCLOUD = r"""#!/usr/bin/env bash
echo "$*" >> "$HOME/calls"
case "$4" in
    scp) cp "$5" "$HOME/${6#*:}" ;;
    list) cat "$HOME/state" 2>/dev/null || true ;;
    create) echo READY > "$HOME/state" ;;
    delete) rm -r "$HOME/state" "$HOME/vocojax" ;;
    ssh) cd "$HOME"; for word in "$@"; do case $word in --command=*) exec bash -c "${word#--command=}" ;; esac; done ;;
esac
"""
GIT = r"""#!/usr/bin/env bash
exec tar -czf "${3#--output=}" launch
"""
# The worker's Python: pip and uv do nothing but make .venv, training writes down what it got and waits to be stopped.
PYTHON = r"""#!/usr/bin/env bash
case "$*" in
    "-m uv venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    "-m "*) ;;
    *)  trap 'sleep 1; echo saved; exit 0' TERM; printf '<%s>' "$@"; echo " $LIBTPU_INIT_ARGS"
        while :; do sleep 0.1; done ;;
esac
"""


def test_a_pod_from_nothing_to_a_resumed_run(tmp_path):
    """The remote commands themselves, run where they would run but for gcloud and Python."""
    executable(tmp_path / "bin" / "gcloud", GCLOUD)
    executable(tmp_path / "bin" / "git", GIT)
    executable(tmp_path / "bin" / "python3", PYTHON)
    environment = {**POD, "SETUP": "touch mounted", "HOME": str(tmp_path),
                   "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    pod = lambda *arguments: bash(LAUNCH / "tpu_pod.sh", *arguments, environment=environment)
    log, pid = tmp_path / "vocojax" / "run.log", tmp_path / "vocojax" / "run.pid"
    assert pod("resume", "--config=c.py", "--workdir=gs://b", "--config.name=it's two").returncode == 0
    assert (tmp_path / "vocojax" / "mounted").exists()
    verbs = [line.split()[3] for line in (tmp_path / "calls").read_text().splitlines()]
    assert verbs == ["list", "create", "scp", "ssh", "ssh"]
    try:
        wait_for(lambda: log.exists() and log.read_text())
        assert log.read_text().startswith("<launch/train.py><--config=c.py><--workdir=gs://b>"
                                          "<--config.name=it's two> --xla_enable_async_all_gather=true")
        assert "--xla_jf_spmd_threshold_for_windowed_einsum_mib=100000" in log.read_text()
        again = pod("run", "--config=c.py", "--workdir=gs://b")
        assert again.returncode == 1 and "a run is on already" in again.stderr
        assert pod("stop").returncode == 0
        assert log.read_text().endswith("saved\n")  # it has been waited for
        assert pod("stop").stdout == "no run is on\n"
        pid.write_text(str(os.getpid()))  # a number that is another's by now
        assert pod("stop").stdout == "no run is on\n"
        for state in ("CREATING", "REPAIRING", "STOPPED"):
            (tmp_path / "state").write_text(f"{state}\n")
            refused = pod("resume", "--config=c.py", "--workdir=gs://b")
            assert refused.returncode == 1 and f"voco is {state}, nothing was done" in refused.stderr
            assert log.exists() and (tmp_path / "calls").read_text().splitlines()[-1].split()[3] == "list"
        (tmp_path / "state").write_text("PREEMPTED\n")
        assert pod("resume", "--config=c.py", "--workdir=gs://b").returncode == 0
        verbs = [line.split()[3] for line in (tmp_path / "calls").read_text().splitlines()][-6:]
        assert verbs == ["list", "delete", "create", "scp", "ssh", "ssh"]
        assert (tmp_path / "vocojax" / "mounted").exists()
        wait_for(lambda: log.exists() and "<--config=c.py><--workdir=gs://b> " in log.read_text())
    finally:
        if int(pid.read_text()) != os.getpid():
            os.kill(int(pid.read_text()), signal.SIGTERM)
    wait_for(lambda: "saved" in log.read_text())
