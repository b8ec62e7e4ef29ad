"""The ops in Hugging Face's Llama: norms, rotary positions, gated feed-forward blocks and the loss."""

import inspect
from collections.abc import Callable, Iterable
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_ru.foundation.errors import UserError
from megatron_ru.ops.activation import glu
from megatron_ru.ops.cross_entropy import cross_entropy
from megatron_ru.ops.linear_cross_entropy import linear_cross_entropy
from megatron_ru.ops.rms_norm import rms_norm
from megatron_ru.ops.rope import rope

_GATES = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "relu": "reglu"}


class HfLlamaPatch:
    """What `patch_hf_llama` replaced; `undo` takes it back. As a context manager it does so at the end of the block."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any]] = []

    def undo(self) -> None:
        """Puts everything back; a second call does nothing."""
        while self._replaced:
            owner, name, before = self._replaced.pop()
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

    def __enter__(self) -> "HfLlamaPatch":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._replaced.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)


def patch_hf_llama(model: nn.Module | None = None, *, ops: str = "all") -> HfLlamaPatch:
    """A handle whose `undo()` takes back the patch: our ops in transformers' Llama.

    Without a model the classes are patched, and with them every Llama of this process, built already or later. With a
    `LlamaForCausalLM` or `LlamaModel` only its own modules are. `ops` is `all`, `none`, or words of

        rms_norm               every LlamaRMSNorm
        activation             the gate of every LlamaMLP (SiLU, GELU or ReLU)
        rope                   queries and keys, rotated in one call where they lie, [batch, heads, sequence, head_dim]
        cross_entropy          the loss from logits: mean over labels that are not -100, or the sum over
                               num_items_in_batch
        linear_cross_entropy   in training, the loss from the last hidden states: the logits are never whole in
                               memory, and `output.logits` is None

    Outside training, or without labels, logits come as ever. Weights, names and checkpoints stay as they are. Raises
    `UserError` for an unknown word, for a model without Llama's modules, and when this version of transformers has
    moved what would be replaced.
    """
    words = _words(ops)
    modeling = _modeling_llama()
    patch = HfLlamaPatch()
    try:
        for word in words:
            part = _PARTS[word]
            part.check(modeling)
            if model is None:
                part.patch_classes(patch, modeling)
            else:
                part.patch_model(patch, modeling, model)
    except BaseException:
        patch.undo()
        raise
    return patch


def _words(ops: str) -> list[str]:
    if ops in ("all", "none"):
        return list(_PARTS) if ops == "all" else []
    words = [word.strip() for word in ops.split(",")]
    unknown = [word for word in words if word not in _PARTS]
    if unknown:
        raise UserError(
            f"ops={ops!r}: Llama has no place for {', '.join(map(repr, unknown))}, expected all, none, or words of "
            f"{', '.join(_PARTS)}"
        )
    return [word for word in _PARTS if word in words]


def _modeling_llama() -> ModuleType:
    try:
        from transformers.models.llama import modeling_llama
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "transformers":
            raise
        raise UserError(
            "patch_hf_llama needs transformers, which is not installed: pip install 'megatron-ru[hf]'"
        ) from None
    return modeling_llama


class _Part:
    """One op's place in Llama: which class, which method, and what that method must look like inside."""

    def __init__(self, class_name: str, uses: tuple[str, ...], make: Callable[[Any], Callable[..., Any]]):
        self._class_name = class_name
        self._uses = uses
        self._make = make

    def check(self, modeling: ModuleType) -> None:
        """Raises `UserError` unless this version's class has a forward that uses the expected names."""
        owner = getattr(modeling, self._class_name, None)
        if owner is None:
            raise _moved(f"has no {self._class_name}", self._class_name)
        _refuse_twice(owner.forward, f"{self._class_name}.forward")
        forward = inspect.unwrap(owner.forward)
        missing = [name for name in self._uses if name not in forward.__code__.co_names]
        if missing:
            raise _moved(f"{self._class_name}.forward does not use {', '.join(missing)}", self._class_name)

    def patch_classes(self, patch: HfLlamaPatch, modeling: ModuleType) -> None:
        owner = getattr(modeling, self._class_name)
        patch._replace(owner, "forward", self._made(owner.forward))

    def patch_model(self, patch: HfLlamaPatch, modeling: ModuleType, model: nn.Module) -> None:
        for module in _modules(model, modeling, self._class_name):
            bound = module.forward
            plain = bound.__func__ if isinstance(bound, MethodType) else lambda _, *a, bound=bound, **k: bound(*a, **k)
            patch._replace(module, "forward", MethodType(self._made(plain), module))

    def _made(self, original: Callable[..., Any]) -> Callable[..., Any]:
        made = self._make(original)
        setattr(made, _MARK, True)
        return made


