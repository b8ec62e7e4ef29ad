"""Which files are read: each once, none of the pipeline's own, none that changes meanwhile."""

import os

import pytest

from megatron_ru.data.config import Input, PipelineConfig
from megatron_ru.data.execution import Workers, locked, prepare, run_step
from megatron_ru.data.pipeline import run_pipeline
from megatron_ru.data.sources import find_sources
from megatron_ru.foundation.errors import UserError

LINE = b'{"text": "one"}\n'


def config(folder, *files):
    inputs = (Input(domain="d", files=tuple(str(folder / file) for file in files)),)
    return PipelineConfig(output=str(folder / "out"), inputs=inputs, length=None)


def names(found):
    return [os.path.basename(source.file) for source in found[0]]


def test_a_file_has_one_place_under_whatever_name(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE)
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    assert names(find_sources(config(tmp_path, "link.jsonl"))) == ["link.jsonl"]
    with pytest.raises(UserError, match=r"link.jsonl is named twice in the inputs, also as .*a.jsonl"):
        find_sources(config(tmp_path, "*.jsonl"))
    with pytest.raises(UserError, match=r"named twice"):
        find_sources(config(tmp_path, "a.jsonl", f"../{tmp_path.name}/a.jsonl"))


def test_each_pattern_finds_something_and_a_name_may_look_like_one(tmp_path):
    for name in ("a[1].jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(LINE)
    assert names(find_sources(config(tmp_path, "a[1].jsonl", "b*"))) == ["a[1].jsonl", "b.jsonl"]
    with pytest.raises(UserError, match=r"no file matches .*c\*"):
        find_sources(config(tmp_path, "b*", "c*"))


def test_shards_of_the_pipeline_are_not_its_inputs(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE)
    for _ in range(2):
        manifest = run_pipeline(config(tmp_path, "**/*.jsonl"))
        assert manifest["steps"]["read"]["counts"]["documents"] == 1


def test_pipes_and_names_that_are_not_utf8_are_refused(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"a.jsonl is no file but a pipe"):
        find_sources(config(tmp_path, "a.jsonl"))
    name = os.fsdecode(b"\xff.jsonl")
    (tmp_path / name).write_bytes(LINE)
    with pytest.raises(UserError, match="is not UTF-8; rename it"):
        find_sources(config(tmp_path, name))


@pytest.mark.parametrize("step", ["read", "texts"])
def test_a_file_that_changes_meanwhile_is_noticed(tmp_path, step):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE * 3)
    settings = config(tmp_path, "a.jsonl")
    with locked(settings.output), Workers(1) as workers:
        run = prepare(settings)
        for name in run.step_names[: run.step_names.index(step)]:
            run_step(run, name, workers)
        path.write_bytes(LINE.replace(b"one", b"two") * 3)
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
        with pytest.raises(UserError, match=r"a.jsonl was changed while it was read"):
            run_step(run, step, workers)
    assert not list((tmp_path / "out").rglob("*.partial"))
    assert run_pipeline(settings)["steps"]["texts"]["counts"]["documents"] == 1
