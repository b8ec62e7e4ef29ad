"""Who was to blame, and with which exit code an attempt ends: pure functions of what a guard has seen."""

import re
import signal
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from megatron_ru.foundation.errors import TRY_AGAIN
from megatron_ru.foundation.heartbeat import Phase
from megatron_ru.launch.guard.ranks import Ranks, RankSeen
from megatron_ru.launch.guard.stacks import waits_for_others

_CUT_SECONDS = 10.0
_WINDOW_SECONDS = 2.0
# What a rank says that fails because another one has.
_BY_OTHERS = re.compile(
    r"connection (?:closed|reset|refused)|broken pipe|\bpeer\b|gloo|nccl|DistBackendError|DistNetworkError|timed? ?out|"
    r"TCPStore|KeyboardInterrupt|SystemExit",
    re.I,
)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a guard waits, in seconds."""

    stall: float = 600.0
    """For the next beat of a rank that trains, and for a keeper that is silent."""
    start: float = 1800.0
    """From the greeting of a keeper to the first training step."""
    start_for_all: bool = False
    """Whether that holds for commands too that never beat."""
    grace: float = 30.0
    """From TERM to KILL."""

    @property
    def pause(self) -> float:
        """From one word of a keeper to the next."""
        return max(min(1.0, self.stall / 5), 0.05)

    @property
    def answer(self) -> float:
        """How long a keeper may be silent before it counts as one that does not answer."""
        return 4 * self.pause

    @property
    def cut(self) -> float:
        """How long a keeper may take to call again after its line was cut."""
        return min(_CUT_SECONDS, self.stall)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How an attempt ended."""

    fault: str
    """`none`, `saved`, `exit`, `early exit`, `killed`, `lost`, `stopped`, `stall`, `start`, `launcher` or
    `ended`."""
    code: int
    """The exit code of the attempt: 0, a rank's own, 128 + its signal, the launcher's, or 75."""
    rank: int | None = None
    host: str = ""
    step: int = -1
    why: str = ""
    """One clause in plain words, without who it was."""


def trouble(ranks: Ranks, limits: Limits, now: float) -> str | None:
    """`exit`, `lost`, `stall` or `start` once one of them is there; None as long as all is well."""
    running = ranks.running
    if _failed(ranks):
        return "exit"
    for one in running:
        if now - one.heard > limits.stall or (one.cut is not None and now - one.cut > limits.cut):
            return "lost"
        if one.phase != Phase.STARTING and one.idle_at(now) > limits.stall:
            return "stall"
        begun = one.beats > 0 or limits.start_for_all
        if begun and one.phase == Phase.STARTING and now - one.started > limits.start:
            return "start"
    if limits.start_for_all and len(ranks.seen) < max(ranks.world, 1) and now > limits.start:
        return "start"
    return None


def judge(ranks: Ranks, limits: Limits, now: float, *, what: str | None, launcher: int | None) -> Verdict:
    """The verdict on an attempt.

    `what` is the trouble that ended it, `launcher` for a launcher that does not end, or None when the launcher ended
    by itself; `launcher` is its exit code where it has one.
    """
    if what in ("stall", "lost", "start"):
        return _of_hang(ranks, limits, now, what)
    if _failed(ranks):
        return _of_failure(ranks, limits, now)
    lost = _silent(ranks, limits, now)
    if lost and launcher != 0:
        return _lost(lost[0], now)
    saved = _first(one for one in ranks.seen.values() if one.code == TRY_AGAIN)
    if saved is not None:
        return _about(saved, "saved", TRY_AGAIN, "saved and asked for another start")
    if what == "launcher":
        return Verdict(fault="launcher", code=TRY_AGAIN, why="the launcher does not end, though all ranks have")
    if launcher:
        return Verdict(fault="launcher", code=launcher, why=f"the launcher ended with code {launcher}")
    return Verdict(fault="none", code=0)


def _of_hang(ranks: Ranks, limits: Limits, now: float, what: str) -> Verdict:
    """When all stand still at once: a rank that exited, else one that does not answer, else a stopped one, else one
    that does not wait for the others, else the one with the lowest step and of these the longest without a beat."""
    gone = _first(one for one in ranks.seen.values() if one.ended is not None)
    if gone is not None:
        return _about(gone, "early exit", TRY_AGAIN, f"exited with code {gone.code} while the others went on")
    silent = _silent(ranks, limits, now)
    if silent:
        return _lost(silent[0], now)
    missing = [rank for rank in range(ranks.world) if rank not in ranks.seen]
    if what == "start" and (missing or not ranks.seen):
        rank = missing[0] if missing else 0
        others = f", nor did {len(missing) - 1} others" if len(missing) > 1 else ""
        return Verdict(
            fault="start", code=TRY_AGAIN, rank=rank, why=f"did not come within {_seconds(limits.start)}{others}"
        )
    stopped = sorted((one for one in ranks.running if one.letter in ("T", "t")), key=_slowest)
    if stopped:
        return _about(stopped[0], "stopped", TRY_AGAIN, f"is stopped (state {stopped[0].letter})" + _idle(stopped, now))
    suspects = sorted(_not_waiting(ranks.running) or ranks.running, key=_slowest)
    one = suspects[0]
    place = f", in {one.frames[0]}" if one.frames else ""
    if what == "start":
        why = f"has made no step in {_seconds(now - one.started)} (limit {_seconds(limits.start)}){place}"
        return _about(one, "start", TRY_AGAIN, why)
    return _about(one, "stall", TRY_AGAIN, f"hangs{_idle([one], now)} (limit {_seconds(limits.stall)}){place}")


