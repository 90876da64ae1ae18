#!/usr/bin/env bash
# TPU VMs from nothing to a resumed run, from your own machine (Linux or macOS), by gcloud:
#
#   export POD=voco TPU_TYPE=v5litepod-16 ZONE=us-west4-a
#   bash launch/tpu_pod.sh create                             # the machines; with a queue, waits until they are there
#   bash launch/tpu_pod.sh install                            # this checkout's HEAD and the locked packages, on every worker
#   bash launch/tpu_pod.sh run --config=configs/voco.py --workdir=gs://bucket/voco ...    # launch/train.py's arguments
#   bash launch/tpu_pod.sh tail                               # worker 0's log; Ctrl-C does not stop the run
#   bash launch/tpu_pod.sh stop                               # SIGTERM: the run saves; returns when the run has ended
#   bash launch/tpu_pod.sh resume --config=... --workdir=...  # as `run`; pods that were preempted are created again first
#   bash launch/tpu_pod.sh keep --config=... --workdir=...    # resumes after every preemption until the run has ended
#   bash launch/tpu_pod.sh delete
#
# More variables, all optional:
#   PROJECT       the project, if it is not gcloud's own
#   SPOT=1        cheaper machines that may be preempted
#   QUEUED=1      a queued resource: waits for its turn; RESERVED=1 and SLICES need one and imply it
#   RESERVED=1    machines of your reservation
#   SLICES=2      several slices, joined by the data centre's network: run with --config.mesh.slice=2
#   SSH=iap       reach the machines through IAP; SSH=internal by their internal addresses
#   INTERNAL_IPS=1  create them without external addresses
#   DATA_DISK=projects/PROJECT/zones/ZONE/disks/DISK  attached read-only; v6e takes Hyperdisks only
#   CREATE_ARGS   more words for the creation
#   SETUP         a command that `install` ends with on every worker, such as a mount
#   TPU_VERSION, REMOTE_DIR, POLL (seconds between two looks, 30)
#
# ssh to all workers needs an ssh-agent with gcloud's key: eval "$(ssh-agent)"; ssh-add ~/.ssh/google_compute_engine
# With --dry-run, anywhere among the arguments, every command is printed and none is run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}" >&2; exit 2; }
say() { echo "tpu_pod.sh: $1" >&2; }
refuse() { say "$1"; exit 2; }

dry_run=""
words=()
for word in "$@"; do
    case $word in
        --dry-run) dry_run=1 ;;
        --dry* | -n) refuse "$word is unknown, nothing was done: it is written --dry-run" ;;
        *) words+=("$word") ;;
    esac
done
set -- ${words[@]+"${words[@]}"}
verb=${1:-help}
[ $# -eq 0 ] || shift
slices=${SLICES:-1}
case $verb in
    run | resume | keep)
        [[ " $*" == *" --config"[=\ ]* && " $*" == *" --workdir"[=\ ]* ]] ||
            refuse "$verb needs launch/train.py's arguments: --config=... --workdir=..."
        [[ $1 == --* ]] || refuse "unexpected argument: $1"
        [ "$slices" = 1 ] || [[ " $* " == *" --config.mesh.slice"[=\ ]"$slices "* ]] ||
            refuse "$verb with SLICES=$slices needs --config.mesh.slice=$slices" ;;
    create | install | tail | stop | delete) [ $# -eq 0 ] || refuse "$verb takes no arguments, got: $*" ;;
    *) usage ;;
esac
: "${POD:?is the name of the TPU VM, say POD=voco}" "${ZONE:?is where it is, say ZONE=us-west4-a}"
: "${TPU_TYPE:?is the accelerator type, say v4-32, v5litepod-16, v5p-128 or v6e-64}"
remote=${REMOTE_DIR:-vocojax}
place=(--zone="$ZONE")
[ -z "${PROJECT:-}" ] || place+=(--project="$PROJECT")
case $TPU_TYPE in
    v4-*) generation=v4 version=tpu-ubuntu2204-base ;;
    v5litepod-*) generation=v5e version=v2-alpha-tpuv5-lite ;;
    v5p-*) generation=v5p version=v2-alpha-tpuv5 ;;
    v6e-*) generation=v6e version=v2-alpha-tpuv6e ;;
    tpu7x* | v7x-*) refuse "TPU7x is only on GKE, not a TPU VM: use launch/gke_jobset.yaml or XPK, see docs/train.md" ;;
    *) refuse "TPU_TYPE must begin with v4-, v5litepod-, v5p- or v6e-, got $TPU_TYPE" ;;
