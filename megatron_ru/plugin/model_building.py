"""How a run builds its model: on meta where that is safe, with weights drawn whole, or left for the checkpoint."""

import argparse
import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from megatron_ru.checkpoints.layout import TRACKER
from megatron_ru.foundation.errors import UserError
from megatron_ru.models.variant import Variant
from megatron_ru.seams.seam import Seam

HandOver = Callable[[Sequence[Any]], None]
"""Takes some parameters that have their values; what it leaves in them looks like them and is not read."""

# Values of --dist-ckpt-strictness with which a weight that the checkpoint lacks ends the run.
_ALL_WEIGHTS_OR_NOTHING = ("assume_ok_unexpected", "log_unexpected", "raise_unexpected", "raise_all")
_NAMES_IN_ERRORS = 3


class ModelBuilding:
    """The stages that this process builds. Raises `UserError` for `--ru-meta-init on` where it cannot be.

    With `hand_over`, a stage that is built on meta gets its values module by module, and each module's weights go to it
    before the next one's are made.
    """

    def __init__(self, args: argparse.Namespace, variant: Variant | None, hand_over: HandOver | None = None):
        self._args = args
        self._hand_over = hand_over
        self._variant = variant
        self.whole = args.ru_init == "whole" and not getattr(args, "num_experts", None)
        """Whether each weight is drawn whole and cut."""
        loads = _loads_weights(args)
        self.meta = self._builds_on_meta(self.whole or loads)
        """Whether weights take no memory before they lie where they are trained."""
        self.will_be_loaded = loads and (self.whole or self.meta)
        """Whether nothing is drawn, since Megatron will load every weight or end."""
        self._unloaded: list[tuple[str, Any]] = []

    def seams(self) -> list[Seam]:
        """The seams of one run."""
        seams = []
        if self.whole:
            from megatron_ru.models.initialisation import initialisation_seams

            seams += initialisation_seams()
        if self.meta:
            from megatron_ru.models.meta import meta_seams

            seams += meta_seams()
        seams.append(
            Seam(
                target="megatron.core.models.gpt.gpt_model:GPTModel.__init__",
                make=self._building,
                expects=("config", "transformer_layer_spec", "vocab_size", "max_sequence_length"),
                reason="positions at the input, and weights drawn for the whole model, have no field in a layer spec",
            )
        )
        if self.will_be_loaded:
            seams.append(
                Seam(
                    target="megatron.training.training:load_checkpoint",
                    make=self._loading,
                    reason="a weight that was neither drawn nor loaded must not be trained",
                )
            )
        return seams

    def _builds_on_meta(self, ours: bool) -> bool:
        wanted = self._args.ru_meta_init
        if wanted == "off":
            return False
        reason = _no_meta(self._args, ours)
        if reason is not None and wanted == "on":
            raise UserError(f"--ru-meta-init on cannot be: {reason}; leave one of the two out")
        return reason is None

    def _building(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def build(model: Any, *arguments: Any, **keywords: Any) -> None:
            if self.meta:
                from megatron_ru.models.meta import on_meta

                context: Any = on_meta()
            else:
                context = nullcontext([])
            with context as put_off:
                original(model, *arguments, **keywords)
            self._finish(model, put_off)

        return build

    def _finish(self, model: Any, put_off: Iterable[Any]) -> None:
        """Completes one pipeline stage right after Megatron has built it."""
        _set_input_positions(model, self._variant)
        if self.meta and self._hand_over is not None:
            self._finish_by_modules(model, put_off, self._hand_over)
            return
        made: list[tuple[str, Any]] = []
        if self.meta:
            import torch

            from megatron_ru.models.meta import materialise

            made = materialise(model, torch.cuda.current_device())
            for stage in put_off:
                stage.setup_embeddings_and_output_layer()
        if self.will_be_loaded:
            self._leave_empty(model.named_parameters())
        elif self.whole:
            from megatron_ru.models.initialisation import initialise

            _check_drawn(model, made)
            initialise(model, self._args.seed)

    def _finish_by_modules(self, model: Any, put_off: Iterable[Any], hand_over: HandOver) -> None:
        """The same, with no more in memory than the weights of one module."""
        import torch

        from megatron_ru.models.initialisation import initialise_own
        from megatron_ru.models.meta import materialise_own

        for stage in put_off:
            # Marks weights, and reads them only where there are several pipeline stages.
            stage.setup_embeddings_and_output_layer()
        replaced: dict[Any, Any] = {}
        gone: set[Any] = set()
        for name, module in model.named_modules():
            made = materialise_own(name, module, torch.cuda.current_device(), replaced)
            weights = list(module.parameters(recurse=False))
            if not gone.isdisjoint(weights):
                raise UserError(f"{name} shares a weight with a module before it; use --ru-meta-init off")
            if self.will_be_loaded:
                self._leave_empty(module.named_parameters(name, recurse=False))
            elif self.whole:
                _check_drawn(model, made)
                initialise_own(model, name, module, self._args.seed)
            hand_over(weights)
            gone.update(weights)

    def _leave_empty(self, weights: Iterable[tuple[str, Any]]) -> None:
        """A restart would pay for the drawing and throw it away. The first number of each weight says whether it was
        loaded: it is NaN until then."""
        import torch

        with torch.no_grad():
            for name, parameter in weights:
                parameter.view(-1)[:1].fill_(torch.nan)
                self._unloaded.append((name, parameter))

    def _loading(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def load_checkpoint(*arguments: Any, **keywords: Any) -> Any:
            result = original(*arguments, **keywords)
            self._check_loaded()
            return result

        return load_checkpoint

    def _check_loaded(self) -> None:
        """Raises `UserError` for weights that hold what lay in their memory, not what the checkpoint has."""
        import torch

        # What an engine keeps in pieces (ZeRO-3) is its own to look after.
        here = [(name, parameter.detach().view(-1)[0]) for name, parameter in self._unloaded if parameter.numel()]
        self._unloaded.clear()
        if not here:
            return
        firsts = torch.stack([first.float() for _, first in here])
        names = [name for (name, _), empty in zip(here, firsts.isnan().tolist(), strict=True) if empty]
        if names:
            more = f" and {len(names) - _NAMES_IN_ERRORS} more" if len(names) > _NAMES_IN_ERRORS else ""
            raise UserError(
                f"the checkpoint in {self._args.load} gave no number to {', '.join(names[:_NAMES_IN_ERRORS])}{more}, "
                "which nothing else would fill: it lacks them, or was saved with NaN; load another one with --ckpt-step"
            )


def _loads_weights(args: argparse.Namespace) -> bool:
    """Whether Megatron will load every weight from a checkpoint, or end: then none needs to be drawn."""
    folder = getattr(args, "load", None)
    if not folder or getattr(args, "dist_ckpt_strictness", "assume_ok_unexpected") not in _ALL_WEIGHTS_OR_NOTHING:
        return False
    # FSDP keeps a weight in pieces, and does not keep the tensor that was built.
    return Path(folder, TRACKER).is_file() and _fsdp(args) is None


def _no_meta(args: argparse.Namespace, ours: bool) -> str | None:
    """Why the model cannot be built on meta, or None. `ours` says that no weight is left for Megatron to draw."""
    if (flag := _fsdp(args)) is not None:
        return f"{flag} moves the model to the device in its own way"
    if getattr(args, "init_model_with_meta_device", False):
        return "--init-model-with-meta-device is Megatron's own way to do so"
    if not ours:
        what = "with --num-experts" if getattr(args, "num_experts", None) else "with --ru-init megatron"
        return f"{what} Megatron draws each weight in the memory that it has"
    return None


def _fsdp(args: argparse.Namespace) -> str | None:
    flags = ("use_torch_fsdp2", "use_megatron_fsdp", "use_custom_fsdp")
    found = (f"--{flag.replace('_', '-')}" for flag in flags if getattr(args, flag, False))
    return next(found, None)


def _check_drawn(model: Any, made: Iterable[tuple[str, Any]]) -> None:
    """Raises `UserError` for a weight that Megatron has drawn while it had no memory, and that is not drawn again."""
    from megatron_ru.models.initialisation import draws

    lost = [name for name, parameter in made if not draws(parameter)]
    if lost and model.config.perform_initialization:
        raise UserError(f"{lost[0]} is drawn by a module of its own, not on meta; use --ru-meta-init off")


def _set_input_positions(model: Any, variant: Variant | None) -> None:
    embedding = getattr(model, "embedding", None)
    if variant is not None and variant.positions == "sinusoidal" and embedding is not None:
        from megatron_ru.models.positions import SinusoidalPositions

        learned = embedding.position_embeddings.weight
        embedding.position_embeddings = SinusoidalPositions(*learned.shape, learned.device, learned.dtype)
