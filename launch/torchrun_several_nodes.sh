#!/usr/bin/env bash
# Several machines without a scheduler: run it on each, with its own NODE, from the root of the clone.
#     NODE=0 MASTER=10.0.0.1 bash launch/torchrun_several_nodes.sh      # on 10.0.0.1
#     NODE=1 MASTER=10.0.0.1 bash launch/torchrun_several_nodes.sh      # on the second
set -euo pipefail
source launch/training.sh

: "${NODES:=2}"
: "${NODE:?the number of this machine, from 0}"
: "${MASTER:?an address of machine 0 that all others reach}"
: "${PORT:=29500}" # free on machine 0
: "${GPUS:=8}"     # of each machine

exec .venv/bin/torchrun --nnodes "$NODES" --node-rank "$NODE" --nproc-per-node "$GPUS" \
    --master-addr "$MASTER" --master-port "$PORT" -m megatron_ru.pretrain_gpt "${TRAINING[@]}" "$@"
