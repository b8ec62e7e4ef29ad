"""The published comparisons of architectures, repeated with toy models on real text."""

import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ru.experiments.corpus import Corpus, make_dataset, make_tokenizer, write_dictionary
from megatron_ru.experiments.folder import prepare_folder
from megatron_ru.experiments.ladder_report import LadderRun, draw_figures, table_text
from megatron_ru.experiments.launcher import child_environment
from megatron_ru.experiments.metrics import MetricsReader, read_metrics
from megatron_ru.experiments.process import RunFailed, run_logged
from megatron_ru.experiments.progress import Progress, Remaining
from megatron_ru.experiments.published import TABLES
from megatron_ru.figures.png import require_matplotlib
from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.files import atomic_output
from megatron_ru.models.parameter_count import count_parameters
from megatron_ru.models.variant import ARCHITECTURE_FIELDS, Variant, find_variant
from megatron_ru.models.variant_arguments import refine
from megatron_ru.tokenizer.loading import load_tokenizer
from megatron_ru.tokens.indexed_dataset import check_dataset

MARKER = ".megatron-ru-ladder"


@dataclass(frozen=True, kw_only=True)
class LadderSettings:
    """Sizes and recipe, the same for every variant. Raises `UserError` for less than ten steps."""

    steps: int = 200
    layers: int = 3
    hidden: int = 128
    heads: int = 4
    sequence: int = 128
    batch: int = 16
    """Sequences in a step."""
    learning_rate: float = 2e-3
    seed: int = 1234
    """Of the weights and of the order of the data."""
    evaluate_batches: int = 24
    vocab_size: int = 2048
    """Of the tokenizer that is trained when none is given."""
    entries: int = 20_000
    """Dictionary entries, when no data is given."""

    @property
    def init_std(self) -> float:
        """√(2/5h), the small initialisation of Nguyen and Salazar (2019).

        Megatron's 0.02 is made for thousands of channels: with it the gated blocks of so narrow a model begin with
        outputs of next to nothing, and 200 steps are not enough to grow them.
        """
        return math.sqrt(2 / (5 * self.hidden))

    def __post_init__(self) -> None:
        if self.steps < 10:
            raise UserError(f"--steps is {self.steps}, expected at least 10: fewer show no difference")


def run_ladder(
    folder: Path, tables: Sequence[str], settings: LadderSettings, data: str | None, tokenizer: str | None, jobs: int
) -> list[LadderRun]:
    """Trains what the tables name, prints them beside the published ones, writes figures and results.json.

    A variant that an earlier call has trained in this folder with the same settings is not trained again, and
    architectures that stand in two tables are trained once. Raises `UserError` for bad input, RunFailed when a
    run fails.
    """
    if jobs < 1:
        raise UserError(f"--jobs is {jobs}, expected at least 1")
    require_matplotlib(folder / ".cache")
    prepare_folder(folder, MARKER, ())
    folder = folder.resolve()
    corpus, source = _corpus(folder, settings, data, tokenizer)
    names = [name for table in tables for name in TABLES[table].losses]
    wanted = {_architecture(find_variant(name)): name for name in reversed(names)}
    trained = _train_all(folder, list(dict.fromkeys(reversed(wanted.values()))), corpus, source, settings, jobs)
    by_architecture = {_architecture(find_variant(run.variant)): run for run in trained}
    runs = {name: by_architecture[_architecture(find_variant(name))] for name in names}
    for table in tables:
        print(f"\n{TABLES[table].title}\n")
        print(table_text(TABLES[table], runs))
    figures = draw_figures(folder, [TABLES[table] for table in tables], runs)
    _write_json(
        folder / "results.json",
        {
            "settings": asdict(settings),
            "data": source,
            "tables": {
                table: [
                    {**asdict(runs[name]), "line": name, "published_loss": loss}
                    for name, loss in TABLES[table].losses.items()
                ]
                for table in tables
            },
        },
    )
    print(f"\nfigures: {', '.join(map(str, figures))}; numbers: {folder / 'results.json'}")
    return trained