def _of_failure(ranks: Ranks, limits: Limits, now: float) -> Verdict:
    """The first failure in time, unless what it says points to another rank that failed, left or fell silent."""
    failed = _failed(ranks)
    first = failed[0]
    begin = first.ended or 0.0
    # A launcher that lost a host ends the ranks of the others, and they tell of it.
    lost = [one for one in _silent(ranks, limits, now) if one.heard < begin]
    blames_others = _BY_OTHERS.search(first.exception) is not None
    if lost and (blames_others or first.code in (128 + signal.SIGTERM, 128 + signal.SIGKILL)):
        return _lost(lost[0], now)
    if blames_others:
        for one in failed[1:]:
            if (one.ended or 0.0) - begin <= _WINDOW_SECONDS and not _BY_OTHERS.search(one.exception):
                first = one
                break
        else:
            stopped = [one for one in ranks.running if one.letter in ("T", "t")]
            if stopped:
                return _about(stopped[0], "stopped", TRY_AGAIN, "is stopped" + _idle(stopped, now))
            left = _first(one for one in ranks.seen.values() if one.code == 0 and (one.ended or 0.0) <= begin)
            if left is not None:
                return _about(left, "early exit", first.code or 1, "exited with code 0 while the others went on")
    code = first.code or 1
    if first.exception:
        place = f" at {first.where}" if first.where else ""
        return _about(first, "exit", code, f"ended by {first.exception}{place} (code {code})")
    if code > 128:
        return _about(first, "killed", code, f"was killed by {_signal_name(code - 128)} (code {code})")
    return _about(first, "exit", code, f"exited with code {code}")


def _failed(ranks: Ranks) -> list[RankSeen]:
    """The ranks that failed, the first one first. A launcher that sees one rank end by 75 may kill the others, which
    have saved as well."""
    saved = _first(one for one in ranks.seen.values() if one.code == TRY_AGAIN)
    killed = (128 + signal.SIGTERM, 128 + signal.SIGKILL)
    return sorted(
        (
            one
            for one in ranks.seen.values()
            if one.code not in (None, 0, TRY_AGAIN)
            and not (saved is not None and one.code in killed and (one.ended or 0.0) >= (saved.ended or 0.0))
        ),
        key=lambda one: (one.ended or 0.0, one.rank),
    )


def _silent(ranks: Ranks, limits: Limits, now: float) -> list[RankSeen]:
    """The running ranks whose keeper does not answer, the longest silent first."""
    return sorted(
        (one for one in ranks.running if now - one.heard > limits.answer or one.cut is not None),
        key=lambda one: (one.heard, one.rank),
    )


def _lost(one: RankSeen, now: float) -> Verdict:
    how = "its line is cut" if one.cut is not None else "nothing was heard of it"
    return _about(one, "lost", TRY_AGAIN, f"does not answer: {how} for {_seconds(now - one.heard)}")


def _not_waiting(running: list[RankSeen]) -> list[RankSeen]:
    """Those whose stack shows that they do not wait for the others; none where that tells nothing."""
    known = [one for one in running if one.frames]
    places = Counter(_place(one) for one in known)
    crowd = {place for place, count in places.items() if 2 * count > len(known)}
    busy = [one for one in known if not waits_for_others(one.frames or ()) and _place(one) not in crowd]
    return busy if len(busy) < len(known) else []


def _place(one: RankSeen) -> str:
    """The innermost frame without its line, which may differ between ranks that do the same."""
    file, _, rest = (one.frames or ("",))[0].rpartition(":")
    return file + rest.partition(" ")[2]


def _slowest(one: RankSeen) -> tuple[int, float, int]:
    return one.step, -one.idle, one.rank


def _first(some: Iterable[RankSeen]) -> RankSeen | None:
    return min(some, key=lambda one: (one.ended or 0.0, one.rank), default=None)


def _about(one: RankSeen, fault: str, code: int, why: str) -> Verdict:
    return Verdict(fault=fault, code=code, rank=one.rank, host=one.host, step=one.step, why=why)


def _idle(some: list[RankSeen], now: float) -> str:
    return f" without a beat for {_seconds(some[0].idle_at(now))}" if some[0].beats else ""


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"
