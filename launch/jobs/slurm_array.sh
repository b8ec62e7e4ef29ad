#!/bin/bash
# Four seeds, two at once; bash inside each rank reads which one from RU_ARRAY_INDEX.
# Ready to edit; rendered by `megatron-ru launch slurm --gpus-per-node 1 --time 02:00:00 --cpus-per-task 8 --name seeds --array 1-4%2 --virtual-environment .venv -- COMMAND`.
# Slurm: 1 node x 1 GPU = 1 rank. To submit: sbatch FILE
#SBATCH --job-name=seeds
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --output=./slurm-%A_%a.out
#SBATCH --no-requeue
#SBATCH --cpus-per-task=8
#SBATCH --time=02:00:00
#SBATCH --array=1-4%2
# shellcheck disable=SC1091,SC2016,SC2054
set -euo pipefail

# The first global IPv4 address of the interfaces named, else of any that leads out of this host, else what its name
# stands for, else the name.
ru_first_address() {
    local interface address
    for interface in "$@"; do
        address=$(ip -4 -o addr show dev "$interface" scope global 2>/dev/null |
            awk 'NR == 1 { sub(/\/.*/, "", $4); print $4 }') || true
        if [ -n "$address" ]; then printf '%s\n' "$address"; return; fi
    done
    address=$(ip -4 -o addr show scope global 2>/dev/null |
        awk '$2 !~ /^(docker|virbr|veth|br-)/ && !n++ { sub(/\/.*/, "", $4); print $4 }') || true
    if [ -z "$address" ]; then
        address=$(getent ahostsv4 "$(hostname)" 2>/dev/null | awk '$1 !~ /^127\./ && !n++ { print $1 }') || true
    fi
    printf '%s\n' "${address:-$(hostname)}"
}

# 10000 + job number mod 20000, below the ports that outgoing connections take; the next one where somebody listens.
ru_free_port() {
    local number=${1//[!0-9]/} port host tries
    number=${number:0:15}
    port=$((10000 + 10#${number:-0} % 20000))
    for ((tries = 0; tries < 100; tries++)); do
        for host in 127.0.0.1 "$2"; do
            if timeout 2 bash -c 'exec 3<>"/dev/tcp/$0/$1"' "$host" "$port" 2>/dev/null; then
                port=$((10000 + (port - 9999) % 20000))
                continue 2
            fi
        done
        printf '%s\n' "$port"
        return
    done
    echo "100 ports up to $port are taken on $2: is something left over from another job?" >&2
    return 1
}

set +u
source .venv/bin/activate
set -u

# What every rank runs.
ru_command=(
    bash -c 'exec megatron-ru pretrain_gpt --ru-variant ru_demo --data-path data/ru --tokenizer-model data/ru.model --split 990,10,0 --micro-batch-size 4 --global-batch-size 32 --train-iters 1000 --lr 1e-3 --eval-interval 250 --eval-iters 10 --seed "$RU_ARRAY_INDEX" --save "runs/seed_$RU_ARRAY_INDEX" --save-interval 250'
)

# What runs guard and keepers.
ru_python=python3
if ! "$ru_python" -m megatron_ru guard --help >/dev/null 2>&1; then
    echo "$ru_python ($(command -v "$ru_python" || echo none on PATH)) cannot import megatron_ru, \
which is to guard this job: name an environment that holds it with --virtual-environment FOLDER, or say --no-guard" >&2
    exit 2
fi

export RU_ARRAY_INDEX="$SLURM_ARRAY_TASK_ID"

MASTER_ADDR=$(ru_first_address bond0)
MASTER_PORT=$(ru_free_port "$SLURM_JOB_ID" "$MASTER_ADDR")
export MASTER_ADDR MASTER_PORT

# A rank that fails takes the others with it instead of leaving them waiting.
export RU_LOCAL_SIZE=1
"$ru_python" -m megatron_ru guard --job "$SLURM_JOB_ID" --address "$MASTER_ADDR" -- \
    srun --kill-on-bad-exit=1 --cpus-per-task=8 \
    bash -c 'export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID" LOCAL_WORLD_SIZE="$RU_LOCAL_SIZE"; exec "$@"' rank \
    "$ru_python" -m megatron_ru keep -- "${ru_command[@]}" <&0 &
ru_guard=$!
# The guard passes signals on to the ranks; this shell outlives them, to clean up.
trap 'kill -USR1 "$ru_guard" 2>/dev/null || true' USR1
trap 'kill -USR2 "$ru_guard" 2>/dev/null || true' USR2
trap 'kill -TERM "$ru_guard" 2>/dev/null || true' TERM
trap 'kill -INT "$ru_guard" 2>/dev/null || true' INT
while kill -0 "$ru_guard" 2>/dev/null; do wait "$ru_guard" || true; done
ru_code=0
wait "$ru_guard" || ru_code=$?
exit "$ru_code"
