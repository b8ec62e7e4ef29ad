"""`megatron-ru data run --executor slurm`: job arrays of a real Slurm make the files of a run on one machine."""

import json
import time

import pytest

from megatron_ru.data.config_file import load_config
from megatron_ru.data.pipeline import run_pipeline
from megatron_ru.data.run import Run
from tests.data.conftest import outputs, tokenizer_file, write_corpus  # noqa: F401
from tests.schedulers.cluster import LOGIN

CONFIG = """
output: {output}
inputs: [{{domain: ru, files: [corpus/ru_*], weight: 0.7}}, {{domain: en, files: [corpus/en.jsonl], weight: 0.3}}]
shard_megabytes: 0.03
tokens: {{tokenizer: {tokenizer}, held_out: 0.05}}
packing: {{block: 64, group_tokens: 5000}}
mixture: {{samples: 300, samples_per_part: 100}}
"""


def test_jobs_of_slurm_make_the_same_files(slurm, hosts, tmp_path, tokenizer_file):  # noqa: F811
    pytest.importorskip("datatrove")
    write_corpus(tmp_path / "corpus")
    for name in ("here", "there"):
        (tmp_path / f"{name}.yaml").write_text(CONFIG.format(output=name, tokenizer=tokenizer_file))
    here = load_config(tmp_path / "here.yaml")
    run_pipeline(here)
    words = ["megatron-ru", "data", "run", str(tmp_path / "there.yaml"), "--executor", "slurm", "--tasks", "3",
             "--partition", "gpu", "--time", "00:10:00", "--memory", "100"]  # fmt: skip
    sent = hosts.run(LOGIN, words, timeout=120)
    assert sent.returncode == 0, sent.stdout
    assert "jobs wait for each other: read" in sent.stdout
    again = hosts.run(LOGIN, words, timeout=120)
    assert "still work in" in again.stdout, again.stdout
    there = tmp_path / "there"
    until = time.monotonic() + 240
    while not (there / "manifest.json").exists() and time.monotonic() < until:
        time.sleep(1)
    logs = "".join(path.read_text() for path in (there / "logs").rglob("*.out"))
    assert (there / "manifest.json").exists(), logs[-4000:]
    jobs = json.loads((there / "slurm_jobs.json").read_text())
    assert slurm.wait(str(jobs["manifest"])) == "COMPLETED"
    found = {
        name: content
        for name, content in outputs(there).items()
        if not name.startswith("logs/") and name != "slurm_jobs.json"
    }
    assert found == outputs(Run.load(here.output).folder)
