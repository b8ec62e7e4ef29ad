#!/usr/bin/env bash
# One task for each GPU: sbatch launch/slurm.sh, from the root of the clone, on a file system that all nodes see.
#SBATCH --job-name=megatron-ru
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out
set -euo pipefail
# Slurm runs a copy of this file, in the folder of sbatch.
source launch/training.sh

# A rank that fails takes the others with it instead of leaving them waiting.
exec srun --kill-on-bad-exit=1 .venv/bin/megatron-ru pretrain_gpt "${TRAINING[@]}" "$@"
