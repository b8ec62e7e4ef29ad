"""Writes launch/jobs/*.sh as `megatron-ru launch` renders them: python launch/render_jobs.py [--check]."""

import shlex
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "jobs"

_TRAIN = (
    "megatron-ru pretrain_gpt --ru-variant ru_7b3 --data-path data/ru --tokenizer-model data/ru.model "
    "--split 990,10,0 --tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer --bf16 "
    "--micro-batch-size 1 --global-batch-size 1024 --train-iters 1000 --lr 3e-4 --lr-decay-style cosine "
    "--lr-warmup-fraction 0.01 --min-lr 3e-5 --eval-interval 250 --eval-iters 10 "
    "--save runs/ru_7b3 --load runs/ru_7b3 --save-interval 250 --ru-metrics runs/ru_7b3/metrics.jsonl"
)
_TRAIN_13B = (
    "megatron-ru pretrain_gpt --ru-variant rugpt3_13b --data-path data/ru --tokenizer-model data/ru.model "
    "--split 990,10,0 --fp16 --use-distributed-optimizer --global-batch-size 1024 --train-iters 1000 --lr 1e-4 "
    "--eval-interval 250 --eval-iters 10 --save runs/rugpt3_13b --load runs/rugpt3_13b --save-interval 250"
)
# Each task of the array trains with a seed of its own, into a folder of its own.
_SEEDS = (
    "bash -c 'exec megatron-ru pretrain_gpt --ru-variant ru_demo --data-path data/ru "
    "--tokenizer-model data/ru.model --split 990,10,0 --micro-batch-size 4 --global-batch-size 32 --train-iters 1000 "
    '--lr 1e-3 --eval-interval 250 --eval-iters 10 --seed "$RU_ARRAY_INDEX" --save "runs/seed_$RU_ARRAY_INDEX" '
    "--save-interval 250'"
)

# Name of the file, what there is to know about it, and the words of `megatron-ru launch`.
EXAMPLES = (
    (
        "abci_v.sh",
        "13 billion parameters on V100 of 16 GB: TP 4 x PP 8 is one model on 8 nodes.",
        "abci-v --nodes 8 --time 72:00:00 --group gaa50000 --name rugpt3-13b --modules python/3.12 cuda/12.4 hpcx/2.20 "
        f"--virtual-environment .venv --preset 13b_v100 -- {_TRAIN_13B}",
    ),
    (
        "abci_a.sh",
        "USR1 five minutes before the limit: the ranks save, and the job goes back into the queue, 20 times at most.",
        "abci-a --nodes 4 --time 32:00:00 --group gaa50000 --name ru-7b3 --modules python/3.12 cuda/12.4 hpcx/2.20 "
        f"--virtual-environment .venv --signal USR1 --requeue --retries 20 --env NCCL_DEBUG=WARN -- {_TRAIN}",
    ),
    (
        "abci_h.sh",
        "The queue is rt_HF, whole nodes.",
        "abci-h --nodes 2 --time 24:00:00 --group gaa50000 --name ru-7b3 --modules python/3.12 cuda/12.6 hpcx/2.20 "
        f"--virtual-environment .venv -- {_TRAIN}",
    ),
    (
        "slurm.sh",
        "One task for each rank; a rank that fails or hangs costs one of three further attempts.",
        "slurm --nodes 2 --time 24:00:00 --cpus-per-task 8 --name ru-7b3 --virtual-environment .venv --retries 3 "
        f"-- {_TRAIN}",
    ),
    (
        "slurm_container.sh",
        "In a container of pyxis, with one torchrun for each node.",
        "slurm --nodes 2 --time 24:00:00 --cpus-per-task 8 --name ru-7b3 --torchrun "
        "--container nvcr.io#nvidia/pytorch:25.06-py3 --mounts /data:/data:ro "
        f"-- {_TRAIN}",
    ),
    (
        "slurm_array.sh",
        "Four seeds, two at once; bash inside each rank reads which one from RU_ARRAY_INDEX.",
        "slurm --gpus-per-node 1 --time 02:00:00 --cpus-per-task 8 --name seeds --array 1-4%2 "
        f"--virtual-environment .venv -- {_SEEDS}",
    ),
    (
        "slurm_chain.sh",
        "A chain: submit it three times, and each waits for the one before and goes on from its checkpoint.",
        "slurm --nodes 2 --time 24:00:00 --cpus-per-task 8 --name ru-7b3 --virtual-environment .venv "
        f"--dependency singleton -- {_TRAIN}",
    ),
)


def rendered(note: str, words: str) -> str:
    """The script with two lines more at its top: what to know, and where it came from."""
    from megatron_ru.commands.launch import job_of
    from megatron_ru.commands.main import build_parser, discover_commands
    from megatron_ru.launch.target import TARGETS

    arguments = build_parser(discover_commands()).parse_args(["launch", *shlex.split(words)])
    shebang, rest = TARGETS[arguments.target].render(job_of(arguments)).text.split("\n", 1)
    made = f"# Ready to edit; rendered by `megatron-ru launch {words.partition(' -- ')[0]} -- COMMAND`."
    return f"{shebang}\n# {note}\n{made}\n{rest}"


def main(words: list[str]) -> int:
    """0 when the files are written, or with --check when they are up to date; else 1."""
    stale = []
    for name, note, launch in EXAMPLES:
        path, text = FOLDER / name, rendered(note, launch)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path)
            if words != ["--check"]:
                path.write_text(text, encoding="utf-8")
    if words == ["--check"] and stale:
        print(f"stale: {', '.join(map(str, stale))}: python launch/render_jobs.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
