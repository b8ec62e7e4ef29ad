"""A walk over the registry of ops: every case, ours and everybody's who takes part."""

import contextlib
import ctypes
import datetime
import functools
import itertools
import os
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_ru import __version__
from megatron_ru.benchmarks.ceiling import copy_ceiling
from megatron_ru.benchmarks.contest import Arena, SharedInputError, arena, compete, tidy
from megatron_ru.benchmarks.peer import PEERS, Peer, Prepared, one_line
from megatron_ru.benchmarks.result import OURS, Missing, Report, Row
from megatron_ru.benchmarks.timing import CLOCKS, Clock, WallClock
from megatron_ru.foundation.errors import UserError
from megatron_ru.ops import backend
from megatron_ru.ops.op import OPS, BenchmarkCase, Call, Op

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Matrix products beyond this take minutes on a CPU.
_CPU_FLOPS = 10**12


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure, and how."""

    only: tuple[str, ...] = ()
    """Names of ops; all when there are none."""
    against: tuple[str, ...] = ()
    """Words of peers."""
    device: str = "cuda"
    dtype: str | None = None
    """`bf16`, `fp16` or `fp32`; None for that of each case, on a CPU fp32."""
    tokens: tuple[int, ...] = ()
    """Cases whose label begins with one of these; all when there are none."""
    hidden: tuple[int, ...] = ()
    """Cases whose label has one of these behind its first number; all when there are none."""
    timing: str = "queued"
    """One of `CLOCKS`; on a CPU it is the wall clock."""
    seconds: float = 0.15
    """For the timing of each contender in each case."""

    def __post_init__(self) -> None:
        if self.device not in ("cuda", "cpu"):
            raise UserError(f"device {self.device!r} is unknown, expected cuda or cpu")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda was asked for, but torch sees no GPU: use --device cpu")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UserError(f"dtype {self.dtype!r} is unknown, expected one of {', '.join(DTYPES)}")
        if self.timing not in CLOCKS:
            raise UserError(f"timing {self.timing!r} is unknown, expected one of {', '.join(CLOCKS)}")
        if not self.seconds > 0:
            raise UserError(f"--seconds-per-case is {self.seconds}, expected more than 0")
        for name in (*self.only, *self.against):
            (OPS if name in self.only else PEERS)[name]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One contender of one case: a peer in one of its ways, or None for ours."""

    peer: Peer | None
    variant: str = ""

    @property
    def name(self) -> str:
        """In tables."""
        return OURS if self.peer is None else self.peer.contender(self.variant)

    def prepare(self, op: Op, case: BenchmarkCase) -> Callable[[Call], Prepared]:
        """How it makes the op's call its own."""
        peer = self.peer
        if peer is not None:
            return lambda call: peer.prepare(op, case, call, self.variant)
        function = case.function or op.function
        return lambda call: Prepared(run=lambda: call.run(function), leaves=tuple(call.leaves()))


