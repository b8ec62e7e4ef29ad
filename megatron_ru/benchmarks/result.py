"""What was measured, in numbers that can be written down and compared. Nothing here needs torch."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

OURS = "megatron_ru"

# Forward, backward and both of a call, in this order everywhere.
PASSES = ("forward", "backward", "both")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Time of one pass."""

    microseconds: float
    """Median of the repeats."""
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    repeats: int
    iterations: int
    """Calls in each repeat."""

    @classmethod
    def of(cls, seconds: Sequence[float], iterations: int) -> "Timing":
        """From the seconds of each repeat, every one of `iterations` calls."""
        ordered = sorted(1e6 * value / iterations for value in seconds)
        return cls(
            microseconds=_quantile(ordered, 0.5),
            low=_quantile(ordered, 0.25),
            high=_quantile(ordered, 0.75),
            repeats=len(ordered),
            iterations=iterations,
        )


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Distance from the formula in float64."""

    output: float
    """‖result - exact‖ / ‖exact‖, the largest of the outputs."""
    gradient: float | None
    """The same of the gradients; None when there are none."""
    ulps: float
    """Largest distance of an output's entry, in units in the last place of the larger of it and the typical entry."""
    gradient_ulps: float | None
    of_limit: float
    """The largest of these distances over what the op's tolerance and the dtypes account for."""
    good: bool
    """Whether all of them are within that."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender in one case."""

    op: str
    case: str
    dtype: str
    contender: str
    status: str
    """`ok`, `failed`, `unsupported` or `left out`."""
    note: str = ""
    """The reason, or what to know about the number."""
    timed: str = ""
    """How: `queued`, `graph`, `launched` or `wall clock`."""
    forward: Timing | None = None
    backward: Timing | None = None
    both: Timing | None = None
    bytes_forward: int = 0
    """The fewest bytes that can pass through memory."""
    bytes_backward: int = 0
    flops: int = 0
    accuracy: Accuracy | None = None
    host_microseconds: float | None = None
    """Time that the host spends on a forward call."""
    extra_bytes: int | None = None
    """Most memory in use during forward and backward, beyond arguments, outputs and gradients."""

    @property
    def counts(self) -> bool:
        """Whether it was timed and is right: the others are not compared with."""
        return self.status == "ok" and (self.accuracy is None or self.accuracy.good)

    def timing(self, name: str) -> Timing | None:
        """Of a pass."""
        return {"forward": self.forward, "backward": self.backward, "both": self.both}[name]

    def bytes(self, name: str) -> int:
        """The fewest bytes of a pass."""
        forward, backward = self.bytes_forward, self.bytes_backward
        return {"forward": forward, "backward": backward, "both": forward + backward}[name]

    def bandwidth(self, name: str) -> float | None:
        """Fewest bytes over time, in GB/s (10⁹); None for a pass that was not timed or needs no bytes."""
        timing = self.timing(name)
        if timing is None or self.bytes(name) == 0:
            return None
        return self.bytes(name) / timing.microseconds / 1e3

    def percent(self, name: str, ceiling: float) -> float | None:
        """`bandwidth` as a percentage of `ceiling` GB/s."""
        bandwidth = self.bandwidth(name)
        return None if bandwidth is None or ceiling <= 0 else 100 * bandwidth / ceiling

    def tflops(self) -> float | None:
        """10¹² operations a second over forward and backward."""
        whole = self.whole()
        return None if whole is None or self.flops == 0 else self.flops / whole.microseconds / 1e6

    def whole(self) -> Timing | None:
        """Of everything that is timed: forward and backward, or the forward where there is no backward."""
        return self.both or self.forward


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Microseconds of a pass, ours and theirs."""

    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        """How many times as fast ours is."""
        return self.theirs / self.ours


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Ours beside the fastest of the others that are right."""

    op: str
    case: str
    ours: float
    """Microseconds of everything that is timed."""
    peer: str
    theirs: float
    forward: Pair | None = None
    backward: Pair | None = None
    """The same two, pass by pass: who wins on the whole may lose one of them."""

    def json(self) -> dict[str, Any]:
        """For a file, with the ratios."""
        passes = {"forward": self.forward, "backward": self.backward}
        ratios = {
            name: None if pair is None else {**asdict(pair), "ratio": pair.ratio} for name, pair in passes.items()
        }
        return {**asdict(self), "ratio": self.ratio, **ratios}

    @property
    def ratio(self) -> float:
        """How many times as fast ours is."""
        return self.theirs / self.ours


