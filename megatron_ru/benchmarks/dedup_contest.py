"""Exact deduplication by us, by duckdb and by datatrove, of the same JSON lines in one run, one thread each.

    python -m megatron_ru.benchmarks.dedup_contest --text FILE... --scratch FOLDER

Without --text a corpus is made: 300 000 documents, 26% of them exact copies, of paragraphs of the files given with
--paragraphs. Of several repetitions the one with the fewest processor seconds counts.
"""

import argparse
import gzip
import json
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from megatron_ru.benchmarks.measured_process import Cost, measure
from megatron_ru.foundation.errors import UserError
from megatron_ru.text.jsonl import read_documents

_DUCKDB_ONE_PASS = """
import sys, duckdb
files, output = sys.argv[2:], sys.argv[1]
base = duckdb.connect()
base.execute("SET threads=1")
base.execute("SET preserve_insertion_order=false")
columns = "{'text':'VARCHAR','id':'BIGINT','source':'VARCHAR'}"
source = f"read_json({files!r}, format='newline_delimited', maximum_object_size=200000000, columns={columns})"
first = "row_number() OVER (PARTITION BY md5(text) ORDER BY id) = 1"
base.execute(f"COPY (SELECT * FROM {source} QUALIFY {first}) TO '{output}' (FORMAT json)")
"""

_DUCKDB_TWO_PASSES = """
import sys, duckdb
files, output = sys.argv[2:], sys.argv[1]
base = duckdb.connect()
base.execute("SET threads=1")
base.execute("SET preserve_insertion_order=false")
columns = "{'text':'VARCHAR','id':'BIGINT','source':'VARCHAR'}"
source = f"read_json({files!r}, format='newline_delimited', maximum_object_size=200000000, columns={columns})"
base.execute(f"CREATE TEMP TABLE kept AS SELECT min(id) AS id FROM {source} GROUP BY md5(text)")
joined = f"SELECT found.* FROM {source} found SEMI JOIN kept ON found.id = kept.id"
base.execute(f"COPY ({joined}) TO '{output}' (FORMAT json)")
"""

_DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup.exact_dedup import (ExactDedupConfig, ExactDedupFilter,
                                                      ExactDedupSignature, ExactFindDedups)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

def content(document):
    return document.text.encode()

if __name__ == "__main__":
    output, folder = sys.argv[1], sys.argv[2].rpartition("/")[0]
    config = ExactDedupConfig(content_getter=content)
    tasks = len(sys.argv) - 2
    for number, (ranks, pipeline) in enumerate([
        (tasks, [JsonlReader(folder, glob_pattern="*.jsonl"), ExactDedupSignature(output + "/signatures", config)]),
        (1, [ExactFindDedups(output + "/signatures", output + "/found", config)]),
        (tasks, [JsonlReader(folder, glob_pattern="*.jsonl"), ExactDedupFilter(output + "/found", config),
                 JsonlWriter(output + "/kept", compression=COMPRESSION)]),
    ]):
        LocalPipelineExecutor(pipeline, tasks=ranks, workers=1, logging_dir=f"{output}/logs{number}").run()
"""


def make_corpus(paragraph_files: Sequence[str], folder: Path, total: int = 300_000, copies: float = 0.26) -> list[Path]:
    """Ten files with `total` documents of real paragraphs, the share `copies` of them exact copies of others."""
    paragraphs = [
        part for found in read_documents(paragraph_files) for part in found.text.split("\n") if len(part) > 40
    ]
    distinct = total - round(total * copies)
    generator = random.Random(1)
    # A document is a function of its number, so that copies cost no memory.
    order = [*range(distinct), *(generator.randrange(distinct) for _ in range(total - distinct))]
    generator.shuffle(order)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:02d}.jsonl" for number in range(10)]
    for number, path in enumerate(paths):
        with path.open("w", encoding="utf-8") as stream:
            for place in range(total * number // 10, total * (number + 1) // 10):
                document = random.Random(order[place])
                count = max(1, int(document.lognormvariate(2.88, 0.8)))
                text = f"{order[place]} " + "\n".join(document.choices(paragraphs, k=count))
                record = {"text": text, "id": place, "source": f"made {place}"}
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    return paths


def run(files: Sequence[Path], scratch: Path, repeats: int = 2) -> Iterator[tuple[str, str, Cost, int]]:
    """Yields (name, version, cost, documents kept), ours first. Raises UserError when a contender fails."""
    scratch.mkdir(parents=True, exist_ok=True)
    given = [str(path) for path in files]
    python = sys.executable
    contenders = {
        "ours": (
            "megatron-ru", "steps/texts/*.jsonl",
            [python, "-m", "megatron_ru", "data", "dedup", "--workers", "1", "--output", "{out}", "--input", *given],
        ),
        "duckdb, one pass": ("duckdb", "kept.jsonl", [python, "-c", _DUCKDB_ONE_PASS, "{out}/kept.jsonl", *given]),
        "duckdb, two passes": ("duckdb", "kept.jsonl", [python, "-c", _DUCKDB_TWO_PASSES, "{out}/kept.jsonl", *given]),
        "datatrove": ("datatrove", "kept/*.jsonl", [python, "{out}/program.py", "{out}", *given]),
        "datatrove, its default: gzip": ("datatrove", "kept/*.gz", [python, "{out}/compressing.py", "{out}", *given]),
    }  # fmt: skip
    for name, (package, pattern, command) in contenders.items():
        costs = []
        for repeat in range(repeats):
            out = scratch / f"{name.replace(', ', '_').replace(': ', '_').replace(' ', '_')}_{repeat}"
            # What an earlier run left would be taken as done.
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            (out / "program.py").write_text(_DATATROVE.replace("COMPRESSION", "None"))
            (out / "compressing.py").write_text(_DATATROVE.replace("COMPRESSION", '"gzip"'))
            words = [word.replace("{out}", str(out)) for word in command]
            costs.append(measure(words, scratch / "log", {"OMP_NUM_THREADS": "1"}))
            kept = sum(_lines(path) for path in out.glob(pattern))
        yield name, metadata.version(package), min(costs, key=lambda cost: cost.processor_seconds), kept


def _lines(path: Path) -> int:
    # In pieces: a process that is started is measured with the memory of the one that starts it.
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
        return sum(piece.count(b"\n") for piece in iter(lambda: stream.read(1 << 20), b""))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="*", default=[], metavar="FILE", help=".jsonl files of one folder")
    parser.add_argument("--paragraphs", nargs="*", default=[], metavar="FILE", help="text to make a corpus of")
    parser.add_argument("--scratch", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    if not arguments.text and not arguments.paragraphs:
        raise UserError("give --text, or --paragraphs to make a corpus of")
    files = [Path(path) for path in arguments.text]
    files = files or make_corpus(arguments.paragraphs, arguments.scratch / "corpus")
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    print(f"{megabytes:.0f} MB of JSON lines in {len(files)} files\n")
    print("| | version | MB per CPU-second | ours is faster by | CPU-s | wall s | largest process, MB | kept |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    first = None
    for name, version, cost, kept in run(files, arguments.scratch, arguments.repeats):
        speed = megabytes / cost.processor_seconds
        first = first or speed
        print(
            f"| {name} | {version} | {speed:.0f} | {first / speed:.2f} | {cost.processor_seconds:.1f} | "
            f"{cost.wall_seconds:.1f} | {cost.peak_megabytes:.0f} | {kept} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