def _rms_norm_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if self.weight.dtype != hidden_states.dtype:
            # Theirs gives the wider of the two dtypes.
            return original(self, hidden_states)  # type: ignore[no-any-return]
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    return forward


def _mlp_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, x: Tensor) -> Tensor:
        kind = _GATES.get(self.config.hidden_act)
        if kind is None or getattr(self.config, "pretraining_tp", 1) > 1:
            return original(self, x)  # type: ignore[no-any-return]
        return self.down_proj(glu(self.gate_proj(x), self.up_proj(x), kind))  # type: ignore[no-any-return]

    return forward


class _RotaryPart(_Part):
    """The rotation is a function that LlamaAttention finds in its module."""

    _FUNCTION = "apply_rotary_pos_emb"

    def __init__(self) -> None:
        super().__init__("LlamaAttention", (self._FUNCTION,), _rotation)

    def check(self, modeling: ModuleType) -> None:
        super().check(modeling)
        function = getattr(modeling, self._FUNCTION, None)
        _refuse_twice(function, self._FUNCTION)
        if function is None or list(inspect.signature(function).parameters)[:4] != ["q", "k", "cos", "sin"]:
            raise _moved(f"has no {self._FUNCTION}(q, k, cos, sin)", self._FUNCTION)

    def patch_classes(self, patch: HfLlamaPatch, modeling: ModuleType) -> None:
        original = getattr(modeling, self._FUNCTION)
        patch._replace(modeling, self._FUNCTION, self._made(original))

    def patch_model(self, patch: HfLlamaPatch, modeling: ModuleType, model: nn.Module) -> None:
        rotate = self._made(getattr(modeling, self._FUNCTION))
        for attention in _modules(model, modeling, self._class_name):
            # The same forward, with another function under the name that it looks up in its module.
            forward = inspect.unwrap(type(attention).forward)
            names = {**forward.__globals__, self._FUNCTION: rotate}
            own = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
            own.__kwdefaults__ = forward.__kwdefaults__
            patch._replace(attention, "forward", MethodType(own, attention))


class _Turns(NamedTuple):
    """Tables of one forward pass, which every layer shares."""

    cos: Tensor
    """Theirs: [1 or batch, sequence, head_dim]."""
    sin: Tensor
    versions: tuple[int, int]
    cos_rows: Tensor
    """Ours: [sequence, head_dim/2], or [batch·sequence, head_dim/2], fp32."""
    sin_rows: Tensor
    positions: Tensor | None
    """[sequence, batch] rows of the tables, None where the batch has one row for each position."""


