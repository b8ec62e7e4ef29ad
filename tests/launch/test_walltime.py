import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ru.foundation.errors import UserError
from megatron_ru.launch.walltime import days_hours_minutes_seconds, hours_minutes_seconds, walltime_seconds


@pytest.mark.parametrize(
    ("written", "seconds", "hours", "days"),
    [
        # Grid Engine refuses 1:8:00:00 as h_rt.
        ("1:8:00:00", 115200, "32:00:00", "1-08:00:00"),
        ("1-08:00:00", 115200, "32:00:00", "1-08:00:00"),
        ("32:00:00", 115200, "32:00:00", "1-08:00:00"),
        ("00:00:01", 1, "00:00:01", "00:00:01"),
        ("23:59:59", 86399, "23:59:59", "23:59:59"),
        ("24:00:00", 86400, "24:00:00", "1-00:00:00"),
        ("3d", 259200, "72:00:00", "3-00:00:00"),
        ("168h", 604800, "168:00:00", "7-00:00:00"),
        ("90m", 5400, "01:30:00", "01:30:00"),
        ("45s", 45, "00:00:45", "00:00:45"),
    ],
)
def test_conversions(written, seconds, hours, days):
    assert walltime_seconds(written) == seconds
    assert hours_minutes_seconds(seconds) == hours
    assert days_hours_minutes_seconds(seconds) == days


@given(st.integers(1, 10**8))
def test_what_is_written_is_read_back(seconds):
    assert walltime_seconds(days_hours_minutes_seconds(seconds)) == seconds
    if seconds < 99999 * 3600:
        assert walltime_seconds(hours_minutes_seconds(seconds)) == seconds


@pytest.mark.parametrize("written", ["30", "10:00", "", "1-2", "1:00:00\n", "-1:00:00", "1h30m", "٣h", "1:00:00 $(x)"])
def test_what_schedulers_read_differently_or_not_at_all_is_refused(written):
    with pytest.raises(UserError, match="is not HH:MM:SS, D-HH:MM:SS, or a number with d, h, m or s"):
        walltime_seconds(written)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("1:60:00", "1 hours, 60 minutes and 0 seconds; expected minutes and seconds below 60"),
        ("1-24:00:00", "24 hours, 0 minutes and 0 seconds; expected .* hours below 24 where days stand"),
        ("00:00:00", "no time at all"),
        ("0h", "no time at all"),
    ],
)
def test_numbers_out_of_range(written, message):
    with pytest.raises(UserError, match=message):
        walltime_seconds(written)
