import re

import pytest

from megatron_ru.data.pipeline import run_pipeline
from megatron_ru.data.report import report_page, write_report
from megatron_ru.foundation.errors import UserError

pytest.importorskip("matplotlib", reason="it draws the plots")


def test_one_page_with_everything(config_of, corpus):
    with (corpus[0] / "en.jsonl").open("a") as stream:
        stream.write('{"text": "<script>alert(1)</script>"}\n{"text": 1}\n')
    manifest = run_pipeline(config_of(malformed="skip"))
    path = write_report(manifest["config"]["output"])
    page = path.read_text(encoding="utf-8")
    # Nothing is fetched, nothing of the text is markup.
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "<script" not in page
    steps = manifest["steps"]
    for name, value in (
        ("documents read", f"{steps['read']['counts']['documents']:,}"),
        ("duplicate", f"{steps['texts']['dropped']['duplicate']:,}"),
        ("ru", "0.7000"),
        ("hard cuts", f"{steps['pack']['counts']['hard_cuts']:,}"),
    ):
        assert f"<tr><td>{name}</td><td>{value}</td>" in page
    assert "χ²" in page
    assert "field &#x27;text&#x27; should be a string, found a number" in page
    assert page.count("<img") == 5


def test_fertility_is_that_of_the_counts(config_of):
    manifest = run_pipeline(config_of(mixture=None))
    counts = manifest["steps"]["tokenise"]["counts"]
    page = report_page(manifest)
    assert f"<td>{counts['characters_ru'] / counts['tokens_ru']:.3f}</td>" in page
    assert f"<td>{counts['tokens_en'] / counts['words_en']:.3f}</td>" in page


def test_unfinished_runs_have_a_page_too(config_of):
    page = report_page(run_pipeline(config_of(), until="texts"))
    assert "not finished" in page
    assert "Fertility" not in page


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(
        UserError,
        match=r"cannot read .*manifest.json \(No such file or directory\); it is written by megatron-ru data run",
    ):
        write_report(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"steps": {}}'])
def test_what_is_no_manifest_and_what_cannot_be_written(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest.json is no manifest of a pipeline"):
        write_report(tmp_path)


def test_a_page_that_cannot_be_written(config_of, tmp_path):
    config = config_of(tokens=None, packing=None, mixture=None)
    run_pipeline(config)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/report.html: .* nothing was kept"):
        write_report(config.output, tmp_path / "file" / "report.html")
