"""`megatron-ru doctor --nodes auto`: this process is one of the ranks that a launcher started."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from megatron_ru.doctor.conversation import LostMeetingError, Watchdog, meet
from megatron_ru.doctor.coordinator import Coordinator
from megatron_ru.doctor.finding import Finding, exit_code
from megatron_ru.doctor.participant import SLACK_SECONDS, take_part
from megatron_ru.doctor.verdicts import judge
from megatron_ru.doctor.worker_process import Worker
from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.mpi_rendezvous import ensure_rendezvous


def examine_together(limit: float, folder: Path, strict: bool, report: Callable[[Sequence[Finding]], None]) -> int:
    """The exit code of all ranks, see `finding.exit_code`; `report` gets the findings on rank 0.

    `limit`: seconds that each step may take. Raises UserError where no launcher started this, and where rank 0 is lost.
    """
    # The store warns of every wait that ends without an answer; what that means stands in the report.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    ranks = ensure_rendezvous(os.environ, start_seconds=limit)
    if ranks.source == "single process":
        raise UserError(
            "--nodes auto compares the hosts of a launcher's ranks, and no launcher started this process: start it by "
            "`megatron-ru launch slurm --nodes 2 -- megatron-ru doctor --nodes auto` or the like, or name the hosts"
        )
    watchdog, worker = Watchdog(), Worker()
    where = f"{ranks.master_address}:{ranks.master_port}"
    try:
        watchdog.expect(limit + SLACK_SECONDS, f"rank {ranks.rank} found nobody at {where}, where rank 0 should be")
        talk = meet(ranks, limit)
        if ranks.rank != 0:
            return take_part(talk, ranks, limit, worker, watchdog)
        coordinator = Coordinator(talk, ranks, limit, worker, watchdog, folder)
        code = 1
        try:
            findings = list(judge(coordinator.measure()))
            report(findings)
            sys.stdout.flush()
            code = exit_code(findings, strict)
        except LostMeetingError as error:
            raise UserError(f"the store at {where} is gone ({str(error).splitlines()[0]}): start again") from error
        finally:
            with suppress(LostMeetingError):
                coordinator.end(code)
        return code
    finally:
        worker.kill()
