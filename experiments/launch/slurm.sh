#!/bin/bash
# sbatch --nodes=4 experiments/launch/slurm.sh --config experiments/quickstart.py --workdir /shared/runs/x [--config.KEY=VALUE ...]
#
# One task a GPU: JAX gives each task its own (with SLURM_LOCALID), and finds the others from the variables of srun.
#SBATCH --job-name=sorax
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# All end when one does; the job is put back in the queue and goes on from the last checkpoint.
srun --kill-on-bad-exit=1 --label sorax train "$@" || { [ -n "${SLURM_RESTART_COUNT:-}" ] && [ "$SLURM_RESTART_COUNT" -ge 20 ] || scontrol requeue "$SLURM_JOB_ID"; exit 1; }
