"""Runs steps: their tasks in worker processes of this machine, or a share of them for a scheduler's rank."""

import errno
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

from megatron_ru.data.config import PipelineConfig
from megatron_ru.data.outcome import write_json
from megatron_ru.data.run import Run, read_marker
from megatron_ru.data.step import STEPS, wanted_steps
from megatron_ru.foundation.errors import UserError

_KEPT_BYTES = 32 << 20

Progress = Callable[[str, int, int], object]
"""Called with (step, tasks done, tasks)."""


def prepare(config: PipelineConfig) -> Run:
    """The pipeline of `config` in its folder, ready to run; steps of other settings that lie there are removed.

    Raises UserError for missing inputs and for a folder that cannot be written.
    """
    folder = Path(config.output)
    description, keys = describe(config)
    with named_folder(folder):
        write_json(folder / "run.json", description | {"steps": list(keys), "keys": keys})
        run = Run.load(folder)
        for found in (folder / "steps").glob("*/key"):
            if str(keys.get(found.parent.name)).encode() != found.read_bytes():
                _remove_step(found.parent)
        for left in [
            *folder.glob(".*.partial"),
            *folder.glob("steps/*/.*.partial"),
            *folder.glob("steps/*/*/.*.partial"),
        ]:
            # Of a run that was killed; nobody else is here.
            left.unlink()
        for name in keys:
            run.step_folder(name).joinpath("tasks").mkdir(parents=True, exist_ok=True)
            (run.step_folder(name) / "key").write_text(keys[name])
    return run


def describe(config: PipelineConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """(what `run.json` holds but for the steps, the key of each step): hashes of the inputs and of the settings up to
    the step, in the order of steps. Raises UserError for inputs that are missing."""
    description = Run.describe(config)
    keys: dict[str, str] = {}
    key = _hash([entry | {"file": os.path.basename(entry["file"])} for entry in description["inputs"]])
    for name, step in wanted_steps(config):
        key = _hash([key, name, step.version, step.settings(config)])
        keys[name] = key
    return description, keys


def run_step(run: Run, name: str, workers: "Workers", progress: Progress | None = None) -> None:
    """Runs the tasks of a step that are not done yet and sums them up.

    The files are the same for any number of workers. Raises UserError; tasks that were done stay done.
    """
    if run.is_done(name) and run.has_files(name):
        return
    tasks = STEPS[name].tasks(run)
    todo = [task for task in range(tasks) if not run.task_is_done(name, task)]
    done = tasks - len(todo)
    if progress is not None:
        progress(name, done, tasks)
    for _ in workers.done(run, name, todo):
        done += 1
        if progress is not None:
            progress(name, done, tasks)
    with named_folder(run.folder):
        run.close(name, tasks)


def run_share(folder: str | Path, name: str, rank: int, world: int) -> None:
    """Runs tasks `rank`, `rank + world`, ... of a step: what one rank of a cluster does.

    Sums up the step before first, when nobody has. Raises UserError.
    """
    run = Run.load(folder)
    position = run.step_names.index(name)
    if position:
        before = run.step_names[position - 1]
        if not run.is_done(before):
            run.close(before, STEPS[before].tasks(run))
    for task in range(rank, STEPS[name].tasks(run), world):
        if not run.task_is_done(name, task):
            run_task(folder, name, task)


def run_task(folder: str | Path, name: str, task: int) -> int:
    """Runs one task, marks it as done and returns its number. Raises UserError when the disk is full."""
    run = Run.load(folder)
    began = time.process_time()
    _keep_freed_memory()
    with named_folder(run.folder):
        outcome = STEPS[name].run(run, task)
        marker = {"key": run.keys[name], "outcome": outcome.to_json(), "cpu_seconds": time.process_time() - began}
        write_json(run.marker(name, task), marker)
    return task


def _keep_freed_memory() -> None:
    # glibc returns free memory at the end of its heap to the kernel, and the next block of text faults it in again,
    # page by page: 3% of exact deduplication. It keeps twice the largest piece that was mapped and freed: this one,
    # whose pages are never touched.
    bytearray(_KEPT_BYTES // 2)


def _remove_step(folder: Path) -> None:
    """Removes a step's files, those in the pipeline's folder too: a dataset of other settings must not be found."""
    for marker in (folder / "tasks").glob("*.json"):
        found = read_marker(marker)
        for entry in found["outcome"]["files"] if found else ():
            (folder / entry["name"]).unlink(missing_ok=True)
    (folder.parent.parent / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(folder)


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Holds the folder for this process. Raises UserError when another one works in it."""
    import fcntl

    with named_folder(Path(folder)):
        Path(folder).mkdir(parents=True, exist_ok=True)
        # Unbuffered: what a full disk does not take would be tried again when the file is closed.
        stream = (Path(folder) / ".lock").open("ab+", buffering=0)
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.seek(0)
            holder = stream.read().decode("utf-8", "replace").strip() or "unknown"
            raise UserError(f"another run ({holder}) works in {folder}; wait for it, or give another output") from None
        with named_folder(Path(folder)):
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {os.uname().nodename}".encode())
        yield


class Workers:
    """Processes that run tasks, started at the first step that has several; with `count` 1 this process does it."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def done(self, run: Run, name: str, todo: list[int]) -> Iterator[int]:
        """Yields each task when it is done. Raises UserError when a process dies."""
        if self.count <= 1 or len(todo) <= 1:
            for task in todo:
                yield run_task(run.folder, name, task)
            return
        try:
            executor = self._started()
            with _one_thread_each():
                futures = [executor.submit(run_task, run.folder, name, task) for task in todo]
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise UserError(
                f"a worker process died in the step {name} (killed, or out of memory); run the same command again, it "
                f"goes on where it was, with fewer --workers than {self.count} if memory was short"
            ) from None

    def _started(self) -> ProcessPoolExecutor:
        if self._executor is None:
            # Spawned, not forked: the caller may have threads, and a copy of their locks would hang.
            self._executor = ProcessPoolExecutor(self.count, get_context("spawn"), _start_worker)
        return self._executor


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes started within use one thread each: several would wait for each other. This process does not: what it
    runs alone, such as k-means, has all processors, for any number of workers."""
    added = [variable for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS") if variable not in os.environ]
    os.environ.update(dict.fromkeys(added, "1"))
    try:
        yield
    finally:
        for variable in added:
            del os.environ[variable]


def _start_worker() -> None:
    # Ctrl-C reaches the whole group; the parent cleans up, and two dozen tracebacks would hide why.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    # A worker whose parent was killed would wait for work for ever: it holds both ends of its own queue.
    connection.wait([sentinel])
    os._exit(1)


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(found: Any) -> Any:
    return asdict(found) if is_dataclass(found) and not isinstance(found, type) else str(found)


@contextmanager
def named_folder(folder: Path) -> Iterator[None]:
    """Errors of the system within become UserError, which names the folder and says what to do."""
    try:
        yield
    except OSError as error:
        raise _cannot_write(error, folder) from None


def _cannot_write(error: OSError, folder: Path) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"no space is left for {folder} ({error.strerror}); what is finished is kept: free some space and run the "
            "same command again"
        )
    where = f" ({error.filename})" if error.filename else ""
    return UserError(f"cannot work in {folder}: {error.strerror or error}{where}")
