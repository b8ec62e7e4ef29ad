"""Text to token files by us, by Megatron-LM's tools/preprocess_data.py and by datatrove, on the same text in one run.

Each contender is a process of its own with as many workers; the order turns with each repetition, and of several
repetitions the one with the fewest processor seconds counts. Our files are compared with Megatron's byte for byte, and
datatrove's tokens with ours.
"""

import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from megatron_ru.benchmarks.measured_process import Cost, measure
from megatron_ru.foundation.errors import UserError
from megatron_ru.tokenizer.loading import SentencePieceTokenizer, load_tokenizer

_DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
folder, name, tokenizer, end, output, workers = sys.argv[1:]
if __name__ == "__main__":
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(folder, glob_pattern=name),
            DocumentTokenizer(output, tokenizer, eos_token=end, shuffle_documents=False, save_filename="text"),
        ],
        tasks=1, workers=1, logging_dir=output + "/logs", skip_completed=False,
    ).run()
"""


@dataclass(frozen=True, kw_only=True)
class ContestSettings:
    text: Path
    """One .jsonl."""
    tokenizer: Path
    """A .model, or a folder with a tokenizer.json."""
    scratch: Path
    """For outputs and logs; several times the size of the text."""
    megatron_lm: Path | None = None
    """A checkout of Megatron-LM; without one it takes no part."""
    datatrove: bool = True
    workers: int = 1
    repeats: int = 2


@dataclass(frozen=True, kw_only=True)
class Result:
    name: str
    version: str
    cost: Cost
    megabytes_per_processor_second: float
    equal: str
    """What its files have in common with ours."""


def run(settings: ContestSettings, tell: Callable[[str], None] = print) -> list[Result]:
    """The results, ours first. Raises UserError when a contender fails."""
    contenders = _contenders(settings)
    megabytes = settings.text.stat().st_size / 1e6
    best: dict[str, Cost] = {}
    settings.scratch.mkdir(parents=True, exist_ok=True)
    for repeat in range(settings.repeats):
        names = list(contenders)
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            command = contenders[name][1]
            cost = measure(command, settings.scratch / f"{name}.log", {"TOKENIZERS_PARALLELISM": "false"})
            tell(f"{name}: {cost.processor_seconds:.1f} CPU-s, {cost.peak_megabytes:.0f} MB in the largest process")
            if name not in best or cost.processor_seconds < best[name].processor_seconds:
                best[name] = cost
    return [
        Result(
            name=name, version=version, cost=best[name],
            megabytes_per_processor_second=megabytes / best[name].processor_seconds,
            equal=_compared(name, settings),
        )
        for name, (version, _) in contenders.items()
    ]  # fmt: skip


def markdown(results: Sequence[Result], settings: ContestSettings) -> str:
    """The results as a section of a page."""
    ours = results[0]
    size = settings.text.stat().st_size / 1e6
    lines = [
        f"{size:.0f} MB of JSON lines, tokenizer `{settings.tokenizer.name}`, {settings.workers} worker(s), best of "
        f"{settings.repeats}; {machine()}.",
        "",
        "| | version | MB per CPU-second | ours is faster by | CPU-s | wall s | largest process, MB | files |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for one in results:
        factor = ours.megabytes_per_processor_second / one.megabytes_per_processor_second
        cost = f"{one.cost.processor_seconds:.1f} | {one.cost.wall_seconds:.1f} | {one.cost.peak_megabytes:.0f}"
        speed = f"{one.megabytes_per_processor_second:.2f} | {factor:.2f}"
        lines.append(f"| {one.name} | {one.version} | {speed} | {cost} | {one.equal} |")
    return "\n".join(lines) + "\n"


def as_json(results: Sequence[Result], settings: ContestSettings) -> str:
    """Everything measured."""
    return json.dumps(
        {
            "machine": machine(), "text_bytes": settings.text.stat().st_size, "tokenizer": settings.tokenizer.name,
            "workers": settings.workers, "repeats": settings.repeats, "results": [asdict(one) for one in results],
        },
        indent=1,
    )  # fmt: skip


def machine() -> str:
    """Processor, number of cores that may be used, Python."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"


def _contenders(settings: ContestSettings) -> dict[str, tuple[str, list[str]]]:
    """{name: (version, command)}, ours first."""
    tokenizer = load_tokenizer(settings.tokenizer)
    python, out = sys.executable, settings.scratch
    found = {
        "ours": (
            f"megatron-ru {_version('megatron-ru')}, fastokens {_version('fastokens')}",
            [
                python, "-m", "megatron_ru", "data", "tokenize", "--input", str(settings.text), "--tokenizer",
                tokenizer.path, "--output", str(out / "ours"), "--workers", str(settings.workers),
            ],
        )
    }  # fmt: skip
    if settings.megatron_lm is not None:
        script = settings.megatron_lm / "tools" / "preprocess_data.py"
        if not script.is_file():
            raise UserError(f"there is no {script}; give a checkout of Megatron-LM")
        plain = isinstance(tokenizer, SentencePieceTokenizer)
        kind, model = ("SentencePieceTokenizer", tokenizer.path) if plain else (
            "HuggingFaceTokenizer", str(Path(tokenizer.path).parent)
        )  # fmt: skip
        found["Megatron-LM"] = (
            f"preprocess_data.py of core {_version('megatron-core')}",
            [
                python, str(script), "--input", str(settings.text), "--output-prefix", str(out / "megatron"),
                "--tokenizer-type", kind, "--tokenizer-model", model, "--append-eod", "--workers",
                str(settings.workers), "--log-interval", "1000000",
            ],
        )  # fmt: skip
    if settings.datatrove and not isinstance(tokenizer, SentencePieceTokenizer):
        end = tokenizer.pieces()[tokenizer.eod] if tokenizer.eod is not None else ""
        found["datatrove"] = (
            f"{_version('datatrove')}, tokenizers {_version('tokenizers')}",
            [
                python, "-c", _DATATROVE, str(settings.text.parent), settings.text.name, tokenizer.path, end,
                str(out / "datatrove"), str(settings.workers),
            ],
        )  # fmt: skip
    return found


def _compared(name: str, settings: ContestSettings) -> str:
    out = settings.scratch
    if name == "Megatron-LM":
        same = all(
            _equal_files(out / f"ours{suffix}", out / f"megatron_text_document{suffix}") for suffix in (".bin", ".idx")
        )
        return "byte for byte ours" if same else "DIFFERENT from ours"
    if name == "datatrove":
        theirs = next((out / "datatrove").glob("*.ds"), None)
        if theirs is None:
            return "none found"
        return "tokens are ours" if _equal_files(out / "ours.bin", theirs) else "tokens DIFFER from ours"
    return ""


def _equal_files(first: Path, second: Path) -> bool:
    if first.stat().st_size != second.stat().st_size:
        return False
    return bool(np.array_equal(np.memmap(first, np.uint8, "r"), np.memmap(second, np.uint8, "r")))


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
