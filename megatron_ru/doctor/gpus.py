"""The GPUs of a host as the driver sees them: memory, errors, and clocks that something holds down."""

import dataclasses
import shutil
import subprocess
from collections.abc import Iterator, Sequence

from megatron_ru.doctor.finding import Finding

_PLAIN = ("index", "name", "memory.total", "driver_version", "temperature.gpu")
# Asked for one group at a time: one field that a driver does not know spoils the whole query.
_GROUPS = (
    ("gpu", "ecc.errors.uncorrected.volatile.total"),
    ("gpu", "retired_pages.pending"),
    ("remapped-rows", "remapped_rows.pending", "remapped_rows.failure"),
    (
        "gpu", "clocks_event_reasons.hw_slowdown", "clocks_event_reasons.hw_thermal_slowdown",
        "clocks_event_reasons.sw_thermal_slowdown", "clocks_event_reasons.hw_power_brake_slowdown",
    ),
)  # fmt: skip
# What drivers before 535 call the last group.
_OLD_NAMES = {"clocks_event_reasons": "clocks_throttle_reasons"}
_YES = {"Yes", "1"}
_SECONDS = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU. None, or empty: the driver does not say."""

    index: int
    name: str
    memory_mib: int | None = None
    driver: str = ""
    celsius: int | None = None
    uncorrected_errors: int | None = None
    """ECC errors since the driver was loaded that could not be corrected."""
    repair_pending: bool = False
    """Whether bad memory waits for a reset to be mapped out."""
    repair_failed: bool = False
    held_down_by: tuple[str, ...] = ()
    """What keeps the clocks low now, apart from the usual power limit under load."""


class GpuTrouble(Exception):
    """nvidia-smi is there and does not answer as it should."""


def read_gpus(program: str = "nvidia-smi") -> list[Gpu] | None:
    """The GPUs of this host; None without nvidia-smi. Raises GpuTrouble where it fails or hangs."""
    if shutil.which(program) is None:
        return None
    code, said = _answer(program, "gpu", _PLAIN)
    if code != 0:
        reason = (said.strip() or "no word").splitlines()[0]
        raise GpuTrouble(f"nvidia-smi failed with code {code} ({reason}): load the driver again, or restart")
    plain = _rows(said)
    columns: dict[str, list[str]] = dict(zip(_PLAIN, _transposed(plain, len(_PLAIN)), strict=True))
    for query, *fields in _GROUPS:
        for names in dict.fromkeys((tuple(fields), tuple(map(_older, fields)))):
            code, said = _answer(program, query, names)
            rows = _rows(said)
            if code == 0 and len(rows) == len(plain):
                columns.update(zip(fields, _transposed(rows, len(fields)), strict=True))
                break
    return parse_gpus(columns)


def parse_gpus(columns: dict[str, list[str]]) -> list[Gpu]:
    """The GPUs in nvidia-smi's answers, field by field, one entry for each GPU."""
    found = []
    for place in range(len(columns["index"])):
        row = {field: values[place].strip() for field, values in columns.items()}
        slow = [field for field in row if field.startswith("clocks_event_reasons.") and row[field] == "Active"]
        found.append(
            Gpu(
                index=int(row["index"]),
                name=row["name"],
                memory_mib=_number(row["memory.total"]),
                driver=row["driver_version"],
                celsius=_number(row["temperature.gpu"]),
                uncorrected_errors=_number(row.get("ecc.errors.uncorrected.volatile.total", "")),
                repair_pending=bool(_YES & {row.get("retired_pages.pending"), row.get("remapped_rows.pending")}),
                repair_failed=row.get("remapped_rows.failure") in _YES,
                held_down_by=tuple(field.partition(".")[2].replace("_", " ") for field in slow),
            )
        )
    return found


def gpu_findings(gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """A line for each GPU."""
    for gpu in gpus:
        yield _judged(gpu)


def _judged(gpu: Gpu) -> Finding:
    memory = "" if gpu.memory_mib is None else f", {gpu.memory_mib / 1024:.0f} GiB"
    what = f"{gpu.name}{memory}, driver {gpu.driver}"
    subject = f"gpu {gpu.index}"
    if gpu.repair_failed:
        detail = f"{what}: bad memory could not be mapped out: take the host out, the GPU has to be replaced"
        return Finding(subject=subject, verdict="broken", detail=detail)
    if gpu.uncorrected_errors:
        detail = f"{what}: {gpu.uncorrected_errors} uncorrected memory errors since the driver was loaded: "
        return Finding(
            subject=subject, verdict="broken", detail=f"{detail}reset the GPU, leave the host out until then"
        )
    if gpu.held_down_by:
        heat = "" if gpu.celsius is None else f" at {gpu.celsius} C"
        detail = (
            f"{what}: clocks are held down by {', '.join(gpu.held_down_by)}{heat}: look at cooling and power supply"
        )
        return Finding(subject=subject, verdict="slow", detail=detail)
    if gpu.repair_pending:
        detail = f"{what}: bad memory waits to be mapped out: reset the GPU (nvidia-smi --gpu-reset) when it is idle"
        return Finding(subject=subject, verdict="slow", detail=detail)
    return Finding(subject=subject, verdict="ok", detail=what)


def _answer(program: str, query: str, fields: Sequence[str]) -> tuple[int, str]:
    """Exit code and output. Raises GpuTrouble when there is none in time."""
    words = [program, f"--query-{query}={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise GpuTrouble(
            f"nvidia-smi did not answer within {_SECONDS:.0f} s: a GPU has likely fallen off the bus (see dmesg for "
            "Xid): leave the host out and restart it"
        ) from error
    return answer.returncode, answer.stdout or answer.stderr


def _rows(said: str) -> list[list[str]]:
    return [line.split(",") for line in said.splitlines() if line.strip()]


def _transposed(rows: list[list[str]], width: int) -> list[list[str]]:
    return [[row[column] if column < len(row) else "" for row in rows] for column in range(width)]


def _older(field: str) -> str:
    group, dot, rest = field.partition(".")
    return f"{_OLD_NAMES.get(group, group)}{dot}{rest}"


def _number(written: str) -> int | None:
    return int(written) if written.isdigit() else None
