"""One start in a process of its own, for `restart.py`: `python -m megatron_ru.benchmarks.restart_child FILE`.

FILE holds what is to be done as JSON, and what was measured when the process has ended well.
"""

import functools
import json
import resource
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ru.foundation.files import atomic_output


def main(path: Path) -> int:
    """Does what the file says and returns the exit code of the run."""
    task = json.loads(path.read_text(encoding="utf-8"))
    result = _read(task) if task["do"] == "read" else _start(task)
    with atomic_output(path, "w", encoding="utf-8") as stream:
        json.dump(result, stream)
    return int(result.get("code", 0))


def _start(task: dict[str, Any]) -> dict[str, Any]:
    """Times of the parts of a start, seconds of the processor, and the peaks of memory in bytes."""
    from megatron_ru.seams.when_imported import when_imported

    peaks: dict[str, dict[str, float]] = {}
    when_imported("megatron.training.training", lambda module: _watch(module, peaks))
    if task["on_cpu"]:
        when_imported("megatron.core.models.gpt.gpt_model", lambda module: _then_move(module, fp32=task["fp32"]))
    sys.argv = ["pretrain_gpt", *task["words"]]
    try:
        # As `python -m` does: this is a run, and the benchmark no engine.
        runpy.run_module("megatron_ru.pretrain_gpt", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            return {"code": end.code}
    lines = [json.loads(line) for line in Path(task["metrics"]).read_text().splitlines()]
    parts = next(line["startup"] for line in lines if "startup" in line)
    seconds = peaks["stepped"].pop("cpu_seconds")
    return {"parts": parts, "built": peaks["built"], "stepped": peaks["stepped"], "cpu_seconds": seconds}


def _watch(training: Any, peaks: dict[str, dict[str, float]]) -> None:
    """Notes the peaks when model and optimizer are there, and when the first step is done."""

    def noting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*arguments: Any, **keywords: Any) -> Any:
            result = original(*arguments, **keywords)
            if name not in peaks:
                # A checkpoint that is saved afterwards is no part of the start.
                peaks[name] = {**_peak_bytes(), "cpu_seconds": time.process_time()}
            return result

        return call

    training.setup_model_and_optimizer = noting("built", training.setup_model_and_optimizer)
    training.train_step = noting("stepped", training.train_step)


def _then_move(gpt_model: Any, *, fp32: bool) -> None:
    """The model goes to the device as soon as it is built. Megatron itself would build it in bf16 on the CPU too."""
    import torch

    original = gpt_model.GPTModel.__init__

    @functools.wraps(original)
    def build(self: Any, config: Any, *arguments: Any, **keywords: Any) -> None:
        dtype = config.params_dtype
        if fp32:
            config.params_dtype = torch.float32
        try:
            original(self, config, *arguments, **keywords)
        finally:
            config.params_dtype = dtype
        for tensor in (*self.parameters(), *self.buffers()):
            tensor.data = tensor.data.cuda()

    gpt_model.GPTModel.__init__ = build


def _peak_bytes() -> dict[str, int]:
    import torch

    from megatron_ru.seams.cpu_device import CPU_DEVICE

    has_gpu = torch.cuda.is_available() and not CPU_DEVICE.installed
    return {
        "cpu_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "gpu_bytes": torch.cuda.max_memory_allocated() if has_gpu else 0,
    }


def _read(task: dict[str, Any]) -> dict[str, Any]:
    """The least seconds in which the files come from the page cache into memory of the device: by the threads that load
    checkpoints, and by torch's own means in one."""
    import torch

    from megatron_ru.plugin.early_start import threads_of_a_rank
    from megatron_ru.plugin.file_copies import FilePart, copy_parts

    paths = [Path(path) for path in task["paths"]]
    sizes = [path.stat().st_size for path in paths]
    device = torch.device(task["device"])
    torch.zeros(1, device=device)
    seconds: dict[str, list[float]] = {"threads": [], "torch": []}
    for _ in range(task["times"]):
        for way, found in seconds.items():
            # As at a restart: memory of a GPU is there at once, that of the CPU comes as it is written.
            targets = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
            _wait(device)
            began = time.perf_counter()
            if way == "threads":
                parts = [
                    FilePart(path=path, first=0, target=target) for path, target in zip(paths, targets, strict=True)
                ]
                copy_parts(parts, threads=threads_of_a_rank())
            else:
                for path, size, target in zip(paths, sizes, targets, strict=True):
                    target.copy_(torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8))
            _wait(device)
            found.append(time.perf_counter() - began)
            del targets
    best = {f"{way}_seconds": min(found) for way, found in seconds.items()}
    return {"bytes": sum(sizes), **best, "seconds": min(best.values())}


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