esac
[[ $slices =~ ^[1-9][0-9]*$ ]] || refuse "SLICES must be a whole number, got $slices"
nodes=("$POD")
queued=${QUEUED:-}
if [ "$slices" != 1 ]; then
    queued=1 nodes=()
    for ((i = 0; i < slices; i++)); do nodes+=("$POD-$i"); done
fi
[ -z "${RESERVED:-}" ] || queued=1
[ -z "${RESERVED:-}" ] || [ -z "${SPOT:-}" ] || refuse "machines are either SPOT=1 or RESERVED=1"
ssh_flags=()
case ${SSH:-} in
    "") ;;
    iap) ssh_flags=(--tunnel-through-iap) ;;
    internal) ssh_flags=(--internal-ip) ;;
    *) refuse "SSH must be iap or internal, got $SSH" ;;
esac

do_() {  # runs a command, or prints it as it could be typed
    if [ -z "$dry_run" ]; then "$@" 3>&-; return; fi
    local word line=""
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_./:=@,+-]+$ ]] || word="'$(printf %s "$word" | sed "s/'/'\\\\''/g")'"
        line+="$word "
    done
    echo "${line% }"
}
ask() {  # the answer of a command; with --dry-run the command is printed, and the answer is the first argument
    local assumed=$1
    shift
    if [ -z "$dry_run" ]; then "$@" 3>&-; return; fi
    do_ "$@" >&3
    echo "$assumed"
}
exec 3>&1
vms() { do_ gcloud compute tpus tpu-vm "$1" "$2" "${place[@]}" "${@:3}"; }  # verb, node, flags
queue() { do_ gcloud compute tpus queued-resources "$1" "$POD" "${place[@]}" "${@:2}"; }
on() {  # worker of each node (a number or `all`), command line
    local node
    for node in "${nodes[@]}"; do
        vms ssh "$node" ${ssh_flags[@]+"${ssh_flags[@]}"} --worker="$1" --command="$2"
    done
}
is_on="grep -qsa launch/train.py /proc/\$(cat run.pid 2>/dev/null || echo none)/cmdline"  # on a worker, in $remote

need_agent() {
    [ -n "$dry_run" ] || ssh-add -l > /dev/null 2>&1 ||
        refuse "gcloud reaches several workers by an ssh-agent with its key, and there is none: \
eval \"\$(ssh-agent)\"; ssh-add ~/.ssh/google_compute_engine"
}
need_hyperdisk() {  # v6e takes no other data disk
    local type
    [ "$generation" = v6e ] && [ -n "${DATA_DISK:-}" ] || return 0
    type=$(ask hyperdisk-balanced gcloud compute disks describe "${DATA_DISK##*/}" "${place[@]}" '--format=value(type)')
    case $type in
        *hyperdisk*) ;;
        *) refuse "DATA_DISK $DATA_DISK is a ${type##*/}, and v6e takes Hyperdisks only: copy it to one \
(hyperdisk-balanced or hyperdisk-ml)" ;;
    esac
}

