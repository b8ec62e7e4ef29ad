"""What is measured in a folder, and what is thought of it."""

import dataclasses

import pytest

from megatron_ru.doctor.file_system import FileTimes, file_finding, kind_of, measure_files

GOOD = FileTimes(
    kind="lustre", free_bytes=2**40, create_seconds=1e-3, sync_seconds=2e-3, rename_seconds=5e-4, stat_seconds=1e-4,
    write_bytes_per_second=1.5e9, read_bytes_per_second=2e9,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "verdict", "words"),
    [
        ({}, "ok", "write 1.5 GB/s, read 2 GB/s"),
        ({"sync_seconds": 0.25}, "slow", "a small file takes 0.25 s: keep checkpoints in few files"),
        ({"write_bytes_per_second": 20e6}, "slow", "a checkpoint of 100 GB would take 83 min"),
        ({"write_bytes_per_second": 100e6}, "ok", "write 100 MB/s"),
        ({"free_bytes": 2**30}, "slow", "1.0 GiB are free: make room"),
    ],
)
def test_verdicts(change, verdict, words):
    finding = file_finding(dataclasses.replace(GOOD, **change), "/data")
    assert (finding.subject, finding.verdict) == ("files", verdict)
    assert finding.detail.startswith("/data (lustre): create 1 ms, ")
    assert words in finding.detail
    assert finding.values["rename_seconds"] == 5e-4


def test_measures_and_leaves_nothing(tmp_path):
    times = measure_files(tmp_path, files=4, size=3 * 2**20)
    assert 0 < times.file_seconds < 5
    assert min(times.create_seconds, times.sync_seconds, times.rename_seconds, times.stat_seconds) > 0
    assert times.write_bytes_per_second > 1e6
    assert times.read_bytes_per_second > 1e6
    assert times.free_bytes > 0
    assert times.kind != "unknown"
    assert list(tmp_path.iterdir()) == []


def test_slow_file_systems_get_fewer_files(tmp_path, monkeypatch):
    renames = []
    monkeypatch.setattr("os.replace", lambda *names: (renames.append(names), open(names[1], "w").close()))
    measure_files(tmp_path, files=50, size=1, seconds=0)
    assert len(renames) == 3


def test_raises_for_a_folder_that_cannot_be_written_to(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        measure_files(tmp_path / "nowhere")


def test_kind_is_that_of_the_innermost_and_latest_mount(tmp_path):
    mounts = tmp_path / "mounts"
    inner = tmp_path / "with blank" / "deep"
    inner.mkdir(parents=True)
    blank = str(tmp_path / "with blank").replace(" ", "\\040")
    mounts.write_text(f"root / ext4 rw 0 0\nserver:/x {blank} nfs4 rw 0 0\nother {tmp_path}/with xfs rw 0 0\n")
    assert kind_of(inner, mounts) == "nfs4"
    assert kind_of(tmp_path, mounts) == "ext4"
    mounts.write_text(f"{mounts.read_text()}later {blank} lustre rw 0 0\n")
    assert kind_of(inner, mounts) == "lustre"
    assert kind_of(inner, tmp_path / "none") == "unknown"
