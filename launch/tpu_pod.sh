#!/usr/bin/env bash
# Trains a recipe on all workers of a TPU pod slice. Run it from the repository, with
# gcloud logged in:
#
#     export TPU=my-slice ZONE=us-east5-a SHARED=/mnt/shared
#     # once, and after every change: copies HEAD to the workers
#     launch/tpu_pod.sh setup
#     # starts the run in the background, or continues it
#     launch/tpu_pod.sh configs/llama3_70b.py [--train.steps 100 ...]
#     # follows the output of worker 0; Ctrl-C ends this command, not the run
#     launch/tpu_pod.sh log
#     # saves a checkpoint and ends the run
#     launch/tpu_pod.sh stop
#
# TPU, ZONE: the name and the zone of the slice. The product of the recipe's mesh axes
# must be the slice's number of chips.
# SHARED: a folder that every worker has mounted, such as a Filestore. It holds the
# folders `data` and `runs`, which the recipes name.
set -euo pipefail
: "${TPU:?the name of the slice}" "${ZONE:?its zone}"
: "${SHARED:?a folder that every worker has mounted}"

on() {  # WORKER COMMAND
    gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker "$1" --command "$2"
}

case "${1:?setup, log, stop or a recipe, such as configs/llama3_70b.py}" in
setup)
    archive=$(mktemp -d)/ladder_jax.tgz
    git archive --format tar.gz --output "$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$TPU:" --zone "$ZONE" --worker all
    # uv installs a Python, since the Python of the TPU images may be older than 3.11.
    on all "mkdir -p ladder_jax $SHARED/data $SHARED/runs && cd ladder_jax && tar xzf ../ladder_jax.tgz &&
        ln -sfn $SHARED/data data && ln -sfn $SHARED/runs runs &&
        python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --clear --python 3.12 .venv &&
        python3 -m uv pip install --quiet --python .venv/bin/python --editable '.[tpu,parquet,plot]'"
    ;;
log)
    on 0 "tail -n 50 -f ladder_jax/train.log"
    ;;
stop)
    on all "pkill -TERM -f '[l]adder-jax train'"
    ;;
*)
    on all "cd ladder_jax && nohup .venv/bin/ladder-jax train $(printf '%q ' "$@")--distributed --resume \
        </dev/null >train.log 2>&1 & sleep 1"
    echo "started on all workers of $TPU: follow it with $0 log"
    ;;
esac
