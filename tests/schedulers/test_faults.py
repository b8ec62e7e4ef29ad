"""Under mpirun each fault ends a guarded job in time, is put on whom it belongs to, and costs no step.

Most of the time is spent in waiting, so three jobs run at once, each on hosts of its own.
"""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from tests.schedulers.cluster import make_environment, user_environment
from tests.schedulers.faults import (
    FAULTS,
    FIRST,
    GRACE,
    PER_HOST,
    SECOND,
    STALL,
    STEP,
    STEPS,
    VICTIM,
    start_ours,
    started,
    struck,
    undisturbed_losses,
)
from tests.schedulers.hosts import Hosts

AT_ONCE = 3
# A rank that exits 0 ends no job by itself; here the others lose its connection and end by an exception, code 1.
CODES = {"exit_7": 7, "kill": 137, "stop": 75, "cut": 75, "gone": 75, "exit_0": 1, "hang": 75}
GONE_FOR_GOOD = "gone_for_good"


@dataclass(frozen=True, kw_only=True)
class Story:
    """How a job went from the fault to its end."""

    seconds: float
    """From the fault to the end of the first attempt."""
    reports: list[Mapping[str, Any]]
    code: int | None
    losses: Mapping[int, str]
    left: Mapping[str, Any]
    output: str


@pytest.fixture(scope="module")
def stories(all_hosts, tmp_path_factory):
    """The future story of every fault, and of a host that does not come back."""
    folder = tmp_path_factory.mktemp("faults")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = {name: pool.submit(story, folder / name, name) for name in (*FAULTS, GONE_FOR_GOOD)}
        yield futures
        for future in futures.values():
            future.cancel()


def story(folder, name):
    """Has a job suffer the fault and try again; a host that was lost is back, or there is a spare one."""
    fault = FAULTS["gone" if name == GONE_FOR_GOOD else name]
    nodes = (FIRST, SECOND, "h3") if name == GONE_FOR_GOOD else (FIRST, SECOND)
    spares = ("--spares", "1") if name == GONE_FOR_GOOD else ()
    folder.mkdir()
    with Hosts(folder, ("h0", "h1", "h2", "h3")) as hosts:
        hosts.path.append(make_environment(folder) / "bin")
        hosts.environment.update(user_environment())
        options = ("--retries", "3", *spares)
        with started(hosts, folder / "job", start_ours, fault, options=options, nodes=nodes) as job:
            at = struck(hosts, job, fault)
            seconds = first_report(job) - at
            if name != GONE_FOR_GOOD:
                hosts.restore(SECOND)
            ended = job.wait(hosts, 150)
            return Story(
                seconds=seconds,
                reports=job.reports,
                code=None if ended is None else job.launchers[FIRST].returncode,
                losses=job.losses,
                left=hosts.left(within=GRACE + STALL),
                output=job.output()[-4000:],
            )


def first_report(job):
    """The time (Unix) at which the guard had ended the first attempt and told of it."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if job.reports:
            return job.reports[0]["time_unix_seconds"]
        time.sleep(0.05)
    raise AssertionError(f"the guard has reported nothing:\n{job.output()[-4000:]}")


@pytest.mark.parametrize("name", FAULTS)
def test_job_ends_in_time_blames_the_right_one_and_finishes_at_another_attempt(
    stories: dict[str, Future[Story]], name: str
) -> None:
    story = stories[name].result()
    first = story.reports[0]
    assert story.seconds < 2 * STALL, story.output
    assert (first["host"], first["exit_code"], first["again"]) == (SECOND, CODES[name], True), story.output
    if FAULTS[name].blames_rank:
        assert (first["rank"], first["step"]) == (VICTIM, STEP - 1), story.output
    assert story.code == 0, story.output
    assert story.losses == undisturbed_losses(2 * PER_HOST, STEPS)
    assert story.left == {}


def test_host_that_is_gone_for_good_is_left_out_for_a_spare_one(stories: dict[str, Future[Story]]) -> None:
    story = stories[GONE_FOR_GOOD].result()
    assert story.code == 0, story.output
    assert story.losses == undisturbed_losses(2 * PER_HOST, STEPS)
    assert [report["left_out"] for report in story.reports][-2:] == [[SECOND], []], story.reports
    assert story.left == {}
