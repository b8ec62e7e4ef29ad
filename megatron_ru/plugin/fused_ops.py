"""The fused ops in the places of Megatron that no layer spec reaches: rotary positions, activations of Megatron's own
MLP, the loss and the optimizer.

The norms and the feed-forward block of our layer spec call their ops by themselves. Each replacement here hands what
its op cannot take to Megatron's own function, so that nothing changes there but the speed; without the word of an op in
`--ru-ops` its seams are not installed.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from megatron_ru.models.rotary import rotary_tables, rotates
from megatron_ru.ops.activation import activation
from megatron_ru.ops.backend import Switch, selected, switch
from megatron_ru.ops.cross_entropy import cross_entropy, vocab_parallel_cross_entropy
from megatron_ru.ops.rope import rope
from megatron_ru.plugin.optimizer_step import MegatronAdamW, optimizer_step_seams
from megatron_ru.seams.seam import Seam
from megatron_ru.seams.stand_in import stand_in

_ROPE = switch("rope")
_ACTIVATION = switch("activation")
_CROSS_ENTROPY = switch("cross_entropy")


def fused_op_seams() -> list[Seam]:
    """The seams of the ops that `megatron_ru.ops.backend.select` has chosen."""
    places = {
        "rope": _rope_seams,
        "activation": _activation_seams,
        "cross_entropy": _cross_entropy_seams,
        "adamw": _adamw_seams,
    }
    chosen = selected()
    return [seam for name, seams in places.items() if name in chosen for seam in seams()]


def takes(op: Switch, tensor: Tensor) -> bool:
    """Whether the op's compiled form runs on the tensor; where not the reason is logged, and Megatron's own runs."""
    taken = op.takes(tensor)
    if not taken:
        op.fell_back(tensor)
    return taken


def _rope_seams() -> list[Seam]:
    # Every caller (attention, latent attention, inference contexts) holds a reference of its own to
    # apply_rotary_pos_emb, and all of them come through it to one of these two, which it looks up in its module.
    return [
        Seam(
            target="megatron.core.models.common.embeddings.rope_utils:_apply_rotary_pos_emb_bshd",
            make=_rotation,
            expects=("t", "freqs", "rotary_interleaved", "mscale"),
            reason="the rotation of queries and keys has no field in a layer spec",
        ),
        Seam(
            target="megatron.core.models.common.embeddings.rope_utils:fused_apply_rotary_pos_emb",
            make=_fused_rotation,
            reason="with TransformerEngine the rotation is taken from there unless --no-rope-fusion is given",
        ),
    ]


def _rotation(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def rotate(t: Tensor, freqs: Tensor, rotary_interleaved: bool = False, *others: Any, **keywords: Any) -> Tensor:
        # The others: interleaving as latent attention has it, the inverse, later ones.
        asked = others or any(value for name, value in keywords.items() if name != "mscale")
        if asked or not rotates(t, freqs) or not takes(_ROPE, t):
            return original(t, freqs, rotary_interleaved, *others, **keywords)
        return rotated(t, freqs, rotary_interleaved, keywords.get("mscale", 1.0))

    return rotate


def _fused_rotation(original: Callable[..., Tensor] | None) -> Callable[..., Tensor] | None:
    if original is None:
        # Megatron takes None for "not available" and says so when the flag asks for it.
        return None

    def rotate(t: Tensor, freqs: Tensor, *others: Any, interleaved: bool = False, **keywords: Any) -> Tensor:
        if others or any(keywords.values()) or not rotates(t, freqs) or not takes(_ROPE, t):
            return original(t, freqs, *others, interleaved=interleaved, **keywords)
        return rotated(t, freqs, interleaved, 1.0)

    return rotate


def rotated(t: Tensor, freqs: Tensor, interleaved: bool, scale: float) -> Tensor:
    cos, sin = rotary_tables(freqs, interleaved=interleaved, scale=scale)
    return rope(t, None, cos, sin, interleaved=interleaved)[0]


def _activation_seams() -> list[Seam]:
    reason = "an MLP that is not of our layer spec fuses its bias and activation by itself"
    return [
        Seam(
            target="megatron.core.transformer.mlp:bias_swiglu_impl",
            make=_bias_swiglu,
            expects=("input", "bias"),
            reason=reason,
        ),
        bias_gelu_seam("megatron.core.transformer.mlp", reason),
    ]


def bias_gelu_seam(module: str, reason: str) -> Seam:
    """The seam on the fused bias and GELU (the tanh form) that `module` calls."""
    return Seam(target=f"{module}:bias_gelu_impl", make=_bias_gelu, reason=reason)


def _bias_swiglu(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def bias_swiglu(input: Tensor, bias: Tensor | None, *others: Any, **keywords: Any) -> Tensor:
        # The others: a store in fp8, offloading to the CPU, and since 0.20 a bound of the values.
        asked = any(value not in (False, None) for value in (*others, *keywords.values()))
        if asked or not takes(_ACTIVATION, input):
            return original(input, bias, *others, **keywords)
        return activation(input, bias, "swiglu")

    return bias_swiglu


def _bias_gelu(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def bias_gelu(input: Tensor, bias: Tensor) -> Tensor:
        if not takes(_ACTIVATION, input):
            return original(input, bias)
        return activation(input, bias, "gelu_tanh")

    return bias_gelu


def _cross_entropy_seams() -> list[Seam]:
    return [
        Seam(
            target="megatron.core.models.common.language_module.language_module:fused_vocab_parallel_cross_entropy",
            make=_fused_cross_entropy,
            expects=("vocab_parallel_logits", "target", "tp_group"),
            reason="the loss of --cross-entropy-loss-fusion, whose own gradient is rounded to bf16 in fp32 runs too",
        ),
        cross_entropy_seam(),
    ]


def cross_entropy_seam() -> Seam:
    """The seam on the loss that every Megatron has, Megatron-DeepSpeed's too."""
    return Seam(
        target="megatron.core.tensor_parallel:vocab_parallel_cross_entropy",
        make=_plain_cross_entropy,
        expects=("vocab_parallel_logits", "target", "label_smoothing"),
        reason="the loss without --cross-entropy-loss-fusion, whose logits are copied to fp32 first",
    )


