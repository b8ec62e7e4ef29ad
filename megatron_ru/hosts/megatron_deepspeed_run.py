"""What a run replaces in Megatron-DeepSpeed, once its arguments are known."""

import functools
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_ru.foundation.heartbeat import Heartbeat, Phase
from megatron_ru.hosts.megatron_deepspeed_arguments import on_cpu
from megatron_ru.hosts.megatron_deepspeed_initialisation import initialisation_seams
from megatron_ru.hosts.megatron_deepspeed_ops import op_seams
from megatron_ru.hosts.megatron_deepspeed_repairs import repair_seams
from megatron_ru.ops import backend
from megatron_ru.plugin.dataset_helpers import load_helpers
from megatron_ru.plugin.exit_signals import exit_signal_seams, listener
from megatron_ru.plugin.faults import fault_seams, faults_of
from megatron_ru.plugin.heartbeats import current_heartbeat, heartbeat_seams
from megatron_ru.plugin.startup_times import StartupTimes, sentence
from megatron_ru.plugin.step_metrics import StepMetrics
from megatron_ru.seams.seam import Seam

_LOOP = "megatron.training"
_HELPERS = "megatron.data.helpers"

_installed: list[Seam] = []
_ops_before: list[str] = []


def install_run(args: Namespace) -> None:
    """Chooses the ops and installs the seams that the parsed arguments call for; a second call in one process replaces
    the first. Raises `UserError` for an unknown op, and where the checkout would train something else."""
    undo_run()
    _ops_before.append(",".join(backend.selected()) or "none")
    backend.select(args.ru_ops)
    for seam in run_seams(args):
        seam.install()
        _installed.append(seam)


def undo_run() -> None:
    """Takes back what `install_run` replaced."""
    while _installed:
        _installed.pop().undo()
    while _ops_before:
        backend.select(_ops_before.pop())


def run_seams(args: Namespace) -> list[Seam]:
    """The seams of one run, in the order of installation; those of ops are of the ops that are chosen now."""
    repairs = repair_seams(args)
    if repairs and os.environ.get("RANK", "0") == "0":
        names = ", ".join(seam.target.rpartition(":")[2] for seam in repairs)
        print(f"megatron_ru: put right in this Megatron-DeepSpeed: {names}", flush=True)
    seams = [*_dataset_helper_seams(), *repairs, *op_seams(args), *initialisation_seams(args)]
    if on_cpu():
        seams.append(_shared_memory_seam())
    metrics = None
    if args.ru_metrics:
        metrics = StepMetrics(args.ru_metrics, every=args.log_interval, training=_LOOP)
        seams += [metrics.seam(), *metrics.evaluation_seams()]
    seams += _startup_seams(metrics)
    return seams + _guard_seams(args)


def _startup_seams(metrics: StepMetrics | None) -> list[Seam]:
    def tell(iteration: int, seconds: dict[str, float]) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(f"megatron_ru: {sentence(seconds)}", flush=True)
        if metrics is not None:
            metrics.tell({"iteration": iteration, "startup": seconds})

    return StartupTimes(tell).seams(training=_LOOP, initialize="megatron.initialize")


def _guard_seams(args: Namespace) -> list[Seam]:
    """What a guard sees of the run and does to it, and what it is tested with."""
    seams: list[Seam] = []
    if (heartbeat := current_heartbeat()) is not None:
        seams += heartbeat_seams(heartbeat, training=_LOOP, evaluation_step=None) + _evaluation_seams(heartbeat)
    if (signals := listener()) is not None:
        handler = "megatron.dist_signal_handler:DistributedSignalHandler"
        seams += exit_signal_seams(args, signals, training=_LOOP, handler=handler)
        seams.append(_saving_seam(args))
    return seams + fault_seams(faults_of(os.environ), training=_LOOP)


def _evaluation_seams(heartbeat: Heartbeat) -> list[Seam]:
    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def evaluate(*arguments: Any, **keywords: Any) -> Any:
            before = heartbeat.phase
            heartbeat.beat(phase=Phase.EVALUATING)
            result = original(*arguments, **keywords)
            heartbeat.beat(phase=before)
            return result

        return evaluate

    def in_each_step(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def get_forward_backward_func(*arguments: Any, **keywords: Any) -> Any:
            if heartbeat.phase is Phase.EVALUATING:
                heartbeat.beat()
            return original(*arguments, **keywords)

        return get_forward_backward_func

    reason = "there is no call between the steps of an evaluation but this one"
    return [
        Seam(target=f"{_LOOP}:evaluate", make=around, reason=reason),
        Seam(target=f"{_LOOP}:get_forward_backward_func", make=in_each_step, reason=reason),
    ]


def _saving_seam(args: Namespace) -> Seam:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **keywords: original(*arguments, **keywords) if args.save else None

    return Seam(
        target=f"{_LOOP}:save_checkpoint_and_time",
        make=make,
        reason="after a signal the host saves whether there is a folder or not",
    )


def _shared_memory_seam() -> Seam:
    return Seam(
        target="deepspeed.comm.torch:build_shm_op",
        make=lambda _: lambda: None,
        optional=True,
        reason="DeepSpeed compiles an all-reduce whose shared memory, 67 MB a rank, outlives a run that is killed",
    )


def _dataset_helper_seams() -> list[Seam]:
    """The helpers of the dataset index are compiled into the user's cache for the Python that runs: by the first rank
    of each host, while the others wait."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def compile_dependencies(*arguments: Any, **keywords: Any) -> Any:
            original(*arguments, **keywords)
            if os.environ.get("LOCAL_RANK", "0") == "0":
                load_helpers(_HELPERS, _helpers_source(), build=True)
            torch_distributed = sys.modules["torch.distributed"]
            if torch_distributed.is_initialized():
                torch_distributed.barrier()
            if _HELPERS not in sys.modules:
                load_helpers(_HELPERS, _helpers_source(), build=False)

        return compile_dependencies

    return [
        Seam(
            target="megatron.data.dataset_utils:compile_helper",
            make=lambda _: lambda: None,
            reason="its Makefile writes into the checkout and builds for the python3 of PATH",
        ),
        Seam(
            target="megatron.initialize:_compile_dependencies",
            make=make,
            reason="what the Makefile would have built is needed on every rank",
        ),
    ]


def _helpers_source() -> Path:
    return Path(next(iter(import_module("megatron.data").__path__))) / "helpers.cpp"
