"""What a run replaces in Megatron, once its arguments are known."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ru.checkpoints.layout import TRACKER
from megatron_ru.models.variant import Variant, find_variant
from megatron_ru.ops import backend
from megatron_ru.plugin.arguments import HOST_SPEC
from megatron_ru.plugin.cpu_writer import cpu_writer_seams
from megatron_ru.plugin.dataset_helpers import dataset_helper_seams
from megatron_ru.plugin.exit_signals import exit_signal_seams, listener
from megatron_ru.plugin.faults import fault_seams, faults_of
from megatron_ru.plugin.fused_ops import fused_op_seams
from megatron_ru.plugin.heartbeats import current_heartbeat, heartbeat_seams
from megatron_ru.plugin.nan_gradients import nan_gradient_seams
from megatron_ru.plugin.safe_checkpoints import safe_checkpoint_seams
from megatron_ru.plugin.startup_times import StartupTimes, sentence
from megatron_ru.plugin.step_metrics import StepMetrics
from megatron_ru.plugin.torch_adam import torch_adam_seams
from megatron_ru.plugin.validation import check_validation, validation_seams
from megatron_ru.seams.cpu_device import CPU_DEVICE
from megatron_ru.seams.seam import Seam

# Values of --dist-ckpt-strictness with which a weight that the checkpoint lacks ends the run.
_ALL_WEIGHTS_OR_NOTHING = ("assume_ok_unexpected", "log_unexpected", "raise_unexpected", "raise_all")

_installed: list[Seam] = []
_ops_before: list[str] = []


def install_run(args: argparse.Namespace) -> None:
    """Chooses the ops and installs the seams that the parsed arguments call for; a second call in one process replaces
    the first. Raises `UserError` for an unknown op or variant."""
    undo_run()
    _ops_before.append(",".join(backend.selected()) or "none")
    backend.select(args.ru_ops)
    for seam in run_seams(args):
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


def run_seams(args: argparse.Namespace) -> list[Seam]:
    """The seams of one run, in the order of installation; those of ops are of the ops that are chosen now."""
    variant = find_variant(args.ru_variant) if args.ru_variant else None
    seams = dataset_helper_seams() + torch_adam_seams() + fused_op_seams()
    nan_gradients, nan_seams = nan_gradient_seams(args)
    metrics = None
    if args.ru_metrics:
        metrics = StepMetrics(
            args.ru_metrics, every=args.log_interval, beside=nan_gradients.report if nan_gradients else dict
        )
        seams += [metrics.seam(), *metrics.evaluation_seams()]
    # Around the metrics, which write what these have counted.
    seams += nan_seams
    if args.ru_validate_from_start:
        check_validation(args)
        seams += validation_seams()
    if CPU_DEVICE.installed and getattr(args, "async_save", False):
        seams += cpu_writer_seams()
    seams += safe_checkpoint_seams(args, metrics.tell if metrics else lambda line: None)
    seams += _startup_seams(metrics)
    seams += _guard_seams(args)
    if args.spec == HOST_SPEC:
        seams += _model_seams(variant)
        whole = args.ru_init == "whole" and not getattr(args, "num_experts", None)
        if whole:
            from megatron_ru.models.initialisation import initialisation_seams

            seams += initialisation_seams()
        seams.append(_model_built_seam(variant, args.seed if whole else None, _loads_weights(args)))
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
    return [
        Seam(
            target="megatron.core.transformer.transformer_block:LayerNormImpl",
            make=lambda _: final,
            reason="the final norm has no field in a layer spec, and Megatron's own refuses sequence parallelism",
        )
    ]


def _loads_weights(args: argparse.Namespace) -> bool:
    """Whether Megatron will load every weight from a checkpoint, or end: then none needs to be drawn."""
    folder = getattr(args, "load", None)
    if not folder or getattr(args, "dist_ckpt_strictness", "assume_ok_unexpected") not in _ALL_WEIGHTS_OR_NOTHING:
        return False
    return Path(folder, TRACKER).is_file()


def _model_built_seam(variant: Variant | None, seed: int | None, will_be_loaded: bool) -> Seam:
    def make(original: Callable[..., None]) -> Callable[..., None]:
        def build(self: Any, *arguments: Any, **keywords: Any) -> None:
            original(self, *arguments, **keywords)
            _finish_model(self, variant, seed, will_be_loaded)

        return build

    return Seam(
        target="megatron.core.models.gpt.gpt_model:GPTModel.__init__",
        make=make,
        expects=("config", "transformer_layer_spec", "vocab_size", "max_sequence_length"),
        reason="positions at the input, and weights drawn for the whole model, have no field in a layer spec",
    )


def _finish_model(model: Any, variant: Variant | None, seed: int | None, will_be_loaded: bool) -> None:
    """Completes one pipeline stage right after Megatron has built it."""
    embedding = getattr(model, "embedding", None)
    if variant is not None and variant.positions == "sinusoidal" and embedding is not None:
        from megatron_ru.models.positions import SinusoidalPositions

        learned = embedding.position_embeddings.weight
        embedding.position_embeddings = SinusoidalPositions(*learned.shape, learned.device, learned.dtype)
    if seed is not None:
        from megatron_ru.models.initialisation import initialise

        initialise(model, seed, will_be_loaded=will_be_loaded)