def _fused_cross_entropy(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def fused_vocab_parallel_cross_entropy(vocab_parallel_logits: Tensor, target: Tensor, tp_group: Any) -> Tensor:
        if not takes(_CROSS_ENTROPY, vocab_parallel_logits):
            return original(vocab_parallel_logits, target, tp_group)
        return _loss(vocab_parallel_logits, target, tp_group)

    return fused_vocab_parallel_cross_entropy


def _plain_cross_entropy(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def vocab_parallel_cross_entropy(
        vocab_parallel_logits: Tensor, target: Tensor, label_smoothing: float = 0.0, tp_group: Any = None
    ) -> Tensor:
        if not takes(_CROSS_ENTROPY, vocab_parallel_logits):
            # Up to 0.18 it has no group to be told.
            group = {} if tp_group is None else {"tp_group": tp_group}
            return original(vocab_parallel_logits, target, label_smoothing, **group)
        return _loss(vocab_parallel_logits, target, tp_group, label_smoothing)

    return vocab_parallel_cross_entropy


def _loss(logits: Tensor, target: Tensor, group: Any, label_smoothing: float = 0.0) -> Tensor:
    """Losses [sequence, batch] fp32 of logits [sequence, batch, vocabulary/TP] and target [sequence, batch].

    Megatron gives every id but the target smoothing/(vocabulary - 1), the op gives every id smoothing/vocabulary: the
    same once the op's is larger by vocabulary/(vocabulary - 1). Ids below 0, which mark what has no loss, get loss 0;
    Megatron gives them a finite loss that its mask takes out.
    """
    if group is None:
        from megatron.core.parallel_state import get_tensor_model_parallel_group

        group = get_tensor_model_parallel_group()
    size = group.size()
    vocabulary = logits.shape[-1] * size
    keywords: dict[str, Any] = {
        "ignore_index": -1,
        "label_smoothing": label_smoothing * vocabulary / max(1, vocabulary - 1),
        # Megatron's output layer does not keep the logits, and nothing reads them after the loss. A leaf is somebody's.
        "in_place": not logits.is_leaf and logits.is_contiguous(),
    }
    target = target.clamp(min=-1)
    if size == 1:
        return cross_entropy(logits, target, **keywords)
    return vocab_parallel_cross_entropy(logits, target, group, **keywords)


def _adamw_seams() -> list[Seam]:
    """Empty where Adam comes from Apex or TransformerEngine."""
    from megatron.core import optimizer

    if not getattr(optimizer, "USING_PYTORCH_OPTIMIZER", False):
        return []
    return [
        Seam(
            target="megatron.core.optimizer:torch",
            make=_torch_with_our_adamw,
            reason="the optimizer is built as torch.optim.AdamW, by that name",
        ),
        *optimizer_step_seams(),
    ]


def _torch_with_our_adamw(original: ModuleType) -> ModuleType:
    """`torch` as megatron.core.optimizer alone sees it, with `MegatronAdamW` under the name torch.optim.AdamW."""
    seen = stand_in(original)
    seen.optim = optim = stand_in(original.optim)  # type: ignore[attr-defined]
    optim.AdamW = MegatronAdamW  # type: ignore[attr-defined]
    return seen
