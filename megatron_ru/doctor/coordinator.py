"""Rank 0 of `megatron-ru doctor --nodes`: tells the ranks what to measure, and waits for nobody for ever."""

import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ru.doctor.conversation import Conversation, Watchdog
from megatron_ru.doctor.file_system import FileTimes, file_finding
from megatron_ru.doctor.measurements import AllReduce, Description, Measurements, Skew
from megatron_ru.doctor.nodes import Arrival, Node, nodes_of, rounds
from megatron_ru.doctor.participant import PING_SECONDS, PINGS, SLACK_SECONDS, arrive
from megatron_ru.doctor.worker_process import Worker
from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.ranks import RankEnvironment
from megatron_ru.foundation.slurm_lists import expand_hosts

# Beyond the limit of a step, for a rank that has to kill its worker before it answers.
_MARGIN = 5.0


class Coordinator:
    """One run of the doctor, from the arrivals to the end. Its measurements grow in `found`."""

    def __init__(
        self, talk: Conversation, ranks: RankEnvironment, limit: float, worker: Worker, watchdog: Watchdog, folder: Path
    ) -> None:
        self.found = Measurements(world_size=ranks.world_size, limit=limit, folder=str(folder))
        self._talk, self._ranks, self._limit, self._folder = talk, ranks, limit, folder
        self._worker, self._watchdog = worker, watchdog
        self._patience = limit + SLACK_SECONDS
        self._token = secrets.token_hex(8)
        self._arrivals: dict[int, Arrival] = {}
        self._step = 0

    def measure(self) -> Measurements:
        """Everything, of whoever answers."""
        self._watchdog.expect(self._patience, "the store of rank 0 hangs")
        self.gather()
        self._describe()
        self._clocks()
        self._files()
        self._all_reduces()
        return self.found

    def gather(self, environ: Mapping[str, str] = os.environ) -> None:
        """Waits for the arrivals, for all of them together at most the limit."""
        arrive(self._talk, self._ranks)
        end = time.monotonic() + self._limit
        for rank in range(self._ranks.world_size):
            said = self._talk.hear(f"arrival/{rank}", max(0.05, end - time.monotonic()))
            if said is None:
                self.found.missing_ranks.append(rank)
            else:
                self._arrivals[rank] = Arrival(rank=rank, **said)
        self.found.nodes = nodes_of(self._arrivals)
        if self.found.missing_ranks and environ.get("SLURM_STEP_NODELIST"):
            came = {arrival.host.partition(".")[0] for arrival in self._arrivals.values()}
            hosts = expand_hosts(environ["SLURM_STEP_NODELIST"])
            self.found.missing_hosts = [host for host in hosts if host.partition(".")[0] not in came]

    def end(self, code: int) -> None:
        """Tells the ranks to end with this exit code, and keeps the store alive until those that answer have heard."""
        self._watchdog.expect(self._patience, "the store of rank 0 hangs")
        self._talk.say(f"step/{self._step}", {"do": "end", "code": code})
        end = time.monotonic() + _MARGIN
        for node in self._answering():
            for rank in node.ranks:
                if rank != 0:
                    self._talk.hear(f"bye/{rank}", max(0.01, end - time.monotonic()))
        self._watchdog.rest()

    def _answering(self) -> list[Node]:
        return [node for node in self.found.nodes if node.name not in self.found.silent]

    def _ask(self, requests: Mapping[int, dict[str, Any]], what: str) -> dict[int, dict[str, Any]]:
        """The answers by rank. Nodes of ranks that do not answer are silent from now on."""
        self._watchdog.expect(self._patience, f"rank 0 hangs during {what}")
        number, self._step = self._step, self._step + 1
        self._talk.say(f"step/{number}", {"do": "measure", "limit": self._limit, "requests": requests})
        end = time.monotonic() + self._limit
        answers = {}
        if 0 in requests:
            self._worker.send(requests[0])
            answers[0] = self._worker.answer(self._limit)
        for rank in requests:
            if rank == 0:
                continue
            answer = self._talk.hear(f"result/{number}/{rank}", max(0.05, end + _MARGIN - time.monotonic()))
            if answer is None:
                self.found.silent[self._node_of(rank).name] = what
            else:
                answers[rank] = answer
        return answers

    def _node_of(self, rank: int) -> Node:
        return next(node for node in self.found.nodes if rank in node.ranks)

    def _ask_leaders(self, request: dict[str, Any], what: str) -> dict[str, dict[str, Any]]:
        """The answers by node; errors go to `found.errors`."""
        leaders = {node.leader: node.name for node in self._answering()}
        good = {}
        for rank, answer in self._ask(dict.fromkeys(leaders, request), what).items():
            if "error" in answer:
                self.found.errors[leaders[rank], what] = answer["error"]
            else:
                good[leaders[rank]] = answer
        return good

    def _describe(self) -> None:
        answers = self._ask_leaders({"do": "describe"}, "looking at packages and GPUs")
        self.found.descriptions = {node: Description.read(answer) for node, answer in answers.items()}
        # Where one has no GPU the others cannot use theirs together with it.
        if answers and all(description.gpus for description in self.found.descriptions.values()):
            self.found.backend = "nccl"

    def _clocks(self) -> None:
        others = [node for node in self._answering() if node.leader != 0]
        self._talk.say(f"step/{self._step}", {"do": "clock", "ranks": [node.leader for node in others]})
        self._step += 1
        end = time.monotonic() + self._limit
        for node in others:
            if time.monotonic() > end:
                self.found.errors[node.name, "clock"] = "no time was left to ask for it, after others did not answer"
                continue
            self._watchdog.expect(self._patience, f"rank 0 hangs while it asks {node.name} for the time")
            skew = ask_time(self._talk, node.leader)
            if skew is None:
                self.found.silent[node.name] = "the comparison of clocks"
            else:
                self.found.skews[node.name] = skew

    def _files(self) -> None:
        self._watchdog.expect(self._patience, f"{self._folder} hangs on rank 0's host: look at its mount")
        shown = self._folder / f".megatron-ru-doctor-{self._token}"
        try:
            shown.touch(exist_ok=False)
        except OSError as error:
            raise UserError(f"{self._folder} cannot be written to ({error.strerror}): name another --folder") from error
        try:
            request = {"do": "files", "folder": str(self._folder), "show": shown.name}
            answers = self._ask_leaders(request, f"measuring {self._folder}")
        finally:
            shown.unlink(missing_ok=True)
        for node, answer in answers.items():
            self.found.files[node] = file_finding(FileTimes(**answer["times"]), str(self._folder))
            if node != self.found.nodes[0].name:
                self.found.folder_seen[node] = answer["seen"]

    def _all_reduces(self) -> None:
        alone = [(node.name,) for node in self._answering() if len(node.ranks) > 1]
        if alone:
            self.found.inside = self._together(alone, "an all-reduce inside the node")
        for number, pairs in enumerate(rounds([node.name for node in self._answering()])):
            here = {node.name for node in self._answering()}
            going = [pair for pair in pairs if here >= set(pair)]
            if going:
                self.found.pairs += self._together(going, f"round {number + 1} of the all-reduces in pairs")

    def _together(self, groups: Sequence[tuple[str, ...]], what: str) -> list[AllReduce]:
        """An all-reduce in each of the groups of nodes at the same time, without those of nodes that fell silent."""
        nodes = {node.name: node for node in self.found.nodes}
        members = {group: [rank for name in group for rank in nodes[name].ranks] for group in groups}
        requests = {
            rank: {
                "do": "all_reduce",
                "address": self._ranks.master_address,
                "port": self._ranks.master_port,
                "meeting": f"{self._token}/{self._step}/{ranks[0]}",
                "rank": place,
                "ranks": len(ranks),
                "backend": self.found.backend,
                "device": self._arrivals[rank].local_rank,
                # Its own error says more than that it had to be killed.
                "limit": 0.8 * self._limit,
            }
            for ranks in members.values()
            for place, rank in enumerate(ranks)
        }
        answers = self._ask(requests, what)
        return [
            combined(group, {rank: answers[rank] for rank in ranks})
            for group, ranks in members.items()
            if not any(name in self.found.silent for name in group)
        ]


