#!/usr/bin/env bash
# One machine, one process for each of its GPUs. Run from the root of the clone; words behind go to pretrain_gpt.
set -euo pipefail
source launch/training.sh

: "${GPUS:=8}"

exec .venv/bin/torchrun --nproc-per-node "$GPUS" -m megatron_ru.pretrain_gpt "${TRAINING[@]}" "$@"
