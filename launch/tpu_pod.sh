#!/usr/bin/env bash
# Trains a recipe on all workers of a Cloud TPU slice. Run it from the repository, with
# gcloud logged in:
#
#     export TPU=my-slice ZONE=us-east5-b SHARED=/mnt/shared
#     # asks for a slice, and waits for it (TYPE as below); or use one that you have
#     launch/tpu_pod.sh create
#     # copies HEAD to the workers: once, and after every change
#     launch/tpu_pod.sh setup
#     # starts the run in the background, or continues it
#     launch/tpu_pod.sh configs/llama3_70b.py [--train.steps 100 ...]
#     # follows the output of all workers; Ctrl-C ends this command, not the run
#     launch/tpu_pod.sh log
#     # saves a checkpoint and ends the run
#     launch/tpu_pod.sh stop
#     # does all of it: starts the run, again after maintenance, and on a new slice after
#     # a preemption, until the run has ended
#     launch/tpu_pod.sh keep configs/llama3_70b.py [...]
#
# TPU, ZONE: the name and the zone of the slice (and of its queued resource). The product
# of the recipe's mesh axes must be the slice's number of chips.
# TYPE, RUNTIME: for create and keep, such as v6e-16 and v2-alpha-tpuv6e. OPTIONS: more
# words for gcloud, such as --spot or --reserved.
# SHARED: a folder that every worker has mounted, such as a Filestore. It holds the
# folders `data` and `runs`, which the recipes name. STARTUP: for a new slice, a file with
# the commands that mount it.
set -euo pipefail
: "${TPU:?the name of the slice}" "${ZONE:?its zone}"
: "${SHARED:?a folder that every worker has mounted}"

on() {  # WORKER COMMAND
    gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker "$1" --command "$2"
}

queued() {  # WORDS
    gcloud compute tpus queued-resources "$1" "$TPU" --zone "$ZONE" "${@:2}"
}

state() {
    queued describe --format 'value(state.state)'
}

create() {
    local options=()
    read -ra options <<<"${OPTIONS:-}"
    if [[ ${STARTUP:-} ]]; then options+=(--metadata-from-file "startup-script=$STARTUP"); fi
    queued create --node-id "$TPU" \
        --accelerator-type "${TYPE:?its type, such as v6e-16}" \
        --runtime-version "${RUNTIME:?its software, such as v2-alpha-tpuv6e}" "${options[@]}"
    local now
    while now=$(state) && [[ $now != ACTIVE ]]; do
        if [[ $now == FAILED ]]; then echo "tpu_pod.sh: $TPU is $now" >&2; exit 1; fi
        echo "tpu_pod.sh: $TPU is $now" >&2
        sleep "${PAUSE:-60}"
    done
}

setup() {
    local archive
    archive=$(mktemp -d)/ladder_jax.tgz
    git archive --format tar.gz --output "$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$TPU:" --zone "$ZONE" --worker all
    # uv installs a Python, since the Python of the TPU images may be older than 3.11.
    on all "mkdir -p ladder_jax $SHARED/data $SHARED/runs && cd ladder_jax && tar xzf ../ladder_jax.tgz &&
        ln -sfn $SHARED/data data && ln -sfn $SHARED/runs runs &&
        python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --clear --python 3.12 .venv &&
        python3 -m uv pip install --quiet --python .venv/bin/python --editable '.[tpu,parquet,plot]'"
}

start() {  # RECIPE ...; a worker where the run goes on holds the lock, and does nothing
    local run='rm -f ended; launch/again.sh "$@"; echo $? >ended'
    local words
    words=".venv/bin/ladder-jax train $(printf '%q ' "$@")--distributed --resume"
    on all "cd ladder_jax && nohup flock --nonblock run.lock sh -c '$run' sh $words \
        </dev/null >>train.log 2>&1 & sleep 1"
}

keep() {  # RECIPE ...
    local now ended
    while true; do
        now=$(state || echo gone)
        case $now in
        ACTIVE)
            ended=$(on 0 "cat ladder_jax/ended 2>/dev/null || true")
            if [[ $ended ]]; then echo "tpu_pod.sh: the run ended with status $ended"; exit "$ended"; fi
            start "$@" || true  # a worker in maintenance does not answer
            ;;
        SUSPENDED | FAILED | gone)  # preempted: a queued resource is not used twice
            echo "tpu_pod.sh: $TPU is $now: asking for another slice" >&2
            if [[ $now != gone ]]; then queued delete --force --quiet; fi
            create && setup
            continue
            ;;
        *) echo "tpu_pod.sh: $TPU is $now" >&2 ;;
        esac
        sleep "${PAUSE:-60}"
    done
}

case "${1:?create, setup, log, stop, keep or a recipe, such as configs/llama3_70b.py}" in
create | setup) "$1" ;;
keep)
    : "${2:?a recipe, such as configs/llama3_70b.py}"
    on 0 "rm -f ladder_jax/ended" || true
    keep "${@:2}"
    ;;
log)
    # shellcheck disable=SC2016  # the worker's name
    on all 'tail -n 50 -F ladder_jax/train.log | sed -u "s/^/[$(hostname)] /"'
    ;;
stop)  # again.sh passes it on
    on all "pkill -TERM -f '[l]aunch/again.sh'"
    ;;
*)
    start "$@"
    echo "started on all workers of $TPU: follow it with $0 log"
    ;;
esac