def training_words(variant: str, run: Path, corpus: Corpus, settings: LadderSettings) -> list[str]:
    """The arguments of `pretrain_gpt` for one variant: its architecture at toy size, the recipe of all."""
    values = {
        "--ru-variant": variant,
        "--device": "cpu",
        "--num-layers": settings.layers,
        "--hidden-size": settings.hidden,
        "--num-attention-heads": settings.heads,
        "--seq-length": settings.sequence,
        "--max-position-embeddings": settings.sequence,
        "--data-path": corpus.prefix,
        "--data-cache-path": run / "dataset_cache",
        "--split": "95,5,0",
        "--tokenizer-type": _tokenizer_type(corpus.tokenizer),
        "--tokenizer-model": corpus.tokenizer,
        "--micro-batch-size": settings.batch,
        "--global-batch-size": settings.batch,
        "--train-iters": settings.steps,
        "--init-method-std": f"{settings.init_std:.4f}",
        "--lr": settings.learning_rate,
        "--min-lr": settings.learning_rate / 10,
        "--lr-decay-style": "cosine",
        "--lr-warmup-iters": max(settings.steps // 10, 1),
        "--weight-decay": 0.1,
        "--adam-beta2": 0.95,
        "--clip-grad": 1.0,
        "--seed": settings.seed,
        "--log-interval": 1,
        # Before the first step and after the last one.
        "--eval-interval": 10 * settings.steps,
        "--eval-iters": settings.evaluate_batches,
        "--ru-metrics": run / "metrics.jsonl",
    }
    return [*(word for flag, value in values.items() for word in (flag, str(value))), "--ru-validate-from-start"]


def toy_variant(name: str, settings: LadderSettings, vocab_size: int) -> Variant:
    """The variant at the size at which it is trained here."""
    sizes = {
        "num_layers": settings.layers, "hidden_size": settings.hidden, "num_attention_heads": settings.heads,
        "seq_length": settings.sequence, "max_position_embeddings": settings.sequence, "vocab_size": vocab_size,
    }  # fmt: skip
    return refine(find_variant(name), sizes)


def _train_all(
    folder: Path, names: list[str], corpus: Corpus, source: dict[str, Any], settings: LadderSettings, jobs: int
) -> list[LadderRun]:
    vocab_size = load_tokenizer(corpus.tokenizer).vocab_size
    for name in names:
        toy_variant(name, settings, vocab_size)  # sizes that do not fit are told before anything is trained
    key = {"settings": asdict(settings), "data": source}
    progress = Progress(f"{len(names)} variants, {settings.steps} steps each, {jobs} at a time")
    state = _State(progress, len(names), settings.steps)

    def train(name: str) -> LadderRun:
        run = folder / "runs" / name
        done = _finished(run / "result.json", key)
        if done is None:
            prepare_folder(run, MARKER, ("metrics.jsonl", "train.log", "result.json"))
            run_logged(
                name,
                [sys.executable, "-m", "megatron_ru.pretrain_gpt", *training_words(name, run, corpus, settings)],
                run / "train.log",
                child_environment(),
                state.watcher(name, MetricsReader(run / "metrics.jsonl")),
            )
            done = _result(name, run, count_parameters(toy_variant(name, settings, vocab_size)))
            _write_json(run / "result.json", {"key": key, "run": asdict(done)})
        state.finished(name)
        return done

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(train, name) for name in names]
        try:
            _wait_for_all(futures)
        except BaseException:
            state.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    progress.done("trained")
    return [future.result() for future in futures]


def _wait_for_all(futures: Iterable[Future[LadderRun]]) -> None:
    pending = set(futures)
    while pending:
        # In short waits, so that Ctrl-C is heard.
        done, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()


class _Stopped(Exception):
    """Another run has failed, or the user has had enough."""


class _State:
    """The progress of runs that go on at the same time."""

    def __init__(self, progress: Progress, total: int, steps: int):
        self.stop = threading.Event()
        self._progress, self._total, self._steps = progress, total, steps
        self._lock = threading.Lock()
        self._running: dict[str, int] = {}
        self._done = 0
        self._remaining = Remaining()

    def watcher(self, name: str, reader: MetricsReader) -> Callable[[], None]:
        def watch() -> None:
            if self.stop.is_set():
                raise _Stopped
            with self._lock:
                self._running[name] = max(reader.update().train, default=0)
                self._show()

        return watch

    def finished(self, name: str) -> None:
        with self._lock:
            self._running.pop(name, None)
            self._done += 1
            self._show()

    def _show(self) -> None:
        whole = self._total * self._steps
        steps = self._done * self._steps + sum(self._running.values())
        running = "  ".join(f"{name} {step}/{self._steps}" for name, step in self._running.items())
        left = self._remaining.text(steps, whole)
        self._progress(f"{self._done}/{self._total} done  {running}  {left}", steps / whole)


