"""The fused ops at the places where Megatron-DeepSpeed uses its own: norms, rotary positions, activations, the loss.

There is no layer spec, so every place is a seam. Each replacement hands what its op cannot take to the host's own
function. The optimizer stays the host's: on the CPU that is torch's Adam, whose weight decay is not AdamW's.
"""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from megatron_ru.models import norms
from megatron_ru.models.rotary import rotates
from megatron_ru.ops.activation import activation
from megatron_ru.ops.backend import selected, switch
from megatron_ru.plugin.fused_ops import bias_gelu_seam, cross_entropy_seam, rotated, takes
from megatron_ru.seams.seam import Seam

_ROPE = switch("rope")
_ACTIVATION = switch("activation")

_NORM_REASON = "the norms of a layer, and the one behind the last, are named in the code"
_NORM_USERS = ("megatron.model.transformer", "megatron.model.gpt_model")


def op_seams(args: Namespace) -> list[Seam]:
    """The seams of the ops that `megatron_ru.ops.backend.select` has chosen, for one run."""
    places: dict[str, Callable[[Namespace], list[Seam]]] = {
        "rms_norm": _rms_norm_seams,
        "layer_norm": layer_norm_seams,
        "rope": _rope_seams,
        "activation": _activation_seams,
        "cross_entropy": _cross_entropy_seams,
    }
    chosen = selected()
    return [seam for name, seams in places.items() if name in chosen for seam in seams(args)]


def _rms_norm_seams(args: Namespace) -> list[Seam]:
    class RMSNorm(norms.RMSNorm):
        """With the arguments of the host's."""

        def __init__(self, dim: int, eps: float = 1e-6, sequence_parallel: bool = False):
            super().__init__(dim, eps, sequence_parallel=sequence_parallel)
            _as_the_host_has_them(self, args)

    return [
        Seam(target=f"{user}:RMSNorm", make=lambda _: RMSNorm, expects=("dim", "eps"), reason=_NORM_REASON)
        for user in _NORM_USERS
    ]


def layer_norm_seams(args: Namespace) -> list[Seam]:
    """The seams that put our layer norm in the place of the host's."""

    class LayerNorm(norms.LayerNorm):
        """With the arguments of the host's, those of its kernels aside."""

        def __init__(
            self, hidden_size: int, eps: float = 1e-5, sequence_parallel: bool = False,
            apply_layernorm_1p: bool = False, **kernels: Any,
        ):  # fmt: skip
            super().__init__(hidden_size, eps, zero_centered=apply_layernorm_1p, sequence_parallel=sequence_parallel)
            _as_the_host_has_them(self, args)

    return [
        Seam(target=f"{user}:LayerNorm", make=lambda _: LayerNorm, expects=("eps",), reason=_NORM_REASON)
        for user in _NORM_USERS
    ]


def _as_the_host_has_them(module: nn.Module, args: Namespace) -> None:
    """Puts the parameters where DeepSpeed trains them, in the dtype of all others."""
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator().current_device_name()
    for name, parameter in list(module.named_parameters()):
        moved = nn.Parameter(parameter.detach().to(device, args.params_dtype))
        moved.sequence_parallel = parameter.sequence_parallel  # type: ignore[attr-defined]
        setattr(module, name, moved)


def _rope_seams(args: Namespace) -> list[Seam]:
    def make(original: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def apply_rotary_pos_emb(t: Tensor, freqs: Tensor) -> Tensor:
            # Shorter sequences take the first angles.
            angles = freqs if freqs.shape[0] == t.shape[0] else freqs[: t.shape[0]]
            if not rotates(t, angles) or not takes(_ROPE, t):
                return original(t, freqs)
            return rotated(t, angles, False, 1.0)

        return apply_rotary_pos_emb

    return [
        Seam(
            target="megatron.model.transformer:apply_rotary_pos_emb",
            make=make,
            expects=("t", "freqs"),
            reason="the rotation of queries and keys is a function of the attention's module",
        )
    ]


def _activation_seams(args: Namespace) -> list[Seam]:
    reason = "the MLP chooses its activation when it is built"

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def build(self: Any, *arguments: Any, **keywords: Any) -> None:
            original(self, *arguments, **keywords)
            if self.swiglu:
                self.activation_func = _swiglu(self.activation_func)

        return build

    return [
        Seam(target="megatron.model.transformer:ParallelMLP.__init__", make=make, expects=("config",), reason=reason),
        bias_gelu_seam("megatron.model.transformer", reason),
    ]


def _swiglu(original: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def swiglu(x: Tensor) -> Tensor:
        return activation(x, None, "swiglu") if takes(_ACTIVATION, x) else original(x)

    return swiglu


def _cross_entropy_seams(args: Namespace) -> list[Seam]:
    # Distillation reads the logits again after the loss, which our op has overwritten.
    return [] if args.kd or args.mos else [cross_entropy_seam()]
