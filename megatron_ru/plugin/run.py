"""What a run replaces in Megatron, once its arguments are known."""

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any

from megatron_ru.models.variant import Variant, find_variant
from megatron_ru.ops import backend
from megatron_ru.plugin.arguments import HOST_SPEC
from megatron_ru.plugin.attention_choice import attention_seams
from megatron_ru.plugin.checks import check_fp8
from megatron_ru.plugin.cpu_writer import cpu_writer_seams
from megatron_ru.plugin.dataset_helpers import dataset_helper_seams
from megatron_ru.plugin.exit_signals import exit_signal_seams, listener
from megatron_ru.plugin.faults import fault_seams, faults_of
from megatron_ru.plugin.first_gradients import first_gradient_seams
from megatron_ru.plugin.fused_ops import fused_op_seams
from megatron_ru.plugin.heartbeats import current_heartbeat, heartbeat_seams
from megatron_ru.plugin.host_ahead import host_ahead_seams
from megatron_ru.plugin.jit_warm_up import jit_warm_up_seams
from megatron_ru.plugin.model_building import HandOver, ModelBuilding
from megatron_ru.plugin.nan_gradients import nan_gradient_seams
from megatron_ru.plugin.narrow_gradients import narrow_gradient_seams
from megatron_ru.plugin.packed_data import packed_data_seams
from megatron_ru.plugin.recompute_choice import recompute_seams
from megatron_ru.plugin.safe_checkpoints import safe_checkpoint_seams
from megatron_ru.plugin.save_results import save_result_seams
from megatron_ru.plugin.startup_times import StartupTimes, sentence
from megatron_ru.plugin.step_metrics import StepMetrics
from megatron_ru.plugin.step_profile import step_profile_seams
from megatron_ru.plugin.throughput import Throughput
from megatron_ru.plugin.torch_adam import torch_adam_seams
from megatron_ru.plugin.validation import check_validation, validation_seams
from megatron_ru.plugin.weight_gradients import weight_gradient_seams
from megatron_ru.seams.cpu_device import CPU_DEVICE
from megatron_ru.seams.seam import Seam

_installed: list[Seam] = []
_ops_before: list[str] = []


def install_run(args: argparse.Namespace, of_engine: Sequence[Seam] = (), hand_over: HandOver | None = None) -> None:
    """Chooses the ops and installs the seams that the parsed arguments call for, around those of an engine; a second
    call in one process replaces the first. `hand_over` is the engine's too: see `ModelBuilding`.

    Raises `UserError` for an unknown op or variant.
    """
    undo_run()
    _ops_before.append(",".join(backend.selected()) or "none")
    backend.select(args.ru_ops)
    for seam in (*of_engine, *run_seams(args, hand_over)):
        seam.install()
        _installed.append(seam)
    if CPU_DEVICE.installed:
        CPU_DEVICE.install_in_megatron()


def undo_run() -> None:
    """Takes back what `install_run` replaced."""
    while _installed:
        _installed.pop().undo()
    while _ops_before:
        backend.select(_ops_before.pop())


def run_seams(args: argparse.Namespace, hand_over: HandOver | None = None) -> list[Seam]:
    """The seams of one run, in the order of installation; those of ops are of the ops that are chosen now."""
    variant = find_variant(args.ru_variant) if args.ru_variant else None
    check_fp8(args)
    seams = dataset_helper_seams() + packed_data_seams(args) + torch_adam_seams() + fused_op_seams()
    seams += host_ahead_seams() + jit_warm_up_seams()
    if args.gradient_accumulation_fusion:
        seams += weight_gradient_seams()
    if "adamw" in backend.selected():
        seams += narrow_gradient_seams(args)
    nan_gradients, nan_seams = nan_gradient_seams(args)
    metrics, throughput = None, Throughput()
    if args.ru_metrics:
        counted = nan_gradients.report if nan_gradients else dict
        metrics = StepMetrics(
            args.ru_metrics, every=args.log_interval, beside=lambda: {**throughput.report(), **counted()}
        )
        seams += [metrics.seam(), *metrics.evaluation_seams()]
    # Around the metrics, which write what these have counted.
    seams += nan_seams + throughput.seams()
    if args.gradient_accumulation_fusion:
        # Around the guard, which reads what is reduced.
        seams += first_gradient_seams(args)
    if args.ru_validate_from_start:
        check_validation(args)
        seams += validation_seams()
    seams += recompute_seams(args, metrics.tell if metrics else lambda line: None)
    if not getattr(args, "async_save", False):
        seams += save_result_seams()
    elif CPU_DEVICE.installed:
        seams += cpu_writer_seams()
    seams += safe_checkpoint_seams(args, metrics.tell if metrics else lambda line: None)
    seams += _startup_seams(metrics)
    # Around all that a step is made of.
    seams += step_profile_seams(args)
    seams += _guard_seams(args)
    if args.spec == HOST_SPEC:
        seams += _model_seams(variant) + ModelBuilding(args, variant, hand_over).seams() + attention_seams(args)
    return seams


def _startup_seams(metrics: StepMetrics | None) -> list[Seam]:
    def tell(iteration: int, seconds: dict[str, float]) -> None:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"megatron_ru: {sentence(seconds)}", flush=True)
        if metrics is not None:
            metrics.tell({"iteration": iteration, "startup": seconds})

    return StartupTimes(tell).seams()


def _guard_seams(args: argparse.Namespace) -> list[Seam]:
    """What a guard sees of the run and does to it, and what it is tested with."""
    seams = []
    if (heartbeat := current_heartbeat()) is not None:
        seams += heartbeat_seams(heartbeat)
    if (signals := listener()) is not None:
        seams += exit_signal_seams(args, signals)
    return seams + fault_seams(faults_of(os.environ))


def _model_seams(variant: Variant | None) -> list[Seam]:
    from megatron.core.transformer.identity_op import IdentityOp

    from megatron_ru.models.norms import Norm

    # After a post-norm layer the hidden states are normed already.
    final = IdentityOp if variant is not None and variant.norm_placement == "post" else Norm
    seams = [
        Seam(
            target="megatron.core.transformer.transformer_block:LayerNormImpl",
            make=lambda _: final,
            reason="the final norm has no field in a layer spec, and Megatron's own refuses sequence parallelism",
        ),
    ]
    if "rms_norm" in backend.selected():
        seams.append(
            Seam(
                target="megatron.core.transformer.transformer_block:TransformerBlock._build_layers",
                make=_then_link_residuals,
                expects=("self",),
                reason="a layer does not know the norm that follows it",
            )
        )
    return seams


def _then_link_residuals(original: Callable[[Any], None]) -> Callable[[Any], None]:
    from megatron_ru.models.residual import link_residuals

    def build_layers(self: Any) -> None:
        original(self)
        link_residuals(self)

    return build_layers
