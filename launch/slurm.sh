#!/usr/bin/env bash
# Trains a recipe on a GPU cluster under Slurm. Run it from the repository, with an
# environment that all nodes see:
#
#     sbatch --nodes 8 launch/slurm.sh configs/scratch_1b.py [--train.steps 100 ...]
#
# The run continues from its newest checkpoint, and the job's log is appended to. The job
# goes back to the queue by itself: from Slurm, if it is preempted or loses a node; from
# this script, five minutes before its time limit, if another host failed (status 75) or
# if a process was killed. RESTARTS is the most times (default 100). `scancel` ends it.
#
# Nodes times GPUs of a node must be the product of the recipe's mesh axes. train.out,
# data.token_cache and data.source must be on a disk that all nodes see.
#
# Change here or on sbatch's command line: the GPUs and CPUs of a node, the time, and
# other options that the cluster requires (--partition, --account). Environment variables:
#   LADDER_JAX   the command (default: .venv/bin/ladder-jax)
#   CONTAINER    an image for pyxis and enroot, such as registry.example#ladder-jax:cuda13
#   MOUNTS       what it sees beside this folder, such as /data:/data,/runs:/runs
# NCCL finds its networks itself. If it does not: NCCL_DEBUG=INFO says what it uses, and
# srun passes on this and all other variables. The program sets XLA's options for GPUs:
# see ladder_jax/hardware/xla_options.py.
#
#SBATCH --job-name=ladder-jax
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# One process a GPU, as JAX expects under Slurm.
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
# Five minutes before the time limit, the processes get SIGTERM: they save and end.
#SBATCH --signal=TERM@300
set -euo pipefail
: "${1:?a recipe, such as configs/scratch_1b.py}"

options=(
    --label                                    # the task's number before each line
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}"  # srun does not take it from sbatch
    --gpu-bind=none  # a process must see all GPUs of its node: JAX gives it one
    --kill-on-bad-exit=0 --wait=120  # after one has ended, the others say why they end
)
command=${LADDER_JAX:-.venv/bin/ladder-jax}
if [[ ${CONTAINER:-} ]]; then
    command=${LADDER_JAX:-ladder-jax}
    mounts=$PWD:$PWD${MOUNTS:+,$MOUNTS}
    options+=(--container-image="$CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD")
fi

cancelled=''
trap 'cancelled=1' TERM  # from scancel: before the time limit, only the processes get it
status=0
srun "${options[@]}" "$command" train "$@" --distributed --resume || status=$?
if [[ $cancelled ]] || ((status != 75 && status <= 128)); then exit "$status"; fi
if ((${SLURM_RESTART_COUNT:-0} >= ${RESTARTS:-100})); then
    echo "slurm.sh: status $status, after ${RESTARTS:-100} restarts: giving up" >&2
    exit "$status"
fi
echo "slurm.sh: status $status: back to the queue" >&2
scontrol requeue "$SLURM_JOB_ID"
exit "$status"
