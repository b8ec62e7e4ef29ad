#!/usr/bin/env bash
# Open MPI over the machines of a hostfile, with lines such as `node1 slots=8`. Run from the root of the clone, which
# lies under the same path on every machine. No address and no port: the ranks learn them over MPI.
set -euo pipefail
source launch/training.sh

: "${HOSTFILE:=hostfile}"
: "${PROCESSES:=16}"
: "${GPUS:=8}" # of each machine

exec mpirun -np "$PROCESSES" --hostfile "$HOSTFILE" --map-by "ppr:$GPUS:node" --bind-to none \
    "$PWD/.venv/bin/megatron-ru" pretrain_gpt "${TRAINING[@]}" "$@"
