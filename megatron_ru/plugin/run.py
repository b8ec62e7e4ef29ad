"""What a run replaces in Megatron, once its arguments are known."""

import argparse
from collections.abc import Callable
from typing import Any

from megatron_ru.models.variant import Variant, find_variant
from megatron_ru.ops import backend
from megatron_ru.plugin.arguments import HOST_SPEC
from megatron_ru.plugin.dataset_helpers import dataset_helper_seams
from megatron_ru.plugin.fused_ops import fused_op_seams
from megatron_ru.plugin.step_metrics import StepMetrics
from megatron_ru.plugin.torch_adam import torch_adam_seams
from megatron_ru.plugin.validation import check_validation, validation_seams
from megatron_ru.seams.cpu_device import CPU_DEVICE
from megatron_ru.seams.seam import Seam

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
    if args.ru_metrics:
        metrics = StepMetrics(args.ru_metrics, every=args.log_interval)
        seams += [metrics.seam(), *metrics.evaluation_seams()]
    if args.ru_validate_from_start:
        check_validation(args)
        seams += validation_seams()
    if args.spec == HOST_SPEC:
        seams += _model_seams(variant)
        whole = args.ru_init == "whole" and not getattr(args, "num_experts", None)
        if whole:
            from megatron_ru.models.initialisation import initialisation_seams

            seams += initialisation_seams()
        seams.append(_model_built_seam(variant, args.seed if whole else None))
    return seams


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


def _model_built_seam(variant: Variant | None, seed: int | None) -> Seam:
    def make(original: Callable[..., None]) -> Callable[..., None]:
        def build(self: Any, *arguments: Any, **keywords: Any) -> None:
            original(self, *arguments, **keywords)
            _finish_model(self, variant, seed)

        return build

    return Seam(
        target="megatron.core.models.gpt.gpt_model:GPTModel.__init__",
        make=make,
        expects=("config", "transformer_layer_spec", "vocab_size", "max_sequence_length"),
        reason="positions at the input, and weights drawn for the whole model, have no field in a layer spec",
    )


def _finish_model(model: Any, variant: Variant | None, seed: int | None) -> None:
    """Completes one pipeline stage right after Megatron has built it."""
    embedding = getattr(model, "embedding", None)
    if variant is not None and variant.positions == "sinusoidal" and embedding is not None:
        from megatron_ru.models.positions import SinusoidalPositions

        learned = embedding.position_embeddings.weight
        embedding.position_embeddings = SinusoidalPositions(*learned.shape, learned.device, learned.dtype)
    if seed is not None:
        from megatron_ru.models.initialisation import initialise

        initialise(model, seed)
