"""Whether another attempt follows, when, and on which hosts: a pure function of the attempts before."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ru.foundation.errors import TRY_AGAIN
from megatron_ru.launch.guard.verdict import Verdict

LONGEST_PAUSE = 60.0
_BAD_INPUT = 2
_TWICE = 2


@dataclass(frozen=True, kw_only=True)
class Retry:
    """What follows an attempt that failed."""

    again: bool
    pause: float = 0.0
    """Seconds until the next attempt."""
    left_out: tuple[str, ...] = ()
    """Hosts that it does without."""
    why: str = ""
    """One sentence: why there is none, or what is to be known about the next one."""


def after(
    verdicts: Sequence[Verdict],
    *,
    most: int,
    back_off: float,
    spares: int = 0,
    fixed: str = "",
    signalled: str = "",
) -> Retry:
    """What follows the last of these verdicts.

    `most` attempts may follow the first, `spares` hosts may be left out, never the host `fixed`; `signalled` names the
    signal that asked for an end.
    """
    last, done = verdicts[-1], len(verdicts) - 1
    if last.code == 0:
        return Retry(again=False)
    if signalled:
        return Retry(again=False, why=f"{signalled} asked for an end, so there is no other attempt here")
    if last.code == _BAD_INPUT:
        return Retry(again=False, why="code 2 means bad input, and another attempt would not change it")
    if _same_failure(verdicts):
        when = "with no step done" if last.step < 0 else f"after step {last.step}"
        return Retry(
            again=False,
            why=f"code {last.code} came twice {when}, so another attempt would only come to the same place",
        )
    if done >= most:
        return Retry(again=False, why="" if most == 0 else f"that was the last of {most + 1} attempts")
    left_out, why = _left_out(verdicts, spares, fixed)
    return Retry(again=True, pause=min(back_off * 2**done, LONGEST_PAUSE), left_out=left_out, why=why)


def code_of(verdicts: Sequence[Verdict]) -> int:
    """The exit code of the job: the last attempt's, or 75 where its launcher failed to reach a host that was lost."""
    unreached = verdicts[-1].fault == "launcher" and _after_a_loss(_blamed(verdicts[:-1]), verdicts)
    return TRY_AGAIN if unreached else verdicts[-1].code


def _same_failure(verdicts: Sequence[Verdict]) -> bool:
    """Whether the last two ended at the same step by the same exit code of a rank's own."""
    if len(verdicts) < _TWICE or verdicts[-1].fault != "exit":
        return False
    one, other = verdicts[-2:]
    return (one.fault, one.code, one.step) == (other.fault, other.code, other.step)


def _left_out(verdicts: Sequence[Verdict], spares: int, fixed: str) -> tuple[tuple[str, ...], str]:
    """The hosts that were to blame twice, as many as there are spares, and what to say about the last one."""
    names = _blamed(verdicts)
    blamed = Counter(name for name in names if name)
    twice = [host for host, times in blamed.items() if times >= _TWICE]
    able = [host for host in twice if host != short(fixed)][:spares]
    host = names[-1]
    if host not in twice:
        return tuple(able), ""
    if host in able:
        return tuple(able), f"{host} was to blame {blamed[host]} times and is left out from now on"
    reason = "the ranks meet there" if host == short(fixed) else "there is no spare host"
    return tuple(able), f"{host} was to blame {blamed[host]} times and stays, since {reason}"


def _blamed(verdicts: Sequence[Verdict]) -> list[str]:
    """The host that each attempt is put on, empty for none.

    A launcher that fails before any rank was heard, right after a host was lost, failed to reach that host.
    """
    names: list[str] = []
    for one in verdicts:
        unreached = one.fault == "launcher" and _after_a_loss(names, verdicts)
        names.append(names[-1] if unreached else short(one.host))
    return names


def _after_a_loss(names: Sequence[str], verdicts: Sequence[Verdict]) -> bool:
    """Whether the attempt before lost a host, or could not reach one that was lost."""
    return bool(names) and names[-1] != "" and verdicts[len(names) - 1].fault in ("lost", "launcher")


def short(host: str) -> str:
    """The name of a host without its domain; an address as it is."""
    return host if host.replace(".", "").isdigit() else host.partition(".")[0]