def _result(name: str, run: Path, parameters: int) -> LadderRun:
    metrics = read_metrics(run / "metrics.jsonl")
    losses = metrics.first_and_last_validation()
    if losses is None:
        raise RunFailed(f"{name} left no validation losses; the whole log is {run / 'train.log'}")
    steps = sorted(metrics.train)
    return LadderRun(
        variant=name, parameters=parameters, first_validation_loss=losses[0], validation_loss=losses[1],
        step_seconds=metrics.median_step_seconds() or 0.0, train_losses=[metrics.train[step] for step in steps],
    )  # fmt: skip


def _finished(path: Path, key: dict[str, Any]) -> LadderRun | None:
    """The result of an earlier run with the same key; None when there is none."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] == key:
            return LadderRun(**found["run"])
    return None


def _corpus(
    folder: Path, settings: LadderSettings, data: str | None, tokenizer: str | None
) -> tuple[Corpus, dict[str, Any]]:
    """The corpus, made anew when it is not there already, and what it was made of."""
    if data is not None and Path(f"{data}.idx").is_file():
        if tokenizer is None:
            raise UserError(f"{data}.idx holds token ids; give their tokenizer with --tokenizer-model FILE")
        path = Path(load_tokenizer(tokenizer).path).resolve()
        found = check_dataset(data, load_tokenizer(tokenizer).vocab_size)
        prefix = Path(data).resolve()
        corpus = Corpus(tokenizer=path, prefix=prefix, documents=found.documents, tokens=found.tokens)
        return corpus, {"prefix": str(prefix), "tokens": found.tokens, "tokenizer": str(path)}
    if data is None:
        source: dict[str, Any] = {"text": "wiki-ru-wordnet", "entries": settings.entries}
    else:
        text = Path(data)
        if not text.is_file():
            raise UserError(f"--data {data}: there is neither a file of JSON Lines nor a dataset {data}.idx")
        source = {"text": str(text.resolve()), "bytes": text.stat().st_size, "changed": text.stat().st_mtime}
    source |= {"tokenizer": tokenizer or f"BPE, {settings.vocab_size}"}
    known = folder / "corpus.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        earlier = json.loads(known.read_text(encoding="utf-8"))
        if earlier["source"] == source:
            paths = {name: Path(earlier["corpus"][name]) for name in ("tokenizer", "prefix")}
            return Corpus(**{**earlier["corpus"], **paths}), source
    corpus = _make_corpus(folder, settings, data, tokenizer)
    written = {**asdict(corpus), "tokenizer": str(corpus.tokenizer), "prefix": str(corpus.prefix)}
    _write_json(known, {"source": source, "corpus": written})
    return corpus, source


def _make_corpus(folder: Path, settings: LadderSettings, data: str | None, tokenizer: str | None) -> Corpus:
    progress = Progress("text")
    text = folder / "text.jsonl" if data is None else Path(data)
    if data is None:
        write_dictionary(text, settings.entries)
    model = folder / "tokenizer.model"
    if tokenizer is None:
        make_tokenizer(text, model, settings.vocab_size)
    else:
        model = Path(load_tokenizer(tokenizer).path).resolve()
    corpus = make_dataset(text, model, folder / "dataset", workers=min(2, os.cpu_count() or 1))
    progress.done(f"{corpus.documents} documents, {corpus.tokens} tokens")
    return corpus


def _tokenizer_type(path: Path) -> str:
    return "HuggingFaceTokenizer" if path.suffix == ".json" else "SentencePieceTokenizer"


def _architecture(variant: Variant) -> tuple[Any, ...]:
    """What two lines of different tables have in common when they are the same model."""
    return tuple(getattr(variant, field) for field in ARCHITECTURE_FIELDS)


def _write_json(path: Path, value: Any) -> None:
    with atomic_output(path, "w", encoding="utf-8") as stream:
        json.dump(value, stream, ensure_ascii=False, indent=2)