def run(
    settings: Settings,
    finished: Callable[[Report], None] = lambda report: None,
    command: str = "megatron-ru bench ops",
    interrupted: Callable[[], bool] = lambda: False,
) -> Report:
    """Measures everything; `finished` gets what there is after each case, so that a run cut short leaves something.

    A KeyboardInterrupt ends the measuring, and the report says what is missing. So does `interrupted`, which is asked
    before each contender: somebody else's library may swallow the exception.
    """
    started = time.monotonic()
    peers = {name: PEERS[name] for name in settings.against}
    missing = {name: peer.missing(settings.device) for name, peer in peers.items()}
    taking_part = [peer for name, peer in peers.items() if not missing[name]]
    if settings.device == "cpu":
        keep_memory()
    ceiling = copy_ceiling(settings.device)
    cache = _cache_bytes(settings.device)
    tqdm.write(f"{device_name(settings.device)}: a large copy moves {ceiling:.0f} GB/s, bytes read and written")
    for name, reason in missing.items():
        if reason:
            tqdm.write(f"{peers[name].title} {reason}")
    clock: Clock = WallClock() if settings.device == "cpu" else CLOCKS[settings.timing]()
    about = environment(settings.device)
    work = [(op, case, list(entries(op, taking_part))) for op, case in chosen(settings)]
    if not work:
        raise UserError("no case is left: --only, --tokens and --hidden together leave none; leave one of them out")
    # Of each case, in the order of `work`.
    found: list[list[Row]] = [[] for _ in work]
    whole: set[int] = set()

    def report() -> Report:
        return Report(
            command=command,
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            device=settings.device,
            device_name=device_name(settings.device),
            environment=about,
            ceiling=ceiling,
            peers={name: reason or peers[name].version() or "version unknown" for name, reason in missing.items()},
            rows=tuple(itertools.chain.from_iterable(found)),
            seconds=time.monotonic() - started,
            cases=len(work),
            missing=tuple(_missing(*work[place], found[place]) for place in range(len(work)) if place not in whole),
        )

    hosts: set[str] = set()
    # A log gets a line in half a minute.
    pause = 0.5 if sys.stderr.isatty() else 30.0
    bar: tqdm[Any] = tqdm(
        total=sum(len(one) for *_, one in work), unit="row", dynamic_ncols=True, mininterval=pause, smoothing=0.05
    )
    # Whatever is cut off, `report` tells of it.
    stop = functools.partial(_stop, interrupted)
    with bar, contextlib.suppress(KeyboardInterrupt):
        for place in in_turn([op.name for op, *_ in work]):
            op, case, contenders = work[place]
            bar.set_postfix_str(f"{op.name} {case.label}", refresh=False)
            _case(settings, clock, cache, op, case, contenders, bar, op.name not in hosts, found[place], stop)
            hosts.add(op.name)
            whole.add(place)
            finished(report())
    return report()


def in_turn(names: Sequence[str]) -> list[int]:
    """The places of `names` in the order in which they are gone through: the first of every name, then the seconds, so
    that a run cut short has looked at every op."""
    seen: Counter[str] = Counter()
    ranks = []
    for name in names:
        ranks.append(seen[name])
        seen[name] += 1
    return sorted(range(len(names)), key=lambda place: ranks[place])


def chosen(settings: Settings) -> list[tuple[Op, BenchmarkCase]]:
    """The cases to go through. On a CPU, where one takes long, the smallest of each op unless sizes are given."""
    found = []
    for name, op in OPS.items():
        if settings.only and name not in settings.only:
            continue
        cases = [case for case in op.cases if _fits(case.label, settings)]
        if settings.device == "cpu" and not (settings.tokens or settings.hidden) and cases:
            cases = [min(cases, key=lambda case: sum(case.bytes_moved(case.dtype)))]
        found += [(op, case) for case in cases]
    return found


def entries(op: Op, peers: Sequence[Peer]) -> Iterator[Entry]:
    """Ours, then each peer in each of its ways, compilers last."""
    yield Entry(peer=None)
    for peer in sorted(peers, key=lambda one: one.compiles):
        for variant in peer.variants(op):
            yield Entry(peer=peer, variant=variant)


def keep_memory() -> bool:
    """Makes the C library keep freed memory instead of giving it back, and says whether it does (glibc alone).

    Otherwise every large result is new memory, and the kernel's work of handing out its pages is what is timed.
    """
    try:
        library = ctypes.CDLL(None)
        # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h: no mappings of their own, and no end of the heap handed back.
        return bool(library.mallopt(-4, 0)) and bool(library.mallopt(-1, 2**31 - 1))
    except (OSError, AttributeError):
        return False


