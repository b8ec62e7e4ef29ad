"""Weights that take no memory until the stage is built, and then at once the place where they will be trained.

Megatron's `--init-model-with-meta-device` serves its FSDP alone: elsewhere the weights would stay without values. Here
`torch.empty` of a matrix gives a tensor on torch's meta device while `on_meta()` is entered, and `materialise` gives
each such weight its memory. What the modules compute by themselves (rotary frequencies, norms, biases, tables of
positions) is small and made as ever.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from megatron_ru.foundation.errors import UserError
from megatron_ru.seams.seam import Seam


class _MatricesOnMeta(TorchFunctionMode):
    """Makes the empty matrices that Megatron's modules ask for, with their dtype or device said, on meta."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and _is_weight(args, kwargs):
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _is_weight(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    # torch's own modules, the table of learned positions among them, say neither: they draw what they ask for.
    if kwargs.get("device") is None and kwargs.get("dtype") is None:
        return False
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    sizes = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
    # Of one dimension are biases, which their module fills with zeros.
    return dtype.is_floating_point and len(sizes) > 1


_put_off: list[Any] | None = None
"""The stages whose embeddings wait for their values; None while nothing is built on meta."""


@contextmanager
def on_meta() -> Iterator[list[Any]]:
    """While entered, weights are made without memory. Gives the list of stages whose embeddings must be set up once
    `materialise` has given them some."""
    global _put_off
    before, _put_off = _put_off, []
    try:
        with _MatricesOnMeta():
            yield _put_off
    finally:
        _put_off = before


def meta_seams() -> list[Seam]:
    """The seam that `on_meta` needs."""
    language_module = "megatron.core.models.common.language_module.language_module:LanguageModule"
    return [
        Seam(
            target=f"{language_module}.setup_embeddings_and_output_layer",
            make=_once_there_are_values,
            reason="the first and the last stage of a pipeline add up their embeddings, which have no values on meta",
        )
    ]


def _once_there_are_values(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def setup_embeddings_and_output_layer(self: Any) -> None:
        if _put_off is None:
            original(self)
        else:
            _put_off.append(self)

    return setup_embeddings_and_output_layer


def materialise(model: nn.Module, device: torch.device | int) -> list[tuple[str, nn.Parameter]]:
    """Gives memory on `device` to each weight of `model` that has none, and returns their names and them.

    Their values are whatever lay there. A weight that stands in two places stays one. Raises `UserError` for a matrix
    without memory that is no weight: what its module wrote into it is lost.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    return [weight for name, module in model.named_modules() for weight in materialise_own(name, module, device, made)]


def materialise_own(
    module_name: str, module: nn.Module, device: torch.device | int, made: dict[nn.Parameter, nn.Parameter]
) -> list[tuple[str, nn.Parameter]]:
    """`materialise` for the weights of one module without those of its children. `made` is one for all modules of a
    model: from a weight without memory to the one that took its place."""
    for name, value in {**vars(module), **module._buffers}.items():
        if isinstance(value, Tensor) and value.is_meta:
            raise UserError(f"{module_name}.{name} is no weight and cannot be built on meta; use --ru-meta-init off")
    found = []
    for name, parameter in module._parameters.items():
        if parameter is None or not parameter.is_meta:
            continue
        if parameter not in made:
            made[parameter] = _with_memory(parameter, device)
            found.append((f"{module_name}.{name}" if module_name else name, made[parameter]))
        module._parameters[name] = made[parameter]
    return found


def _with_memory(parameter: nn.Parameter, device: torch.device | int) -> nn.Parameter:
    memory: Tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    real = nn.Parameter(memory, requires_grad=parameter.requires_grad)
    # Megatron writes on its weights how they are cut and who averages them.
    vars(real).update(vars(parameter))
    return real
