#!/usr/bin/env bash
# A TPU VM or pod from nothing to a resumed run, from your own machine, by gcloud:
#
#   export POD=voco TPU_TYPE=v5litepod-16 ZONE=us-west4-a     # optional: PROJECT, SPOT=1, TPU_VERSION, REMOTE_DIR,
#       # CREATE_ARGS (more words for `create`), SETUP (a command that `install` ends with on every worker: a mount)
#   bash launch/tpu_pod.sh create                             # the machines
#   bash launch/tpu_pod.sh install                            # this checkout's HEAD and the locked packages, on every worker
#   bash launch/tpu_pod.sh run --config=configs/voco.py --workdir=gs://bucket/voco ...    # launch/train.py's arguments
#   bash launch/tpu_pod.sh tail                               # worker 0's log; Ctrl-C leaves the run alone
#   bash launch/tpu_pod.sh stop                               # SIGTERM: the run saves; returns when the run has ended
#   bash launch/tpu_pod.sh resume --config=... --workdir=...  # as `run`; pods that were preempted are created again first
#   bash launch/tpu_pod.sh delete
#
# With --dry-run, anywhere among the arguments, every command is printed and none is run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2; exit 2; }
refuse() { echo "tpu_pod.sh: $1" >&2; exit 2; }

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
case $verb in
    run | resume)
        [[ " $*" == *" --config"[=\ ]* && " $*" == *" --workdir"[=\ ]* ]] ||
            refuse "$verb needs launch/train.py's arguments: --config=... --workdir=..."
        [[ $1 == --* ]] || refuse "unexpected argument: $1" ;;
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
    *) refuse "TPU_TYPE must begin with v4-, v5litepod-, v5p- or v6e-, got $TPU_TYPE" ;;
esac

do_() {  # runs a command, or prints it as it could be typed
    if [ -z "$dry_run" ]; then "$@"; return; fi
    local word line=""
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_./:=@,+-]+$ ]] || word=${word@Q}
        line+="$word "
    done
    echo "${line% }"
}
tpu() { do_ gcloud compute tpus tpu-vm "$1" "$POD" "${place[@]}" "${@:2}"; }
on() { tpu ssh --worker="$1" --command="$2"; }  # worker (a number or `all`), command line
is_on="grep -qsa launch/train.py /proc/\$(cat run.pid 2>/dev/null || echo none)/cmdline"  # on a worker, in $remote

create() {
    local more
    read -ra more <<< "${CREATE_ARGS:-}"
    tpu create --accelerator-type="$TPU_TYPE" --version="${TPU_VERSION:-$version}" \
        --scopes=https://www.googleapis.com/auth/cloud-platform ${SPOT:+--spot} ${more[@]+"${more[@]}"}
}
install() {
    local archive
    archive=$(if [ -n "$dry_run" ]; then echo /tmp/vocojax.XXXXXX.tar.gz; else mktemp --suffix=.tar.gz; fi)
    do_ git archive --format=tar.gz --output="$archive" HEAD
    do_ gcloud compute tpus tpu-vm scp "$archive" "$POD:vocojax.tar.gz" "${place[@]}" --worker=all
    do_ rm -f "$archive"
    # The machines' own Python is older than 3.11; uv brings one that the package supports.
    on all "set -e; mkdir -p $remote; tar -xzf vocojax.tar.gz -C $remote; cd $remote; python3 -m pip install --quiet --user uv; \
python3 -m uv venv --quiet --allow-existing --python 3.11 .venv; \
python3 -m uv pip install --quiet --constraint requirements.lock --editable '.[tpu]'${SETUP:+; $SETUP}"
}
run() {
    local quoted
    quoted=$(printf ' %q' "$@")
    # In a session of its own, so that the run outlives the connection; one run at a time has the chips.
    on all "set -e; cd $remote; if $is_on; then \
echo 'a run is on already: stop it first' >&2; exit 1; fi; . launch/xla_flags.sh $generation; \
nohup setsid .venv/bin/python launch/train.py$quoted >> run.log 2>&1 < /dev/null & echo \$! > run.pid"
}
stop() {
    on all "cd $remote 2>/dev/null && $is_on || { echo 'no run is on'; exit 0; }; kill -TERM \$(cat run.pid); \
while $is_on; do sleep 1; done; echo 'the run has ended: the end of the log says whether it saved'"
}
resume() {
    local state=PREEMPTED  # for a dry run, which can't look
    local look=(gcloud compute tpus tpu-vm list "${place[@]}" --filter="name~(^|/)$POD\$" '--format=value(state)')
    if [ -n "$dry_run" ]; then do_ "${look[@]}"; else state=$("${look[@]}"); fi
    case $state in
        READY) ;;
        "") create; install ;;
        PREEMPTED | TERMINATED) tpu delete --quiet; create; install ;;  # such a pod stays listed until it is deleted
        *)  echo "tpu_pod.sh: $POD is $state, nothing was done: resume when it is READY (one that is STOPPED: gcloud" \
                "compute tpus tpu-vm start $POD ${place[*]}), or delete it first" >&2; exit 1 ;;
    esac
    run "$@"
}

case $verb in
    tail) on 0 "tail -n 100 -F $remote/run.log" ;;
    delete) tpu delete --quiet ;;
    *) "$verb" "$@" ;;
esac
