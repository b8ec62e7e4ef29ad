"""How fast the folder of a run takes small files and large ones."""

import dataclasses
import itertools
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from megatron_ru.doctor.finding import Finding

_BLOCK = 8 * 2**20
# A checkpoint of a small model is a few hundred files; a tenth of a second for each is half a minute.
_SLOW_FILE_SECONDS = 0.1
_SLOW_BYTES_PER_SECOND = 100e6
_LITTLE_SPACE = 10 * 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileTimes:
    """What was measured in one folder on one host."""

    kind: str
    """As in ext4, nfs4, lustre."""
    free_bytes: int
    create_seconds: float
    """Of a file of 4 KiB, opened and written; like the three below, the median."""
    sync_seconds: float
    rename_seconds: float
    stat_seconds: float
    write_bytes_per_second: float
    """With the fsync at the end."""
    read_bytes_per_second: float
    """An upper bound: this host wrote the file, and may hold part of it."""

    @property
    def file_seconds(self) -> float:
        """From nothing to a whole file under its name."""
        return self.create_seconds + self.sync_seconds + self.rename_seconds + self.stat_seconds


def measure_files(folder: Path, files: int = 16, size: int = 64 * 2**20, seconds: float = 5.0) -> FileTimes:
    """Times in a folder of its own inside `folder`, removed at the end. Raises OSError.

    `seconds` bound each half: a slow file system gets fewer files and bytes, at least three and one block.
    """
    with tempfile.TemporaryDirectory(prefix=".megatron-ru-doctor-", dir=folder) as inside:
        small = _small_files(Path(inside), files, seconds)
        write, read = _large_file(Path(inside) / "large", size, seconds)
    create, sync, rename, stat = (statistics.median(column) for column in zip(*small, strict=True))
    return FileTimes(
        kind=kind_of(folder),
        free_bytes=shutil.disk_usage(folder).free,
        create_seconds=create,
        sync_seconds=sync,
        rename_seconds=rename,
        stat_seconds=stat,
        write_bytes_per_second=write,
        read_bytes_per_second=read,
    )


def kind_of(folder: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The type of the file system that `folder` is on, from the kernel's table; `unknown` without one."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "unknown"
    wanted, best, kind = str(folder.resolve()), "", "unknown"
    for line in lines:
        words = line.split()
        if len(words) < 3:
            continue
        point = words[1].replace("\\040", " ")
        inside = wanted == point or wanted.startswith(point.rstrip("/") + "/")
        # Of two mounts over one point the later one is seen.
        if inside and len(point) >= len(best):
            best, kind = point, words[2]
    return kind


def file_finding(times: FileTimes, folder: str) -> Finding:
    """One line about the folder."""
    parts = (
        f"create {_ms(times.create_seconds)}, fsync {_ms(times.sync_seconds)}, rename {_ms(times.rename_seconds)}, "
        f"stat {_ms(times.stat_seconds)}; write {_rate(times.write_bytes_per_second)}, "
        f"read {_rate(times.read_bytes_per_second)}"
    )
    why = []
    if times.file_seconds > _SLOW_FILE_SECONDS:
        why.append(
            f"a small file takes {times.file_seconds:.2f} s: keep checkpoints in few files, data caches elsewhere"
        )
    if times.write_bytes_per_second < _SLOW_BYTES_PER_SECOND:
        minutes = 100e9 / times.write_bytes_per_second / 60
        why.append(f"a checkpoint of 100 GB would take {minutes:.0f} min: save to a faster folder, or more rarely")
    if times.free_bytes < _LITTLE_SPACE:
        why.append(f"{times.free_bytes / 2**30:.1f} GiB are free: make room before checkpoints fill it")
    return Finding(
        subject="files",
        verdict="slow" if why else "ok",
        detail=f"{folder} ({times.kind}): {parts}" + "".join(f"; {reason}" for reason in why),
        values={name: value for name, value in dataclasses.asdict(times).items() if name != "kind"},
    )


def _small_files(folder: Path, files: int, seconds: float) -> list[tuple[float, float, float, float]]:
    found = []
    end = time.perf_counter() + seconds
    for number in range(files):
        if number >= 3 and time.perf_counter() > end:
            break
        temporary, final = folder / f"{number}.partial", folder / str(number)
        ticks = [time.perf_counter()]
        with open(temporary, "wb", buffering=0) as stream:
            stream.write(bytes(4096))
            ticks.append(time.perf_counter())
            os.fsync(stream.fileno())
        ticks.append(time.perf_counter())
        os.replace(temporary, final)
        ticks.append(time.perf_counter())
        os.stat(final)
        ticks.append(time.perf_counter())
        create, sync, rename, stat = (late - early for early, late in itertools.pairwise(ticks))
        found.append((create, sync, rename, stat))
    return found


def _large_file(path: Path, size: int, seconds: float) -> tuple[float, float]:
    """Bytes per second, written and read."""
    block = os.urandom(_BLOCK)
    begin = time.perf_counter()
    written = 0
    with open(path, "wb", buffering=0) as stream:
        while written < size and (written == 0 or time.perf_counter() < begin + seconds):
            written += stream.write(block)
        os.fsync(stream.fileno())
        writing = time.perf_counter() - begin
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begin = time.perf_counter()
    read = 0
    with open(path, "rb", buffering=0) as stream:
        while (block := stream.read(_BLOCK)) and time.perf_counter() < begin + seconds:
            read += len(block)
    return written / writing, max(read, 1) / (time.perf_counter() - begin)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e6:.3g} MB/s" if bytes_per_second < 1e9 else f"{bytes_per_second / 1e9:.3g} GB/s"