create() {
    local more flags=()
    need_hyperdisk
    read -ra more <<< "${CREATE_ARGS:-}"
    [ -z "${SPOT:-}" ] || flags+=(--spot)
    [ -z "${RESERVED:-}" ] || flags+=(--reserved)
    [ -z "${INTERNAL_IPS:-}" ] || flags+=(--internal-ips)
    [ -z "${DATA_DISK:-}" ] || flags+=(--data-disk="source=$DATA_DISK,mode=read-only")
    flags+=(--scopes=https://www.googleapis.com/auth/cloud-platform ${more[@]+"${more[@]}"})
    if [ -z "$queued" ]; then
        vms create "$POD" --accelerator-type="$TPU_TYPE" --version="${TPU_VERSION:-$version}" "${flags[@]}"
        return
    fi
    local names=(--node-id="$POD")
    [ "$slices" = 1 ] || names=(--node-count="$slices" --node-prefix="$POD")
    queue create "${names[@]}" --accelerator-type="$TPU_TYPE" --runtime-version="${TPU_VERSION:-$version}" "${flags[@]}"
    await
}
state() {  # of the queued resource or of the VM; nothing if there is none
    local kind=tpu-vm field=state
    [ -z "$queued" ] || kind=queued-resources field=state.state
    ask "$1" gcloud compute tpus "$kind" list "${place[@]}" --filter="name~(^|/)$POD\$" "--format=value($field)"
}
await() {  # returns when the queued resource is there
    local now last=""
    while true; do
        now=$(state ACTIVE)
        case $now in
            ACTIVE) return ;;
            FAILED | SUSPEND* | "") say "$POD is ${now:-gone}: delete it and create it again (resume does)"; exit 1 ;;
        esac
        [ "$now" = "$last" ] || say "$POD is $now, waiting"
        last=$now
        sleep "${POLL:-30}"
    done
}
delete() {
    if [ -n "$queued" ]; then queue delete --force --quiet; else vms delete "$POD" --quiet; fi
}
install() {
    local archive changed node
    need_agent
    changed=$(ask "" git status --porcelain)
    [ -z "$changed" ] || say "$(echo "$changed" | wc -l | tr -d ' ') files are not committed and stay here (the first: \
$(echo "$changed" | head -n 1 | cut -c 4-)): commit them to install them"
    archive=$(if [ -n "$dry_run" ]; then echo /tmp/vocojax.XXXXXX; else mktemp "${TMPDIR:-/tmp}/vocojax.XXXXXX"; fi)
    do_ git archive --format=tar.gz --output="$archive" HEAD
    for node in "${nodes[@]}"; do
        do_ gcloud compute tpus tpu-vm scp "$archive" "$node:vocojax.tar.gz" "${place[@]}" \
            ${ssh_flags[@]+"${ssh_flags[@]}"} --worker=all
    done
    do_ rm -f "$archive"
    # The machines' own Python is older than 3.11; uv brings one that the package supports.
    on all "set -e; mkdir -p $remote; tar -xzf vocojax.tar.gz -C $remote; cd $remote; python3 -m pip install --quiet --user uv; \
python3 -m uv venv --quiet --allow-existing --python 3.11 .venv; \
python3 -m uv pip install --quiet --constraint requirements.lock --editable '.[tpu]'${SETUP:+; $SETUP}"
}
run() {
    local quoted
    need_agent
    quoted=$(printf ' %q' "$@")
    # In a session of its own, so that the run outlives the connection; one run at a time has the chips. run.status holds
    # how it ended: 75 if it was told to stop and has saved.
    on all "set -e; cd $remote; if $is_on; then \
echo 'a run is on already: stop it first' >&2; exit 1; fi; . launch/xla_flags.sh $generation; rm -f run.status; \
nohup setsid bash -c 'trap : TERM; \"\$@\"; echo \$? > run.status' run \
.venv/bin/python launch/train.py$quoted --stopped_status=75 >> run.log 2>&1 < /dev/null & echo \$! > run.pid"
}
stop() {
    need_agent
    on all "cd $remote 2>/dev/null && $is_on || { echo 'no run is on'; exit 0; }; kill -TERM -- -\$(cat run.pid); \
while $is_on; do sleep 1; done; echo 'the run has ended: the end of the log says whether it saved'"
}
resume() {
    local now
    now=$(state PREEMPTED)
    while [ "$now" = SUSPENDING ]; do sleep "${POLL:-30}"; now=$(state SUSPENDED); done
    case $now in
        READY | ACTIVE) ;;
        "") create; install ;;
        WAITING_FOR_RESOURCES | ACCEPTED | PROVISIONING) await; install ;;
        PREEMPTED | TERMINATED | SUSPENDED | FAILED) delete; create; install ;;  # it stays listed until it is deleted
        *)  say "$POD is $now, nothing was done: resume when it is READY (one that is STOPPED: gcloud compute tpus \
tpu-vm start $POD ${place[*]}), or delete it first"; exit 1 ;;
    esac
    run "$@"
}
ended() {  # how the run on the first node ended: its status, `on`, or `unknown` if the machine does not answer
    vms ssh "${nodes[0]}" ${ssh_flags[@]+"${ssh_flags[@]}"} --worker=0 \
        --command="cd $remote && if $is_on; then echo on; else cat run.status; fi" 2> /dev/null || echo unknown
}
keep() {
    local now
    resume "$@"
    [ -z "$dry_run" ] || { state READY > /dev/null; ended; return 0; }
    while true; do
        sleep "${POLL:-30}"
        now=$(state READY) || { say "gcloud can't look at $POD; trying again"; continue; }
        case $now in
            READY | ACTIVE) ;;
            *) say "$POD is gone or on its way; creating it again"; resume "$@"; continue ;;
        esac
        case $(ended | tail -n 1) in
            on | unknown) ;;
            0) say "the run has ended"; return ;;
            75) say "the run was told to stop and has saved; it is started again"; run "$@" ;;
            *) say "the run has failed: bash launch/tpu_pod.sh tail shows why; mend it, then keep again"; exit 1 ;;
        esac
    done
}

case $verb in
    tail) vms ssh "${nodes[0]}" ${ssh_flags[@]+"${ssh_flags[@]}"} --worker=0 --command="tail -n 100 -F $remote/run.log" ;;
    *) "$verb" "$@" ;;
esac