def _case(
    settings: Settings,
    clock: Clock,
    cache: int,
    op: Op,
    case: BenchmarkCase,
    contenders: Sequence[Entry],
    bar: "tqdm[Any]",
    measure_host: bool,
    rows: list[Row],
    stop: Callable[[], None],
) -> None:
    """Adds to `rows` one after the other; `stop` is called before each and raises when it is time to end."""
    if settings.dtype is not None:
        dtype = DTYPES[settings.dtype]
    else:
        dtype = torch.float32 if settings.device == "cpu" else case.dtype
    named = bool(settings.only)
    stop()
    if settings.device == "cpu" and case.flops > _CPU_FLOPS and not named:
        bar.update(len(contenders))
        note = f"{case.flops / 1e12:.0f} TFLOP take minutes on a CPU; --only {op.name} runs it all the same"
        rows.append(_bare_row(op, case, dtype, OURS, "left out", note))
        return
    try:
        place = arena(op, case, dtype, settings.device, clock, settings.seconds, cache)
    except Exception as error:
        bar.update(len(contenders))
        rows.append(_bare_row(op, case, dtype, OURS, "failed", one_line(error)))
        return
    while len(rows) < len(contenders):
        stop()
        entry = contenders[len(rows)]
        if "torch._dynamo" in sys.modules:
            # A compiler that remembers every shape before this one would look through them at each call.
            torch._dynamo.reset()
        try:
            row = compete(place, entry.name, entry.prepare(op, case), measure_host=measure_host)
        except SharedInputError:
            # From the start: all contenders of a case are timed in the same way.
            place = replace(place, one_graph=True)
            bar.update(-len(rows))
            rows.clear()
            tidy(settings.device)
            continue
        if entry.peer is None:
            row = _with_form(row, op, place)
        rows.append(row)
        bar.update()


def _stop(interrupted: Callable[[], bool]) -> None:
    if interrupted():
        raise KeyboardInterrupt


def _missing(op: Op, case: BenchmarkCase, contenders: Sequence[Entry], rows: Sequence[Row]) -> Missing:
    there = {row.contender for row in rows}
    absent = tuple(entry.name for entry in contenders if entry.name not in there)
    return Missing(op=op.name, case=case.label, contenders=absent, in_part=bool(rows))


def _with_form(row: Row, op: Op, place: Arena) -> Row:
    """The row with a note where ours ran in its plain form."""
    reason = backend.switch(op.switch).why_not(place.device, place.dtype)
    if not reason:
        return row
    return replace(row, note="; ".join(filter(None, (f"plain torch: {reason}", row.note))))


def _bare_row(op: Op, case: BenchmarkCase, dtype: torch.dtype, contender: str, status: str, note: str) -> Row:
    return Row(
        op=op.name, case=case.label, dtype=str(dtype).removeprefix("torch."), contender=contender, status=status,
        note=note,
    )  # fmt: skip


def _fits(label: str, settings: Settings) -> bool:
    numbers = [int(word) for word in re.findall(r"\d+", label)]
    first, rest = numbers[:1], numbers[1:]
    tokens = not settings.tokens or bool(set(first) & set(settings.tokens))
    return tokens and (not settings.hidden or bool(set(rest) & set(settings.hidden)))


def _cache_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    # The shared cache of a server's processor.
    return 64 * 2**20


def device_name(device: str) -> str:
    """The name of the GPU or the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return model or platform.processor() or platform.machine()


def environment(device: str) -> dict[str, str]:
    """Versions and what else a number depends on."""
    status = backend.library_status()
    found = {
        "megatron_ru": __version__,
        "ops": status.summary() if status.path is None else f"{status.path.name} ({'CUDA' if status.cuda else 'CPU'})",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device == "cpu":
        threads = torch.get_num_threads()
        return {**found, "threads": str(threads), "processors": str(len(os.sched_getaffinity(0)))}
    properties = torch.cuda.get_device_properties(0)
    return {
        **found,
        "cuda": str(torch.version.cuda),
        "driver": _driver(),
        "multiprocessors": str(properties.multi_processor_count),
        "memory_gib": f"{properties.total_memory / 2**30:.0f}",
    }


def _driver() -> str:
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        shown = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return next(itertools.chain(shown.stdout.split(), ["unknown"]))