def compare(rows: Iterable[Row]) -> list[Comparison]:
    """One comparison for each op and case with a time of ours and of a peer."""
    cases: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        cases.setdefault((row.op, row.case, row.dtype), []).append(row)
    found = []
    for (op, case, _), members in cases.items():
        times = [(whole.microseconds, row) for row in members if row.counts and (whole := row.whole()) is not None]
        ours = [(time, row) for time, row in times if row.contender == OURS]
        others = [(time, row) for time, row in times if row.contender != OURS]
        if ours and others:
            (mine, own), (theirs, peer) = ours[0], min(others, key=lambda one: one[0])
            found.append(
                Comparison(
                    op=op, case=case, ours=mine, peer=peer.contender, theirs=theirs,
                    forward=_pair(own.forward, peer.forward), backward=_pair(own.backward, peer.backward),
                )
            )  # fmt: skip
    return found


def _pair(ours: Timing | None, theirs: Timing | None) -> Pair | None:
    if ours is None or theirs is None:
        return None
    return Pair(ours=ours.microseconds, theirs=theirs.microseconds)


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A case that was not measured to its end."""

    op: str
    case: str
    contenders: tuple[str, ...]
    """Who is missing."""
    in_part: bool
    """Whether there are rows of others."""

    def __str__(self) -> str:
        without = f" (without {', '.join(self.contenders)})" if self.in_part else ""
        return f"{self.op} {self.case}{without}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole run."""

    command: str
    date: str
    """UTC, ISO 8601."""
    device: str
    """`cuda` or `cpu`."""
    device_name: str
    environment: dict[str, str]
    """Versions, driver, threads."""
    ceiling: float
    """GB/s of a large copy, bytes read and written, in this process."""
    peers: dict[str, str]
    """For each library asked for: its version, or why it took no part."""
    rows: tuple[Row, ...]
    seconds: float
    cases: int
    """How many were chosen."""
    missing: tuple[Missing, ...] = ()
    """Those among them that are not there, or not whole; none after a run that came to its end."""

    def comparisons(self) -> list[Comparison]:
        """`compare` over the whole cases: in one cut short, who is missing may be the fastest."""
        cut = {(one.op, one.case) for one in self.missing}
        return compare(row for row in self.rows if (row.op, row.case) not in cut)

    def json(self) -> dict[str, Any]:
        """For a file: everything, with what follows from it spelled out."""
        found = {
            "schema": 1,
            "command": self.command,
            "date": self.date,
            "device": self.device,
            "device_name": self.device_name,
            "environment": self.environment,
            "copy_ceiling_gb_s": self.ceiling,
            "peers": self.peers,
            "run_seconds": round(self.seconds, 1),
            "cases": self.cases,
            "missing": [asdict(one) for one in self.missing],
            "rows": [self._row(row) for row in self.rows],
            "comparisons": [one.json() for one in self.comparisons()],
        }
        return {name: _without_nan(value) for name, value in found.items()}

    def _row(self, row: Row) -> dict[str, Any]:
        return {
            **asdict(row),
            "gb_s": {name: row.bandwidth(name) for name in PASSES},
            "percent_of_ceiling": {name: row.percent(name, self.ceiling) for name in PASSES},
            "tflop_s": row.tflops(),
        }


def _without_nan(value: Any) -> Any:
    """The same with words for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear between neighbours (Hyndman and Fan, 1996, definition 7)."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
