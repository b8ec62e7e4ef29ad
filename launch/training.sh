# shellcheck shell=bash disable=SC2034
# The run, the same for every launcher. Edit it, or set a name from outside:
#     VARIANT=llama3_8b TP=4 bash launch/torchrun_one_node.sh

: "${VARIANT:=ru_7b3}"
: "${DATA:=data/ru}" # data/ru.bin and data/ru.idx, from `megatron-ru data tokenize`
: "${TOKENIZER:=data/ru.model}"
: "${RUN:=runs/$VARIANT}" # checkpoints and metrics; a run that is started again goes on from its last checkpoint

: "${TP:=2}" # tensor parallel: within one node
: "${PP:=1}" # pipeline parallel; data parallel is what remains: processes / (TP x PP)
: "${MICRO_BATCH:=1}"
: "${GLOBAL_BATCH:=1024}" # sequences; 1024 of 4096 tokens are 4M tokens
: "${STEPS:=1000}"
: "${LR:=3e-4}"
: "${SAVE_EVERY:=250}"

TRAINING=(
    --ru-variant "$VARIANT"
    --data-path "$DATA" --tokenizer-model "$TOKENIZER" --split "990,10,0"
    --tensor-model-parallel-size "$TP" --sequence-parallel --pipeline-model-parallel-size "$PP"
    --use-distributed-optimizer --bf16
    --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH" --train-iters "$STEPS"
    --lr "$LR" --lr-decay-style cosine --lr-warmup-fraction 0.01 --min-lr 3e-5
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95
    --eval-interval "$SAVE_EVERY" --eval-iters 10
    --save "$RUN" --load "$RUN" --save-interval "$SAVE_EVERY"
    --log-interval 1 --ru-metrics "$RUN/metrics.jsonl"
)
