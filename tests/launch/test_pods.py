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
    for arguments in (["create"], ["install"], run, ["tail"], ["stop"], resume, ["keep", *resume[1:]], ["delete"]):
        done = bash("launch/tpu_pod.sh", "--dry-run", *arguments, environment={
            **POD, "PROJECT": "p", "SPOT": "1", "CREATE_ARGS": "--data-disk=source=d,mode=read-only --labels=team=voco",
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


@pytest.mark.parametrize("variables", [{}, {"QUEUED": "1", "DATA_DISK": "d", "TPU_TYPE": "v6e-16"}])
@pytest.mark.parametrize("arguments", [["create"], ["install"], ["tail"], ["stop"], ["delete"],
                                       ["keep", "--config=c", "--workdir=w"],
                                       ["run", "--config=c", "--workdir=w"], ["resume", "--config=c", "--workdir=w"]])
def test_a_dry_run_runs_nothing_wherever_it_is_asked_for(arguments, variables, tmp_path):
    """Whatever would reach the cloud is a program that leaves a trace."""
    for program in ("gcloud", "git", "ssh-add"):
        executable(tmp_path / "bin" / program, f"#!/usr/bin/env bash\necho {program} >> {tmp_path}/ran\n")
    environment = {**POD, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **variables}
    printed = set()
    for place in range(len(arguments) + 1):
        words = [*arguments[:place], "--dry-run", *arguments[place:]]
        done = bash("launch/tpu_pod.sh", *words, environment=environment)
        assert done.returncode == 0 and "gcloud compute tpus " in done.stdout, done.stderr
        printed.add(done.stdout)
    assert len(printed) == 1 and "--dry-run" not in printed.pop() and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("verb", ["create", "install", "tail", "stop", "delete"])
@pytest.mark.parametrize("stray", ["now", "--force", "--dry_run", "--dry-run=1", "--dryrun", "-n"])
def test_a_stray_argument_is_an_error_and_nothing_is_done(verb, stray, tmp_path):
    executable(tmp_path / "bin" / "gcloud", f"#!/usr/bin/env bash\ntouch {tmp_path}/ran\n")
    done = bash("launch/tpu_pod.sh", verb, stray, environment={
        **POD, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})
    assert done.returncode == 2 and stray in done.stderr and not (tmp_path / "ran").exists()


# What runs where gcloud would: copies to and commands on a machine whose home is $HOME. It records each call, knows the
# flags of each command, and says what state things are in from a list of answers, the last of which stays.
GCLOUD = r"""#!/usr/bin/env bash
echo "$*" >> "$HOME/calls"
where="--zone --project"
case "$3 $4" in
    "tpu-vm create") known="--accelerator-type --version --spot --reserved --scopes --data-disk --internal-ips" ;;
    "queued-resources create") known="--node-id --node-count --node-prefix --accelerator-type --runtime-version --spot \
--reserved --scopes --data-disk --internal-ips" ;;
    "tpu-vm ssh") known="--worker --command --tunnel-through-iap --internal-ip" ;;
    "tpu-vm scp") known="--worker --tunnel-through-iap --internal-ip" ;;
    *" list") known="--filter --format" ;;
    "tpu-vm delete") known="--quiet" ;;
    "queued-resources delete") known="--quiet --force" ;;
    *) [ "$1 $2 $3" = "compute disks describe" ] || { echo "gcloud: unknown command $*" >&2; exit 2; }
       known="--format" ;;
esac
for word in "$@"; do
    [[ $word != --* || " $where $known " == *" ${word%%=*} "* ]] || { echo "gcloud: unknown $word" >&2; exit 2; }
done
case "$4" in
    scp) cp "$5" "$HOME/${6#*:}" ;;
    list) head -n 1 "$HOME/state" 2>/dev/null
          [ "$(wc -l < "$HOME/state" 2>/dev/null || echo 0)" -lt 2 ] || sed 1d "$HOME/state" > "$HOME/next"
          [ ! -f "$HOME/next" ] || mv "$HOME/next" "$HOME/state" ;;
    create) [ -f "$HOME/state" ] || echo READY > "$HOME/state" ;;
    delete) rm -rf "$HOME/vocojax"; [ -f "$HOME/scripted" ] || rm "$HOME/state" ;;
    ssh) cd "$HOME"; for word in "$@"; do case $word in --command=*) exec bash -c "${word#--command=}" ;; esac; done ;;
esac
[ "$2" != disks ] || cat "$HOME/disk"
"""
GIT = r"""#!/usr/bin/env bash
if [ "$1" = status ]; then cat "$HOME/changes" 2>/dev/null || true; exit; fi
exec tar -czf "${3#--output=}" launch
"""
# The worker's Python: pip and uv do nothing but make .venv, training writes down what it got and waits to be stopped.
PYTHON = r"""#!/usr/bin/env bash
case "$*" in
    "-m uv venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    "-m "*) ;;
    *)  trap 'sleep 1; echo saved; exit 75' TERM; printf '<%s>' "$@"; echo " $LIBTPU_INIT_ARGS"
        if [ -f "$HOME/endings" ]; then
            ending=$(head -n 1 "$HOME/endings"); sed 1d "$HOME/endings" > "$HOME/left"; mv "$HOME/left" "$HOME/endings"
            exit "$ending"
        fi
        while :; do sleep 0.1; done ;;
esac
"""


@pytest.fixture
def pod(tmp_path):
    """Runs tpu_pod.sh with the stand-ins, in a cloud whose only machine has the directory as its home."""
    for name, text in (("gcloud", GCLOUD), ("git", GIT), ("python3", PYTHON), ("ssh-add", "#!/usr/bin/env bash\n")):
        executable(tmp_path / "bin" / name, text)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return lambda *arguments, **variables: bash(LAUNCH / "tpu_pod.sh", *arguments, environment={
        **POD, "SETUP": "touch mounted", "HOME": str(tmp_path), "PATH": path, "POLL": "0.1", **variables})


def calls(home):
    return [line.removeprefix("compute ") for line in (home / "calls").read_text().splitlines()]


def verbs_of(home):
    return [line.split()[2] for line in calls(home)]


def test_a_pod_from_nothing_to_a_resumed_run(tmp_path, pod):
    """The remote commands themselves, run where they would run but for gcloud and Python."""
    log, pid = tmp_path / "vocojax" / "run.log", tmp_path / "vocojax" / "run.pid"
    assert pod("resume", "--config=c.py", "--workdir=gs://b", "--config.name=it's two").returncode == 0
    assert (tmp_path / "vocojax" / "mounted").exists()
    assert verbs_of(tmp_path) == ["list", "create", "scp", "ssh", "ssh"]
    try:
        wait_for(lambda: log.exists() and log.read_text())
        assert log.read_text().startswith("<launch/train.py><--config=c.py><--workdir=gs://b>"
                                          "<--config.name=it's two><--stopped_status=75> --xla_enable_async_all_")
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
            assert log.exists() and verbs_of(tmp_path)[-1] == "list"
        (tmp_path / "state").write_text("PREEMPTED\n")
        assert pod("resume", "--config=c.py", "--workdir=gs://b").returncode == 0
        assert verbs_of(tmp_path)[-6:] == ["list", "delete", "create", "scp", "ssh", "ssh"]
        assert (tmp_path / "vocojax" / "mounted").exists()
        wait_for(lambda: log.exists() and "<--config=c.py><--workdir=gs://b><--stopped_status=75> " in log.read_text())
    finally:
        if int(pid.read_text()) != os.getpid():
            os.killpg(int(pid.read_text()), signal.SIGTERM)
    wait_for(lambda: "saved" in log.read_text())


TRAIN = ("--config=c.py", "--workdir=gs://b")


def test_a_queue_is_waited_for_and_a_preempted_pod_is_made_again_until_the_run_has_ended(tmp_path, pod):
    states = ["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE",  # created, waited for, installed, run
              "ACTIVE",  # the run has ended with 75: it was told to stop
              "SUSPENDED", "SUSPENDED", "ACTIVE",  # preempted: seen, looked at again, made again
              "ACTIVE"]  # the run has ended with 0
    (tmp_path / "state").write_text("\n".join(states) + "\n")
    (tmp_path / "scripted").touch()
    (tmp_path / "endings").write_text("75\n75\n0\n")
    done = pod("keep", *TRAIN, QUEUED="1", SPOT="1", POLL="0.5")
    assert done.returncode == 0, done.stderr
    assert "voco is WAITING_FOR_RESOURCES, waiting" in done.stderr and "the run has ended" in done.stderr
    assert "the run was told to stop and has saved; it is started again" in done.stderr
    made = [line for line in calls(tmp_path) if " create " in line]
    assert made == 2 * ["tpus queued-resources create voco --zone=us-west4-a --node-id=voco "
                        "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot "
                        "--scopes=https://www.googleapis.com/auth/cloud-platform"]
    assert [line for line in calls(tmp_path) if " delete " in line] == [
        "tpus queued-resources delete voco --zone=us-west4-a --force --quiet"]


def test_a_run_that_fails_is_not_started_again(tmp_path, pod):
    (tmp_path / "state").write_text("READY\n")
    pod("install")
    (tmp_path / "endings").write_text("1\n0\n")
    done = pod("keep", *TRAIN, POLL="0.5")
    assert done.returncode == 1 and "the run has failed: bash launch/tpu_pod.sh tail shows why" in done.stderr
    assert (tmp_path / "endings").read_text() == "0\n"


def test_several_slices_are_one_queued_resource(tmp_path, pod):
    (tmp_path / "state").write_text("ACTIVE\n")
    assert pod("create", SLICES="2", RESERVED="1", INTERNAL_IPS="1").returncode == 0
    assert "--node-count=2 --node-prefix=voco " in calls(tmp_path)[0]
    assert "--reserved --internal-ips --scopes=" in calls(tmp_path)[0]
    assert pod("install", SLICES="2", SSH="iap").returncode == 0
    assert [line.split()[3:5] for line in calls(tmp_path) if " ssh " in line] == [
        ["voco-0", "--zone=us-west4-a"], ["voco-1", "--zone=us-west4-a"]]
    assert all("--tunnel-through-iap" in line for line in calls(tmp_path) if " ssh " in line or " scp " in line)
    refused = pod("run", *TRAIN, SLICES="2")
    assert refused.returncode == 2 and "run with SLICES=2 needs --config.mesh.slice=2" in refused.stderr


def test_what_an_installation_needs_is_looked_at_first(tmp_path, pod):
    (tmp_path / "changes").write_text(" M vocojax/layout.py\n?? own.py\n")
    assert ("2 files are not committed and stay here (the first: vocojax/layout.py): commit them to install them"
            in pod("install").stderr)
    executable(tmp_path / "bin" / "ssh-add", "#!/usr/bin/env bash\nexit 2\n")
    before = calls(tmp_path)
    refused = pod("install")
    assert refused.returncode == 2 and 'eval "$(ssh-agent)"; ssh-add ~/.ssh/google_compute_engine' in refused.stderr
    assert calls(tmp_path) == before
    disk = {"TPU_TYPE": "v6e-16", "DATA_DISK": "projects/p/zones/z/disks/data"}
    for kind, status in (("diskTypes/pd-ssd", 2), ("diskTypes/hyperdisk-ml", 0)):
        (tmp_path / "disk").write_text(f"https://www.googleapis.com/{kind}\n")
        done = pod("create", **disk)
        assert done.returncode == status, done.stderr
        assert status == 0 or "is a pd-ssd, and v6e takes Hyperdisks only" in done.stderr
    assert "--data-disk=source=projects/p/zones/z/disks/data,mode=read-only" in calls(tmp_path)[-1]


@pytest.mark.parametrize(("variables", "message"), [
    ({"TPU_TYPE": "tpu7x-16"}, "TPU7x is only on GKE, not a TPU VM: use launch/gke_jobset.yaml or XPK"),
    ({"SLICES": "two"}, "SLICES must be a whole number, got two"),
    ({"SSH": "tunnel"}, "SSH must be iap or internal, got tunnel"),
    ({"SPOT": "1", "RESERVED": "1"}, "machines are either SPOT=1 or RESERVED=1"),
])
def test_wrong_variables_are_named(pod, tmp_path, variables, message):
    done = pod("create", **variables)
    assert done.returncode == 2 and message in done.stderr and not (tmp_path / "calls").exists()
