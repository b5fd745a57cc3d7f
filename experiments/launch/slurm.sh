#!/bin/bash
# sbatch --nodes=4 experiments/launch/slurm.sh --config experiments/quickstart.py --workdir /shared/runs/x ...
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

# All end when one does. Put in the queue again, the job goes on from the last checkpoint.
srun --kill-on-bad-exit=1 --label sorax train "$@"
