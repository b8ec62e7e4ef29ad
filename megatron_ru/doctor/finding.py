"""A line of the doctor's report."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

VERDICTS = ("ok", "slow", "broken", "absent")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """A subject, what is to be thought of it, and why."""

    subject: str
    verdict: str
    """ok; slow: runs work and lose time or safety; broken: runs fail; absent: not there, and nobody needs it."""
    detail: str
    """What was found, and what to do unless it is ok."""
    values: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What was measured, with the unit in each name."""
    listed: bool = True
    """Whether the table shows it although it is ok; what is not ok is always shown."""

    def __post_init__(self) -> None:
        assert self.verdict in VERDICTS, self.verdict

    @classmethod
    def read(cls, written: Mapping[str, Any]) -> "Finding":
        """The finding that `dataclasses.asdict` made `written` of."""
        return cls(**written)

    @property
    def good(self) -> bool:
        return self.verdict in ("ok", "absent")


def exit_code(findings: Iterable[Finding], strict: bool = False) -> int:
    """1 where something is broken (`strict`: or slow), else 0."""
    bad = ("slow", "broken") if strict else ("broken",)
    return int(any(finding.verdict in bad for finding in findings))


def table(findings: Sequence[Finding]) -> str:
    """A line for each finding that is shown, in columns, with a newline behind each."""
    shown = [finding for finding in findings if finding.listed or not finding.good]
    width = max((len(finding.subject) for finding in shown), default=0)
    return "".join(f"{finding.subject:{width}}  {finding.verdict:6}  {finding.detail}\n" for finding in shown)
