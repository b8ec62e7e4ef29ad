"""The demo: from text to a Russian model that was trained with tensor and pipeline parallelism, and restarted once."""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ru.experiments.corpus import Corpus, make_dataset, make_tokenizer, write_dictionary
from megatron_ru.experiments.folder import prepare_folder
from megatron_ru.experiments.launcher import Launcher, child_environment, find_launcher
from megatron_ru.experiments.metrics import Metrics, MetricsReader
from megatron_ru.experiments.process import RunFailed, run_logged
from megatron_ru.experiments.progress import Progress, Remaining, duration
from megatron_ru.figures.png import require_matplotlib, write_curves
from megatron_ru.figures.series import running_mean
from megatron_ru.figures.terminal_plot import terminal_plot
from megatron_ru.figures.text_table import text_table
from megatron_ru.foundation.files import atomic_output

TENSOR_PARALLEL = 2
PIPELINE_PARALLEL = 2
RANKS = TENSOR_PARALLEL * PIPELINE_PARALLEL

MARKER = ".megatron-ru-demo"
OUTPUTS = (
    "text.jsonl", "tokenizer.model", "dataset.bin", "dataset.idx", "dataset_cache", "checkpoint", "metrics.jsonl",
    "train.log", "generate.log", "continuation.txt", "loss.png", "summary.json",
)  # fmt: skip
"""What a run leaves in its folder, besides the marker and matplotlib's cache."""


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Sizes of the demo."""

    entries: int = 30_000
    """Dictionary entries: text for more than four times the training."""
    vocab_size: int = 4096
    steps: int = 190
    stop_at: int = 100
    """The step at which training is stopped and started again from its checkpoint."""
    micro_batch: int = 8
    global_batch: int = 16
    learning_rate: float = 3e-3
    warmup: int = 20
    evaluate_every: int = 50
    """Does not divide `steps`: Megatron evaluates at the end by itself."""
    evaluate_batches: int = 8
    improvement: float = 0.35
    """By how much, at least, the validation loss must fall."""
    prompts: tuple[str, ...] = ("берёза — дерево", "учитель — тот, кто", "бежать —")
    tokens: int = 60


QUICK = DemoSettings(
    entries=3000, vocab_size=1024, steps=24, stop_at=16, warmup=4, evaluate_every=16, evaluate_batches=2,
    improvement=0.05, prompts=("берёза —",), tokens=20,
)  # fmt: skip
"""All stages in about a minute, with a model that has seen next to nothing."""

SEQUENCE = 128


def run_demo(folder: Path, settings: DemoSettings) -> dict[str, Any]:
    """Runs every stage, prints as it goes, and returns what it writes to summary.json.

    Raises `UserError` for a folder or an installation that will not do, RunFailed when a stage fails or the model
    did not learn.
    """
    require_matplotlib(folder / ".cache")
    prepare_folder(folder, MARKER, OUTPUTS)
    folder = folder.resolve()
    launcher = find_launcher(RANKS)
    clock = _Clock()

    progress = Progress("text")
    entries = write_dictionary(folder / "text.jsonl", settings.entries)
    size = (folder / "text.jsonl").stat().st_size
    progress.done(f"{entries} entries of the Russian dictionary, {size / 1e6:.1f} MB")
    clock.lap("text")

    progress = Progress("tokenizer")
    make_tokenizer(folder / "text.jsonl", folder / "tokenizer.model", settings.vocab_size)
    progress.done(f"BPE, {settings.vocab_size} tokens, one per digit")
    clock.lap("tokenizer")

    progress = Progress("dataset")
    corpus = make_dataset(
        folder / "text.jsonl", folder / "tokenizer.model", folder / "dataset", workers=min(2, os.cpu_count() or 1)
    )
    progress.done(f"{corpus.tokens} tokens in .bin and .idx")
    clock.lap("dataset")

    metrics = _train(folder, corpus, launcher, settings, clock)
    texts = _generate(folder, settings)
    clock.lap("continuation")
    summary = _summary(folder, settings, corpus, launcher, metrics, texts)
    _draw(folder, metrics)
    clock.lap("figure")
    summary["seconds"] = clock.laps
    with atomic_output(folder / "summary.json", "w", encoding="utf-8") as stream:
        json.dump(summary, stream, ensure_ascii=False, indent=2)
    print(closing_table(summary))
    print(f"\nthe figure is {folder / 'loss.png'}, all the rest is beside it")
    _check_learned(summary, settings, folder)
    return summary


def training_words(folder: Path, corpus: Corpus, settings: DemoSettings) -> list[str]:
    """The arguments of `pretrain_gpt` that both halves of the training share."""
    values = {
        "--ru-variant": "ru_demo",
        "--device": "cpu",
        "--tensor-model-parallel-size": TENSOR_PARALLEL,
        "--pipeline-model-parallel-size": PIPELINE_PARALLEL,
        "--data-path": corpus.prefix,
        "--data-cache-path": folder / "dataset_cache",
        "--split": "97,3,0",
        "--tokenizer-type": "SentencePieceTokenizer",
        "--tokenizer-model": corpus.tokenizer,
        "--seq-length": SEQUENCE,
        "--micro-batch-size": settings.micro_batch,
        "--global-batch-size": settings.global_batch,
        "--train-iters": settings.steps,
        # √(2/5h) for 192 channels (Nguyen and Salazar, 2019); Megatron's 0.02 is made for thousands.
        "--init-method-std": 0.0456,
        "--lr": settings.learning_rate,
        "--min-lr": settings.learning_rate / 10,
        "--lr-decay-style": "cosine",
        "--lr-warmup-iters": settings.warmup,
        "--weight-decay": 0.1,
        "--adam-beta2": 0.95,
        "--clip-grad": 1.0,
        "--seed": 1234,
        "--log-interval": 1,
        "--eval-interval": settings.evaluate_every,
        "--eval-iters": settings.evaluate_batches,
        "--save": folder / "checkpoint",
        "--save-interval": 10 * settings.steps,
        "--ru-metrics": folder / "metrics.jsonl",
    }
    return [*(word for flag, value in values.items() for word in (flag, str(value))), "--ru-validate-from-start"]


def closing_table(summary: dict[str, Any]) -> str:
    """The figures of a run as text."""
    rows = [
        [f"{name} loss", f"{found['first']:.3f}", f"{found['last']:.3f}", f"{-100 * found['improvement']:+.1f} %"]
        for name, found in (("validation", summary["validation"]), ("training", summary["training"]))
    ]
    table = text_table(["", "first", "last", "change"], rows, right={1, 2, 3})
    lines = ["", table, ""]
    for step, before, after in summary["restarts"]:
        restored = "the same after it" if before == after else f"{after:.6f} after it"
        lines.append(f"restart at step {step}: validation loss {before:.6f} before it, {restored}")
    lines.append(
        f"{summary['tokens_trained']} tokens trained on, {summary['tokens_per_second']:.0f} tokens/s "
        f"on {RANKS} processes ({summary['launcher']}), TP {TENSOR_PARALLEL} x PP {PIPELINE_PARALLEL}"
    )
    ranks = summary["parameters_per_rank"]
    if ranks:
        shown = ", ".join(f"{name}: {count}" for name, count in sorted(ranks.items()))
        lines.append(f"parameters per rank: {shown} (both stages hold the shared embedding)")
    laps = ", ".join(f"{name} {duration(value)}" for name, value in summary["seconds"].items())
    lines.append(f"time: {duration(sum(summary['seconds'].values()))} ({laps})")
    return "\n".join(lines)


def parameters_per_rank(log: Path) -> dict[str, int]:
    """{"TP 0 PP 1": parameters} as Megatron printed them."""
    found = {}
    pattern = re.compile(r"number of parameters on \(([\w, ]+)\) model parallel rank \(([\d, ]+)\): (\d+)")
    for names, ranks, count in pattern.findall(log.read_text(encoding="utf-8", errors="replace")):
        # Some versions count further kinds of parallelism between the two.
        place = dict(zip(names.split(", "), ranks.split(", "), strict=True))
        found[f"TP {place['tensor']} PP {place['pipeline']}"] = int(count)
    return found


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = now - self._since
        self._since = now


def _train(folder: Path, corpus: Corpus, launcher: Launcher, settings: DemoSettings, clock: _Clock) -> Metrics:
    words = training_words(folder, corpus, settings)
    halves = (
        ("training", settings.stop_at, ["--exit-interval", str(settings.stop_at)]),
        ("training resumed", settings.steps, ["--load", str(folder / "checkpoint")]),
    )
    reader = MetricsReader(folder / "metrics.jsonl")
    print(f"starting {RANKS} processes with {launcher.name} ({launcher.reason})")
    for title, last, extra in halves:
        progress = Progress(title)
        run_logged(
            title,
            [*launcher.words, "-m", "megatron_ru.pretrain_gpt", *words, *extra],
            folder / "train.log",
            child_environment(),
            _watch(progress, reader, last, settings),
        )
        metrics = reader.metrics
        step = max(metrics.train, default=0)
        if step < last:
            raise RunFailed(f"{title} ended at step {step} of {last}; the whole log is {folder / 'train.log'}")
        progress.done(f"step {step}, loss {metrics.train[step]:.3f}, validation {metrics.validation[step]:.3f}, saved")
        clock.lap(title)
    return reader.metrics


def _watch(progress: Progress, reader: MetricsReader, last: int, settings: DemoSettings) -> Callable[[], None]:
    remaining = Remaining()
    first = max(reader.metrics.train, default=0)

    def watch() -> None:
        metrics = reader.update()
        step = max(metrics.train, default=0)
        if step <= first:
            progress("starting processes")
            return
        recent = sorted(metrics.step_seconds.items())[-10:]
        speed = settings.global_batch * SEQUENCE * len(recent) / sum(seconds for _, seconds in recent)
        parts = [f"step {step}/{settings.steps}", f"loss {metrics.train[step]:.3f}"]
        if metrics.validation:
            parts.append(f"validation {metrics.validation[max(metrics.validation)]:.3f}")
        parts += [f"{speed:.0f} tokens/s", remaining.text(step, last)]
        progress("  ".join(parts), (step - first) / (last - first))

    return watch


def _generate(folder: Path, settings: DemoSettings) -> str:
    progress = Progress("continuation")
    progress("loading the checkpoint into one process")
    words = [
        "generate", "--load", str(folder / "checkpoint"), "--device", "cpu", "--ru-variant", "ru_demo",
        "--tokenizer-model", str(folder / "tokenizer.model"), "--tokens", str(settings.tokens),
        "--temperature", "0.6", "--top-p", "0.9",
    ]  # fmt: skip
    for prompt in settings.prompts:
        words += ["--prompt", prompt]
    answer = folder / "continuation.txt"
    run_logged(
        "the continuation",
        [sys.executable, "-m", "megatron_ru", *words],
        folder / "generate.log",
        child_environment(),
        stdout=answer,
    )
    text = answer.read_text(encoding="utf-8").rstrip("\n")
    progress.done(f"{len(settings.prompts)} sampled from the checkpoint, loaded at TP 1 x PP 1")
    print("\n".join(f"    {line}" for line in text.splitlines()))
    return text


def _summary(
    folder: Path, settings: DemoSettings, corpus: Corpus, launcher: Launcher, metrics: Metrics, texts: str
) -> dict[str, Any]:
    validation = metrics.first_and_last_validation()
    assert validation is not None
    steps = sorted(metrics.train)
    last = steps[-10:]
    tokens_per_step = settings.global_batch * SEQUENCE
    return {
        "validation": _change(*validation),
        "training": _change(metrics.train[steps[0]], sum(metrics.train[step] for step in last) / len(last)),
        "restarts": metrics.repeated,
        "tokens_in_dataset": corpus.tokens,
        "tokens_trained": tokens_per_step * settings.steps,
        "tokens_per_second": tokens_per_step / (metrics.median_step_seconds() or 1.0),
        "launcher": launcher.name,
        "parameters_per_rank": parameters_per_rank(folder / "train.log"),
        "continuation": texts,
        "settings": asdict(settings),
    }


def _change(first: float, last: float) -> dict[str, float]:
    return {"first": first, "last": last, "improvement": 1 - last / first}


def _draw(folder: Path, metrics: Metrics) -> None:
    train, validation = metrics.train_series(), metrics.validation_series()
    print()
    print(terminal_plot([running_mean(train, 5), validation], x_label="step"))
    write_curves(
        folder / "loss.png",
        f"ru_demo at TP={TENSOR_PARALLEL} x PP={PIPELINE_PARALLEL} on a CPU",
        lines=[train],
        smooth=[running_mean(train, 10)],
        points=[validation],
    )


def _check_learned(summary: dict[str, Any], settings: DemoSettings, folder: Path) -> None:
    found = summary["validation"]["improvement"]
    if found < settings.improvement:
        raise RunFailed(
            f"the validation loss fell by {100 * found:.1f} %, expected at least {100 * settings.improvement:.0f} %; "
            f"the whole log is {folder / 'train.log'}"
        )
