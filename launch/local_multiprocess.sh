#!/usr/bin/env bash
# Runs a command as N processes of one run on this machine, over loopback:
#
#   bash launch/local_multiprocess.sh 2 python launch/train.py --config=configs/quickstart.py --workdir=runs/two
#
# Each process finds JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in its environment; set
# XLA_FLAGS=--xla_force_host_platform_device_count=D for D devices each on a CPU. On a GPU machine process I of several
# has only GPU I (JAX_LOCAL_DEVICE_IDS); the chips of a TPU machine can't be divided like this. Process 0 has the
# terminal, the others' lines carry their number. Signals go to all; when one process fails, the others are stopped
# (killed after GRACE_SECONDS, 30 by default) and its status is returned.
set -uo pipefail

if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: bash launch/local_multiprocess.sh NUMBER COMMAND [ARGUMENTS]" >&2
    exit 2
fi
number=$1
shift
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then
    echo "local_multiprocess.sh: needs bash >= 5.1, this is $BASH_VERSION (on macOS: brew install bash)" >&2
    exit 2
fi
port=$("${PYTHON:-python3}" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
[ -n "$port" ] || { echo "local_multiprocess.sh: no free port: is ${PYTHON:-python3} there? PYTHON names another" >&2; exit 2; }
export JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES="$number"

declare -A running=()  # the processes' numbers, by process id
signal_all() { [ ${#running[@]} -eq 0 ] || kill "-$1" "${!running[@]}" 2>/dev/null; }
trap 'signal_all TERM' TERM INT HUP  # a process in the background of a script does not hear Ctrl-C itself

for ((i = 0; i < number; i++)); do
    export JAX_PROCESS_ID=$i JAX_LOCAL_DEVICE_IDS=$i
    if [ "$i" -eq 0 ]; then
        "$@" &
    else
        "$@" > >(exec sed -u "s/^/[$i] /") 2> >(exec sed -u "s/^/[$i] /" >&2) &
    fi
    running[$!]=$i
done

status=0
timer=""  # a `sleep` that ends when the others' time to stop is over
while [ ${#running[@]} -gt 0 ]; do
    ended=""  # `wait` unsets it when a signal ends the wait
    wait -n -p ended "${!running[@]}" $timer
    code=$?
    [ -n "${ended:-}" ] || continue  # a signal came, and was passed on
    if [ "$ended" = "$timer" ]; then
        timer=""
        signal_all KILL
        continue
    fi
    who=${running[$ended]}
    unset "running[$ended]"
    if [ "$code" -ne 0 ] && [ "$status" -eq 0 ]; then
        status=$code
        echo "local_multiprocess.sh: process $who of $number ended with status $code" >&2
        signal_all TERM
        sleep "${GRACE_SECONDS:-30}" &
        timer=$!
    fi
done
[ -z "$timer" ] || kill "$timer" 2>/dev/null
exit "$status"
