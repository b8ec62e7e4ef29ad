#!/bin/bash
# USR1 five minutes before the limit: the ranks save, and the job goes back into the queue, 20 times at most.
# Ready to edit; rendered by `megatron-ru launch abci-a --nodes 4 --time 32:00:00 --group gaa50000 --name ru-7b3 --modules python/3.12 cuda/12.4 hpcx/2.20 --virtual-environment .venv --signal USR1 --requeue --retries 20 --env NCCL_DEBUG=WARN -- COMMAND`.
# ABCI A nodes, 8 A100 each: 4 nodes x 8 GPUs = 32 ranks, TP 2 x PP 1 x DP 16. To submit: qsub -g gaa50000 FILE
#$ -cwd
#$ -N ru-7b3
#$ -l rt_AF=4
#$ -l h_rt=32:00:00
#$ -j y
#$ -o ./
#$ -r y
#$ -l s_rt=31:55:00
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

# Hosts, one to a line and perhaps repeated, as a hostfile with slots: each once, this host first, since rank 0 shall
# run where the meeting place is.
ru_with_slots() {
    local here
    here=$(hostname)
    awk -v here="${here%%.*}" -v slots="$1" '
        /^[ \t]*(#|$)/ || seen[$1]++ { next }
        { short = $1; sub(/\..*/, "", short); line = $1 " slots=" slots "\n" }
        short == here { first = first line; next }
        { rest = rest line }
        END { printf "%s%s", first, rest }'
}

# The hosts of this job, as the scheduler names them.
ru_hosts() {
    if [ -r "${SGE_JOB_HOSTLIST:-}" ]; then cat "$SGE_JOB_HOSTLIST"
    elif [ -r "${PE_HOSTFILE:-}" ]; then cat "$PE_HOSTFILE"
    else hostname
    fi
}

# A plain script knows no modules before this file is read; neither is written for set -u.
set +u
if [ -r /etc/profile.d/modules.sh ]; then source /etc/profile.d/modules.sh; fi
module load python/3.12 || { echo 'module python/3.12 could not be loaded: see module avail' >&2; exit 1; }
module load cuda/12.4 || { echo 'module cuda/12.4 could not be loaded: see module avail' >&2; exit 1; }
module load hpcx/2.20 || { echo 'module hpcx/2.20 could not be loaded: see module avail' >&2; exit 1; }
set -u

set +u
source .venv/bin/activate
set -u

# Variables of every rank.
export NCCL_DEBUG=WARN

# What every rank runs.
ru_command=(
    megatron-ru pretrain_gpt
    --ru-variant ru_7b3
    --data-path data/ru
    --tokenizer-model data/ru.model
    --split 990,10,0
    --tensor-model-parallel-size 2
    --sequence-parallel
    --use-distributed-optimizer
    --bf16
    --micro-batch-size 1
    --global-batch-size 1024
    --train-iters 1000
    --lr 3e-4
    --lr-decay-style cosine
    --lr-warmup-fraction 0.01
    --min-lr 3e-5
    --eval-interval 250
    --eval-iters 10
    --save runs/ru_7b3
    --load runs/ru_7b3
    --save-interval 250
    --ru-metrics runs/ru_7b3/metrics.jsonl
)

# What runs guard and keepers.
ru_python=python3
if ! "$ru_python" -m megatron_ru guard --help >/dev/null 2>&1; then
    echo "$ru_python ($(command -v "$ru_python" || echo none on PATH)) cannot import megatron_ru, \
which is to guard this job: name an environment that holds it with --virtual-environment FOLDER, or say --no-guard" >&2
    exit 2
fi

# It comes to this shell too, which would end by it; mpirun passes it on to the ranks.
trap : USR1

ru_hostfile=$(mktemp)
trap 'rm -f "$ru_hostfile"' EXIT
ru_hosts | ru_with_slots 8 >"$ru_hostfile"

MASTER_ADDR=$(ru_first_address bond0)
MASTER_PORT=$(ru_free_port "$JOB_ID" "$MASTER_ADDR")
export MASTER_ADDR MASTER_PORT

ru_found=$(wc -l <"$ru_hostfile")
if [ "$ru_found" -ne 4 ]; then
    echo "this script is made for 4 nodes, and there are $ru_found: $(tr '\n' ' ' <"$ru_hostfile")" >&2
    exit 1
fi

# Ranks on other hosts see only what is named here.
ru_travels=()
for ru_name in MASTER_ADDR MASTER_PORT PATH LD_LIBRARY_PATH PYTHONPATH VIRTUAL_ENV RU_ARRAY_INDEX NCCL_DEBUG; do
    if [ -n "${!ru_name+set}" ]; then ru_travels+=(-x "$ru_name"); fi
done

# With the keepalive options mpirun ends when a host is gone, instead of waiting for ever.
"$ru_python" -m megatron_ru guard --job "$JOB_ID" --address "$MASTER_ADDR" --retries 20 -- \
    mpirun -np 32 -npernode 8 \
    -hostfile "$ru_hostfile" --bind-to none \
    -mca oob_tcp_keepalive_time 5 -mca oob_tcp_keepalive_intvl 2 -mca oob_tcp_keepalive_probes 3 \
    "${ru_travels[@]}" -x RU_GUARD -x RU_GUARD_JOB -x RU_ATTEMPT \
    bash -c 'export RANK="$OMPI_COMM_WORLD_RANK" WORLD_SIZE="$OMPI_COMM_WORLD_SIZE" LOCAL_RANK="$OMPI_COMM_WORLD_LOCAL_RANK" LOCAL_WORLD_SIZE="$OMPI_COMM_WORLD_LOCAL_SIZE"; exec "$@"' rank \
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

# Grid Engine would take a job back at code 99, and hold it at 100, whatever a rank meant by them.
if [ "$ru_code" -eq 99 ] || [ "$ru_code" -eq 100 ]; then ru_code=1; fi

# 75: saved at a signal, or ended by the guard, and worth another start. Grid Engine takes a job back at code 99.
ru_count=./.ru-7b3.requeues.$JOB_ID.${SGE_TASK_ID:-}
if [ "$ru_code" -eq 75 ]; then
    ru_times=$(tr -dc 0-9 2>/dev/null <"$ru_count" || true)
    ru_times=${ru_times:-0}
    if [ "$ru_times" -lt 20 ]; then
        printf '%s\n' "$((ru_times + 1))" >"$ru_count.new"
        mv "$ru_count.new" "$ru_count"
        echo "back into the queue, for time $((ru_times + 1)) of at most 20" >&2
        exit 99
    fi
fi
rm -f "$ru_count"
exit "$ru_code"
