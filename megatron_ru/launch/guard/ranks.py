"""What a guard knows of its ranks, kept up from what their keepers say."""

from dataclasses import dataclass, field, replace

from megatron_ru.foundation.heartbeat import Phase
from megatron_ru.launch.guard.protocol import Message, seconds, text, whole

_MOST_RANKS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class RankSeen:
    """One rank. All times are seconds since the attempt began."""

    rank: int
    host: str = ""
    started: float = 0.0
    """When its keeper first greeted."""
    heard: float = 0.0
    """When its keeper was last heard."""
    cut: float | None = None
    """Since when there is no line to its keeper; None while there is one."""
    beats: int = 0
    step: int = -1
    phase: int = Phase.STARTING
    idle: float = 0.0
    """Seconds without a beat, as its keeper counted them when it was last heard."""
    letter: str = ""
    """State of the process: R, S, D, T."""
    ended: float | None = None
    code: int | None = None
    exception: str = ""
    """Class and words of the exception that it ended by."""
    where: str = ""
    frames: tuple[str, ...] | None = None
    """Its stack, innermost first; None when nobody has asked, or there was no answer."""

    def idle_at(self, now: float) -> float:
        """Seconds without a beat; a keeper that is silent is no reason to add more than a moment."""
        return self.idle + min(now - self.heard, 2.0)


@dataclass
class Ranks:
    """All ranks of one attempt."""

    world: int = 0
    seen: dict[int, RankSeen] = field(default_factory=dict)
    _pids: dict[int, tuple[str, int]] = field(default_factory=dict)

    def greeted(self, message: Message, now: float) -> int:
        """Notes a greeting, the first one or one after a cut, and returns the rank that it came from."""
        rank = whole(message, "rank", most=_MOST_RANKS)
        self.world = max(self.world, whole(message, "world", most=_MOST_RANKS), rank + 1)
        host, pid = text(message, "host", 100), whole(message, "pid")
        if rank in self.seen and self._pids[rank] == (host, pid):
            self.seen[rank] = replace(self.seen[rank], heard=now, cut=None)
        else:
            self.seen[rank] = RankSeen(rank=rank, host=host, started=now, heard=now)
            self._pids[rank] = (host, pid)
        return rank

    def said(self, rank: int, message: Message, now: float) -> None:
        """Notes what the keeper of that rank says."""
        known = replace(self.seen[rank], heard=now)
        match message["kind"]:
            case "ping":
                known = replace(
                    known,
                    beats=whole(message, "beats"),
                    step=whole(message, "step", least=-1, default=-1),
                    phase=whole(message, "phase", most=max(Phase)),
                    idle=seconds(message, "idle"),
                    letter=text(message, "letter", 1),
                )
            case "exit" if known.ended is None:
                what, words = text(message, "exception", 80), text(message, "message")
                known = replace(
                    known,
                    ended=now,
                    code=whole(message, "code", most=255),
                    step=whole(message, "step", least=-1, default=-1),
                    beats=whole(message, "beats"),
                    exception=f"{what}: {words}" if what and words else what or words,
                    where=text(message, "where"),
                )
            case "stacks":
                frames = message.get("frames")
                lines = frames[:20] if isinstance(frames, list) else []
                known = replace(known, frames=tuple(text({"": line}, "") for line in lines))
        self.seen[rank] = known

    def lost_line(self, rank: int, now: float) -> None:
        """Notes that the line to that keeper is cut."""
        self.seen[rank] = replace(self.seen[rank], cut=now)

    @property
    def running(self) -> list[RankSeen]:
        """The ranks that have not told their end."""
        return [one for one in self.seen.values() if one.ended is None]

    @property
    def complete(self) -> bool:
        """Whether every rank of the world has told its end."""
        return self.world > 0 and len(self.seen) >= self.world and not self.running