def _rotation(original: Callable[..., Any]) -> Callable[..., Any]:
    latest: list[_Turns] = []

    def turns(cos: Tensor, sin: Tensor) -> _Turns:
        if torch.compiler.is_compiling():
            return _turns(cos, sin, (0, 0))
        versions = (0, 0) if cos.is_inference() else (cos._version, sin._version)
        known = latest and latest[0].cos is cos and latest[0].sin is sin and latest[0].versions == versions
        if not known:
            # What is made in inference mode could not be used in training later.
            with torch.inference_mode(False), torch.no_grad():
                latest[:] = [_turns(cos, sin, versions)]
        return latest[0]

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **keywords: Any) -> Any:
        plain = q.dim() == 4 and cos.dim() == 3 and cos.shape == sin.shape and cos.shape[1] == q.shape[2]
        if rest or keywords or not plain or cos.shape[-1] != q.shape[-1] or cos.shape[0] not in (1, q.shape[0]):
            return original(q, k, cos, sin, *rest, **keywords)
        found = turns(cos, sin)
        # [sequence, batch, heads, head_dim] is another view of them.
        q, k = q.permute(2, 0, 1, 3), k.permute(2, 0, 1, 3)
        turned = rope(q, k, found.cos_rows, found.sin_rows, positions=found.positions)
        return tuple(each.permute(1, 2, 0, 3) for each in turned if each is not None)

    return apply_rotary_pos_emb


