#!/usr/bin/env bash
# Trains a recipe on a GPU cluster under Slurm. Run it from the repository, with an
# environment that all nodes see:
#
#     sbatch --nodes 8 launch/slurm.sh configs/scratch_1b.py [--train.steps 100 ...]
#
# The same command continues the run from its newest checkpoint. The job exits with
# status 0 after the last step, and with 143 after Slurm has stopped it and it has saved:
# submit it again.
# Nodes times GPUs of a node must be the product of the recipe's mesh axes. train.out, data.token_cache
# and data.source must be on a disk that all nodes see.
#
# Change here or on sbatch's command line: the GPUs of a node (two lines), the time, and
# other options that the cluster requires (--partition, --account). The environment
# variable LADDER_JAX is the command (default: .venv/bin/ladder-jax). The program sets
# XLA's options for GPUs itself: see ladder_jax/hardware/xla_options.py.
#
#SBATCH --job-name=ladder-jax
# One process a GPU, as JAX expects under Slurm. Five minutes before the end of the time
# limit, Slurm sends SIGTERM, and ladder-jax saves and exits.
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
set -euo pipefail
: "${1:?a recipe, such as configs/scratch_1b.py}"

# Each process must see all GPUs of its node: JAX gives it the one of its local number.
exec srun --gpu-bind=none --kill-on-bad-exit=1 \
    "${LADDER_JAX:-.venv/bin/ladder-jax}" train "$@" --distributed --resume
