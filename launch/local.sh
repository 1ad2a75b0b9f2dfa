#!/usr/bin/env bash
# Runs a command as N processes of one run. On one machine, of N GPUs or with emulated
# devices:
#
#     launch/local.sh 8 -- .venv/bin/ladder-jax train configs/scratch_1b.py --resume
#     launch/local.sh 2 -- .venv/bin/ladder-jax train configs/demo.py --devices 4
#
# The command gets the options --distributed, --coordinator, --processes and --process,
# and, if N is more than 1, one GPU of the machine. Each line of output begins with the
# number of its process.
#
# If a process fails, the others get SIGTERM, and SIGKILL after GRACE seconds (default
# 30); the exit status is that of the first that failed. SIGTERM, Ctrl-C and SIGHUP are
# passed on to all. launch/again.sh starts a failed run again.
#
# On several machines, start it on each with the same N:
#
#     NODES=2 NODE=0 COORDINATOR=host-0:8476 launch/local.sh 8 -- ...
#     NODES=2 NODE=1 COORDINATOR=host-0:8476 launch/local.sh 8 -- ...
#
# Needs bash 5.1 or newer.
set -euo pipefail
set -m  # each process in a group of its own: Ctrl-C reaches this script alone

usage="usage: launch/local.sh N -- COMMAND"
[[ ${1:-} =~ ^[1-9][0-9]*$ && ${2:-} == -- && $# -gt 2 ]] || { echo "$usage" >&2; exit 2; }
count=$1
shift 2
node=${NODE:-0} nodes=${NODES:-1}
if ((nodes > 1)); then : "${COORDINATOR:?HOST:PORT of the machine with NODE=0}"; fi

free_port() {  # below the ports that the kernel gives to clients
    local port
    while port=$((10000 + RANDOM % 20000)) && (: >"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
    echo "$port"
}

label() {  # PREFIX: copies lines; ends when its process has ended
    trap '' HUP INT TERM
    local line
    while IFS= read -r line || [[ $line ]]; do printf '%s%s\n' "$1" "$line"; done
}

declare -A running=()  # pid -> number of the process
groups=() labels=()

pass_on() {  # SIGNAL
    stopping=1
    local pid
    for pid in "${!running[@]}"; do kill -s "$1" "$pid" 2>/dev/null || true; done
}

stopping=''
for signal in TERM INT HUP; do
    # shellcheck disable=SC2064  # the signal's name is known now
    trap "pass_on $signal" "$signal"
done

coordinator=${COORDINATOR:-127.0.0.1:$(free_port)}
for ((i = 0; i < count; i++)); do
    process=$((node * count + i))
    exec {output}> >(label "[$process] ")
    labels+=($!)
    if ((count > 1)); then export JAX_LOCAL_DEVICE_IDS=$i; fi
    "$@" --distributed --coordinator "$coordinator" --processes $((nodes * count)) \
        --process "$process" </dev/null >&"$output" 2>&1 &
    running[$!]=$process groups+=($!)
    exec {output}>&-
done

kill_soon() {  # the others may wait for a process that has ended
    sleep "${GRACE:-30}"
    local pid
    for pid in "${!running[@]}"; do kill -KILL -- "-$pid" || true; done
}

exec {messages}>&2 2>/dev/null  # bash would print the command of each killed process
failed=0 killer=''
while ((${#running[@]})); do
    sleep 0.2 &
    wait $! || true  # a signal ends the wait
    for pid in "${!running[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then continue; fi
        status=0 process=${running[$pid]}
        wait "$pid" || status=$?
        unset "running[$pid]"
        ((status && !failed)) || continue
        failed=$status
        if [[ ! $stopping ]]; then
            text="process $process ended with status $status: ending the others"
            echo "local.sh: $text" >&"$messages"
            pass_on TERM
        fi
        kill_soon >/dev/null {messages}>&- &
        killer=$!
    done
done

# What the processes have started and left; and the killer.
for pid in "${groups[@]}" $killer; do kill -KILL -- "-$pid" || true; done
wait "${labels[@]}" || true
exit "$failed"