def _turns(cos: Tensor, sin: Tensor, versions: tuple[int, int]) -> _Turns:
    batch, sequence, size = cos.shape
    rows = [table[..., : size // 2].reshape(batch * sequence, size // 2).float().contiguous() for table in (cos, sin)]
    positions = None
    if batch > 1:
        positions = torch.arange(batch * sequence, device=cos.device).view(batch, sequence).t()
    return _Turns(cos, sin, versions, rows[0], rows[1], positions)


class _LossPart(_Part):
    """The loss is a property of the model, which a model may have set for itself."""

    def __init__(self) -> None:
        super().__init__("LlamaForCausalLM", ("loss_function", "lm_head"), lambda original: original)

    def patch_classes(self, patch: HfLlamaPatch, modeling: ModuleType) -> None:
        owner = getattr(modeling, self._class_name)
        inherited = inspect.getattr_static(owner, "loss_function", None)
        if not isinstance(inherited, property):
            raise _moved(f"{self._class_name}.loss_function is no property", self._class_name)
        _refuse_twice(inherited.fget, f"{self._class_name}.loss_function")

        def loss_function(self: Any) -> Callable[..., Tensor]:
            return vars(self).get("_loss_function", _causal_lm_loss)  # type: ignore[no-any-return]

        setattr(loss_function, _MARK, True)
        patch._replace(owner, "loss_function", property(loss_function, inherited.fset))

    def patch_model(self, patch: HfLlamaPatch, modeling: ModuleType, model: nn.Module) -> None:
        for module in _modules(model, modeling, self._class_name, required=False):
            patch._replace(module, "_loss_function", _causal_lm_loss)


def _causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The scalar fp32 loss of logits [batch, sequence, vocabulary]: the mean over labels that are not ignored, or their
    sum divided by `num_items_in_batch`. Labels [batch, sequence] are shifted here, `shift_labels` are shifted already.
    """
    target = _targets(labels, shift_labels, ignore_index).to(logits.device)
    # The logits belong to the caller, who finds them in the output: their gradient goes elsewhere.
    flat = logits.reshape(-1, vocab_size)
    if num_items_in_batch is None:
        return cross_entropy(flat, target, ignore_index=ignore_index, reduction="mean")
    items = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=logits.device)
    loss = cross_entropy(flat, target, ignore_index=ignore_index, reduction="sum", expected_gradient=items.reciprocal())
    return loss / items


class _LinearLossPart(_Part):
    """The loss out of the last hidden states, where the output layer is a plain matrix product."""

    def __init__(self) -> None:
        super().__init__("LlamaForCausalLM", ("lm_head", "loss_function"), _fused_loss_forward)

    def patch_model(self, patch: HfLlamaPatch, modeling: ModuleType, model: nn.Module) -> None:
        if _modules(model, modeling, self._class_name, required=False):
            super().patch_model(patch, modeling, model)


def _fused_loss_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)
    parameters = signature.parameters
    keep = next((name for name in ("logits_to_keep", "num_logits_to_keep") if name in parameters), None)
    rest = next((name for name, one in parameters.items() if one.kind is one.VAR_KEYWORD), "")
    if keep is None or "labels" not in parameters:
        raise _moved("LlamaForCausalLM.forward takes no labels and logits_to_keep", "LlamaForCausalLM")

    def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
        given = signature.bind(self, *arguments, **keywords).arguments
        labels = given.get("labels")
        others = given.get(rest, {})
        if not self.training or labels is None or given.get(keep) or not _is_plain_output_layer(self):
            return original(self, *arguments, **keywords)
        hidden: list[Tensor] = []
        hook = self.model.register_forward_hook(lambda module, inputs, output: hidden.append(output[0]))
        try:
            # Logits of the last position alone, for a result that has everything but the loss.
            given = {name: value for name, value in given.items() if name not in ("self", "labels", rest, keep)}
            output = original(self, **given, **{**others, keep: 1})
        finally:
            hook.remove()
        loss = _linear_loss(hidden[-1], self.lm_head.weight, labels, **others)
        if isinstance(output, tuple):
            return (loss, *output[1:])
        return type(output)(**{**dict(output.items()), "loss": loss, "logits": None})

    return forward


def _is_plain_output_layer(model: Any) -> bool:
    """Whether the output layer is a matrix that lies here whole (no adapter, quantisation, sharding or offloading), and
    the loss is the usual one."""
    layer = model.lm_head
    weight = getattr(layer, "weight", None)
    return (
        type(layer) is nn.Linear
        and layer.bias is None
        and type(weight) is nn.Parameter
        and weight.shape == (model.config.vocab_size, model.config.hidden_size)
        and not hasattr(layer, "_hf_hook")
        and getattr(model.loss_function, "__name__", "") in ("ForCausalLMLoss", _causal_lm_loss.__name__)
        and getattr(model.config, "pretraining_tp", 1) == 1
    )


def _linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """`_causal_lm_loss` of hidden @ weight.T; hidden [batch, sequence, hidden], weight [vocabulary, hidden]."""
    target = _targets(labels, shift_labels, ignore_index).to(hidden.device)
    counted = target != ignore_index
    divisor = counted.sum() if num_items_in_batch is None else num_items_in_batch
    weights = counted / torch.as_tensor(divisor, dtype=torch.float32, device=hidden.device)
    rows = hidden.reshape(-1, hidden.shape[-1])
    return linear_cross_entropy(rows, weight, target, token_weights=weights, ignore_index=ignore_index)[0]


def _targets(labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int) -> Tensor:
    """[batch·sequence] ids of the next token; the last position of a sequence has none."""
    if shift_labels is None:
        assert labels is not None
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return shift_labels.reshape(-1)


def _modules(model: nn.Module, modeling: ModuleType, class_name: str, required: bool = True) -> list[Any]:
    kind = getattr(modeling, class_name)
    found: Iterable[nn.Module] = (module for module in model.modules() if isinstance(module, kind))
    modules = list(found)
    if required and not modules:
        raise UserError(
            f"this {type(model).__name__} holds no {class_name} of transformers, expected a LlamaForCausalLM or a "
            "LlamaModel"
        )
    return modules


def _refuse_twice(found: Any, name: str) -> None:
    if getattr(found, _MARK, False):
        raise UserError(
            f"{name} is patched already; keep the handle that the first patch_hf_llama gave, and undo() it before this"
        )


def _moved(what: str, name: str) -> UserError:
    import transformers

    return UserError(
        f"transformers {transformers.__version__}: {what}, so {name} cannot be patched; use transformers 4.48 to 5.23, "
        "or leave that op out with ops=..."
    )


_ABSENT = object()
_MARK = "_megatron_ru_patch"

_PARTS: dict[str, _Part] = {
    "rms_norm": _Part("LlamaRMSNorm", ("weight", "variance_epsilon"), _rms_norm_forward),
    "activation": _Part("LlamaMLP", ("gate_proj", "up_proj", "down_proj", "act_fn"), _mlp_forward),
    "rope": _RotaryPart(),
    "cross_entropy": _LossPart(),
    "linear_cross_entropy": _LinearLossPart(),
}
