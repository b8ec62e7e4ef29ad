"""The repository speaks of no machine: what is tracked works in anybody's folder."""

import re
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]

# Home and work folders, written apart so that this file does not find itself.
FOLDERS = b"|".join((b"home", b"root", b"work", b"Users", b"mnt"))
ABSOLUTE = re.compile(rb"(?<![\w.$}~/-])/(?:" + FOLDERS + rb")/\w")
# A host behind which packages are mirrored has no place in a lock.
INDEX = re.compile(rb"(?m)^\s*(?:--(?:extra-)?index-url|--find-links|-[if]\s)|\s@\s+(?:https?|file):")


def tracked():
    listed = subprocess.run(
        ["git", "-C", str(PROJECT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout: no list of tracked files")
    found = [PROJECT / name.decode() for name in listed.stdout.split(b"\0") if name]
    return [path for path in found if path.is_file()]


def places(path, pattern):
    content = path.read_bytes()
    lines = [content[: hit.start()].count(b"\n") + 1 for hit in pattern.finditer(content)]
    return [f"{path.relative_to(PROJECT)}:{line}" for line in lines]


def test_no_absolute_paths_of_a_machine():
    assert [place for path in tracked() for place in places(path, ABSOLUTE)] == []


def test_pattern_finds_paths_and_leaves_addresses_alone():
    text = b"cd /" + b"home/ivan/run\nhttps://example.org/home/page\n$HOME/work/x ~/work/x /workspace/x\n"
    assert [text[: hit.start()].count(b"\n") + 1 for hit in ABSOLUTE.finditer(text)] == [1]


def test_lock_pins_versions_and_names_no_index():
    lock = PROJECT / "requirements-ci.txt"
    lines = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    assert "torch==2.13.0" in lines
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.+!]+", line)] == []
    assert places(lock, INDEX) == []


def test_nothing_large_is_tracked():
    """Source and figures, no data: a megabyte at most."""
    assert [str(path) for path in tracked() if path.stat().st_size > 1_000_000] == []
