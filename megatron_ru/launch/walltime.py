"""Time limits: read in the forms people write, given in the form that each scheduler takes."""

import re

from megatron_ru.foundation.errors import UserError

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
EXPECTED = "HH:MM:SS, D-HH:MM:SS, or a number with d, h, m or s, such as 32:00:00, 1-08:00:00 or 90m"


def walltime_seconds(written: str) -> int:
    """Seconds in `32:00:00`, `1-08:00:00`, `1:08:00:00` (days first) or `90m`.

    Raises UserError for anything else; `30` and `10:00` among it, which schedulers read as different units.
    """
    short = re.fullmatch(r"(\d{1,9})([dhms])", written, re.ASCII)
    if short is not None:
        seconds = int(short[1]) * _UNITS[short[2]]
    else:
        parts = re.fullmatch(r"(?:(\d{1,4})[-:])?(\d{1,5}):(\d{1,2}):(\d{1,2})", written, re.ASCII)
        if parts is None:
            raise UserError(f"time limit {written!r} is not {EXPECTED}")
        days, hours, minutes, rest = (int(part or 0) for part in parts.groups())
        if minutes > 59 or rest > 59 or (parts[1] is not None and hours > 23):
            raise UserError(
                f"time limit {written!r} has {hours} hours, {minutes} minutes and {rest} seconds; expected minutes "
                "and seconds below 60, and hours below 24 where days stand before them"
            )
        seconds = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    if seconds == 0:
        raise UserError(f"time limit {written!r} is no time at all: give at least a second")
    return seconds


def hours_minutes_seconds(seconds: int) -> str:
    """`32:00:00`, hours beyond 24, as Grid Engine and PBS take it; Grid Engine refuses `1:8:00:00`."""
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def days_hours_minutes_seconds(seconds: int) -> str:
    """`1-08:00:00` from a day on, as Slurm writes it; `08:00:00` below."""
    days, rest = divmod(seconds, 86400)
    return (f"{days}-" if days else "") + hours_minutes_seconds(rest)
