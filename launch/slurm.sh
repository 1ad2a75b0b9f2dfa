#!/usr/bin/env bash
# Trains a recipe on a GPU cluster under Slurm. From the repository, with an environment that all nodes see:
#
#     sbatch --nodes 8 launch/slurm.sh configs/scratch_1b.py [--train.steps 100 ...]
#
# Submitted again, it continues from the newest checkpoint. Nodes times GPUs must be the product of the recipe's mesh;
# train.out, data.token_cache and data.source must be on a disk that all nodes see.
#
# Change here or on sbatch's command line: GPUs of a node (both lines), time, and what the cluster asks for besides
# (--partition, --account). Environment: LADDER_JAX, the command (default .venv/bin/ladder-jax).
#
#SBATCH --job-name=ladder-jax
# One process a GPU, as JAX expects under Slurm. Five minutes before the time is over, ladder-jax saves and exits.
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
set -euo pipefail
: "${1:?a recipe, such as configs/scratch_1b.py}"

# Without the first of these XLA runs next to nothing behind an all-reduce, without the second it merges a layer's two.
XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"
export XLA_FLAGS="--xla_gpu_all_reduce_combine_threshold_bytes=0 $XLA_FLAGS"

# Every process sees all GPUs of its node and takes the one of its own number, so none may be bound to it.
exec srun --gpu-bind=none --kill-on-bad-exit=1 \
    "${LADDER_JAX:-.venv/bin/ladder-jax}" train "$@" --distributed --resume
