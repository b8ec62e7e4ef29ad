"""Lines of the report and the exit code that they give."""

import dataclasses

import pytest

from megatron_ru.doctor.finding import Finding, exit_code, table


def finding(verdict, **more):
    return Finding(**{"subject": "gpu 0", "verdict": verdict, "detail": "as it is", **more})


@pytest.mark.parametrize(
    ("verdicts", "code", "strict"),
    [
        ([], 0, 0),
        (["ok", "absent"], 0, 0),
        (["ok", "slow"], 0, 1),
        (["slow", "broken", "ok"], 1, 1),
    ],
)
def test_exit_code(verdicts, code, strict):
    found = [finding(verdict) for verdict in verdicts]
    assert (exit_code(found), exit_code(found, strict=True)) == (code, strict)


def test_table_hides_only_what_is_well_and_not_to_be_listed():
    found = [
        finding("ok"),
        finding("ok", subject="pair a - b", listed=False),
        finding("slow", subject="pair a - c", listed=False),
    ]
    assert table(found) == "gpu 0       ok      as it is\npair a - c  slow    as it is\n"
    assert table([]) == ""


def test_unknown_verdict_is_a_mistake_of_ours():
    with pytest.raises(AssertionError, match="fine"):
        finding("fine")


def test_survives_being_written():
    found = finding("slow", values={"seconds": 1.5}, listed=False)
    assert Finding.read(dataclasses.asdict(found)) == found