def combined(nodes: tuple[str, ...], answers: Mapping[int, dict[str, Any]]) -> AllReduce:
    """One all-reduce from the answers of its ranks: the slowest counts, and the first error."""
    for rank, answer in answers.items():
        if "error" in answer:
            return AllReduce(nodes=nodes, ranks=len(answers), error=f"rank {rank}: {answer['error']}")
    return AllReduce(
        nodes=nodes,
        ranks=len(answers),
        right=all(answer["right"] for answer in answers.values()),
        bytes=min(answer["bytes"] for answer in answers.values()),
        seconds=max(answer["seconds"] for answer in answers.values()),
        latency_seconds=max(answer["latency_seconds"] for answer in answers.values()),
    )


def ask_time(talk: Conversation, rank: int, clock: Callable[[], float] = time.time) -> Skew | None:
    """How far that rank's clock is ahead of ours, from the quickest of a few answers; None when it does not answer."""
    best: Skew | None = None
    for ping in range(PINGS):
        begin = clock()
        talk.say(f"clock/{rank}/{ping}/ask", True)
        theirs = talk.hear(f"clock/{rank}/{ping}/time", PING_SECONDS)
        end = clock()
        if theirs is None:
            return best
        skew = Skew(seconds=theirs - (begin + end) / 2, uncertainty_seconds=(end - begin) / 2)
        if best is None or skew.uncertainty_seconds < best.uncertainty_seconds:
            best = skew
    return best
