"""Real training runs of several processes on the CPU: their losses are compared step by step."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_ru.foundation.ranks import free_port
from megatron_ru.text.document import Document
from megatron_ru.text.jsonl import write_documents
from megatron_ru.tokenizer.training import TokenizerSettings, train_tokenizer
from megatron_ru.tokens.tokenise import TokeniseSettings, tokenise

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Run:
    """What one training run left behind."""

    def __init__(self, returncode: int, output: str, metrics: Path):
        self.returncode = returncode
        self.output = output
        self.metrics = metrics

    @property
    def losses(self) -> dict[int, float]:
        """The training loss by step."""
        lines = [json.loads(line) for line in self.metrics.read_text().splitlines()]
        return {line["iteration"]: line["lm loss"] for line in lines if "lm loss" in line}

    def assert_trained(self, steps: range) -> None:
        """Fails with the end of the log unless exactly these steps were logged and the exit code is 0."""
        assert self.returncode == 0, self.output[-4000:]
        assert list(self.losses) == list(steps), self.output[-4000:]


class Trainer:
    """Starts runs of a tiny model on a tiny Russian dataset."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.prefix = folder / "text"
        self.tokenizer = folder / "tokenizer.model"

    def words(self, *extra: str, name: str, steps: int = 20) -> list[str]:
        """The arguments of one run; its metrics go to `name`.jsonl."""
        given = " ".join(extra)
        model = () if "--ru-variant" in given else ("--ru-variant", "llama3_tiny", "--num-layers", "4")
        return [
            *model, *f"""
            --seq-length 64 --micro-batch-size 2 --global-batch-size 8 --train-iters {steps} --lr 3e-3 --min-lr 3e-4
            --lr-decay-style cosine --lr-decay-iters 20 --weight-decay 0.1 --split 90,5,5 --log-interval 1
            --eval-iters 0 --eval-interval 1000 --seed 7 --device cpu --tokenizer-type SentencePieceTokenizer
            """.split(),
            "--data-path", str(self.prefix), "--tokenizer-model", str(self.tokenizer),
            "--ru-metrics", str(self.folder / f"{name}.jsonl"), *extra,
        ]  # fmt: skip

    def command(self, processes: int) -> list[str]:
        """Our own entry under torchrun, or plainly when it is one process."""
        if processes == 1:
            return [sys.executable, "-m", "megatron_ru.pretrain_gpt"]
        return [*torchrun(processes), "-m", "megatron_ru.pretrain_gpt"]

    def run(self, processes: int, *extra: str, name: str, steps: int = 20, command: list[str] | None = None,
            environment: dict[str, str] | None = None, timeout: float = 240) -> Run:  # fmt: skip
        """Trains to the end."""
        words = [*(command or self.command(processes)), *self.words(*extra, name=name, steps=steps)]
        done = subprocess.run(
            words, env=clean_environment(environment), cwd=self.folder, capture_output=True, text=True, timeout=timeout
        )
        return Run(done.returncode, done.stdout + done.stderr, self.folder / f"{name}.jsonl")

    def start(self, processes: int, *extra: str, name: str) -> subprocess.Popen[str]:
        """Starts a run in a process group of its own and returns at once."""
        words = [*self.command(processes), *self.words(*extra, name=name)]
        log = (self.folder / f"{name}.log").open("w")
        return subprocess.Popen(
            words, env=clean_environment(), cwd=self.folder, stdout=log, stderr=log, text=True, start_new_session=True
        )


def torchrun(processes: int) -> list[str]:
    """torchrun on a free port of this machine."""
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}",
            f"--master-port={free_port()}"]  # fmt: skip


def clean_environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """This process's environment without anybody's ranks, one thread for each process."""
    kept = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths)), **(extra or {})}


def relative_difference(run: Run, other: Run) -> float:
    """The largest relative difference of the losses over the steps of `other`."""
    reference = run.losses
    return max(abs(reference[step] - loss) / reference[step] for step, loss in other.losses.items())


def wait_for_step(metrics: Path, step: int, process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Returns once the run has logged the step."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        if metrics.exists() and metrics.read_text().count('"lm loss"') >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not logged; exit code {process.poll()}")


def kill_group(process: subprocess.Popen[str]) -> None:
    """Ends a run that `Trainer.start` started, with all its ranks."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Trainer on 600 small Russian documents and a tokenizer of 500 pieces made from them."""
    folder = tmp_path_factory.mktemp("training")
    words = ("модель", "учится", "читать", "русский", "текст", "каждый", "день", "и", "слово", "за", "словом", "растёт")
    texts = [
        " ".join(words[(7 * document + 5 * place * place) % len(words)] for place in range(20 + document % 40)) + "."
        for document in range(600)
    ]
    source = folder / "text.jsonl"
    write_documents(source, (Document(text=text) for text in texts))
    train_tokenizer(texts, folder / "tokenizer.model", TokenizerSettings(vocab_size=320))
    tokenise([source], folder / "tokenizer.model", folder / "text", TokeniseSettings(workers=1))
    return Trainer(folder)


@pytest.fixture(scope="session")
def single(trainer: Trainer) -> Run:
    """Twenty steps of one process: what every layout must reproduce."""
    run = trainer.run(1, name="single")
    run.assert_trained(range(1, 21))
    assert run.losses[20] < run.losses[1] - 0.5, "the model must learn, or equal losses prove nothing"
    return run
