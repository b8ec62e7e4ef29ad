"""AdamW over many tensors in one launch, with rounded copies of the new parameters."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from megatron_ru.ops.backend import switch
from megatron_ru.ops.library import operator
from megatron_ru.ops.op import BenchmarkCase, Call, Op, Sample, Tolerance, random_tensor, register

SWITCH = switch("adamw")
_fused = operator("adamw_")
_WIDE = frozenset((torch.float32, torch.float64))


@torch.no_grad()
def adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    step: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    copies: Sequence[Tensor] = (),
    maximize: bool = False,
    gradient_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Changes parameters, moments and copies by one step of AdamW.

    parameters and moments: fp32 (on a CPU also fp64), contiguous, on one device; gradients: fp32, fp16 or bf16 (fp64
    beside fp64), one dtype; copies: none, or one bf16 or fp16 tensor for each parameter, which becomes its rounded
    value. step: fp32 scalar on that device, the number of this step, from 1. lr: a number or a scalar tensor. Gradients
    are divided by `gradient_scale`; where `found_inf`, an fp32 scalar, is not 0, nothing is changed.
    Source: Loshchilov and Hutter, 2019, "Decoupled Weight Decay Regularization", algorithm 2.
    """
    if not parameters:
        return
    first = parameters[0]
    rate, rate_on_device = _learning_rate(lr, first)
    if SWITCH.takes(first, _WIDE):
        _fused(
            parameters, gradients, first_moments, second_moments, copies, step, rate, rate_on_device, betas[0],
            betas[1], eps, weight_decay, maximize, gradient_scale, found_inf,
        )  # fmt: skip
        return
    SWITCH.fell_back(first)
    adamw_plain(
        parameters, gradients, first_moments, second_moments, step, lr=lr, betas=betas, eps=eps,
        weight_decay=weight_decay, copies=copies, maximize=maximize, gradient_scale=gradient_scale,
        found_inf=found_inf,
    )  # fmt: skip


@torch.no_grad()
def adamw_plain(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    step: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    copies: Sequence[Tensor] = (),
    maximize: bool = False,
    gradient_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """The same in plain torch."""
    beta1, beta2 = betas
    # In fp32, 1 - 0.999 has lost five digits.
    first_correction, second_correction = (1 - beta ** step.double() for beta in betas)
    clean = None if found_inf is None else found_inf == 0
    for number, (parameter, moment, square) in enumerate(zip(parameters, first_moments, second_moments, strict=True)):
        gradient = gradients[number].to(parameter.dtype)
        if gradient_scale is not None:
            gradient = gradient / gradient_scale
        if maximize:
            gradient = -gradient
        new_moment = beta1 * moment + (1 - beta1) * gradient
        new_square = beta2 * square + (1 - beta2) * gradient * gradient
        rate = lr.to(parameter.dtype) if isinstance(lr, Tensor) else lr
        size = (rate / first_correction).to(parameter.dtype)
        change = size * new_moment / ((new_square / second_correction.to(parameter.dtype)).sqrt() + eps)
        new_parameter = parameter - rate * weight_decay * parameter - change
        for old, new in ((parameter, new_parameter), (moment, new_moment), (square, new_square)):
            old.copy_(new if clean is None else torch.where(clean, new, old))
        if copies:
            # Where nothing is changed, neither is the copy.
            old = copies[number]
            old.copy_(parameter if clean is None else torch.where(clean, parameter.to(old.dtype), old))


def adamw_reference(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    step: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    copies: Sequence[Tensor] = (),
    maximize: bool = False,
    gradient_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """The same, line by line of the algorithm, for float64 tensors in tests."""
    if found_inf is not None and found_inf.item() != 0:
        return
    t, alpha = step.item(), float(lr)
    b1, b2 = betas
    for number, theta in enumerate(parameters):
        g = gradients[number] / (1.0 if gradient_scale is None else gradient_scale.item())
        g = -g if maximize else g
        theta.mul_(1 - alpha * weight_decay)
        m = first_moments[number].mul_(b1).add_(g, alpha=1 - b1)
        v = second_moments[number].mul_(b2).addcmul_(g, g, value=1 - b2)
        theta -= alpha * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
        if copies:
            copies[number].copy_(theta)


class FusedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW with the same arguments, defaults and state (`step`, `exp_avg`, `exp_avg_sq`), stepped by
    `adamw`: one launch for all parameters of a group that share device, dtypes and step.

    As torch's fused AdamW it keeps the step on the parameters' device, takes a tensor for `lr`, and heeds `grad_scale`
    and `found_inf` where a GradScaler sets them, without making the host wait for a GPU. Parameters that step together
    share one step tensor. What the fused op does not take, amsgrad, sparse or complex numbers, half-precision
    parameters or a switched-off op, torch's own step serves.
    """

    def __init__(self, params: Any, *arguments: Any, **keywords: Any) -> None:
        self._copies: dict[Tensor, Tensor] = {}
        self._steps: dict[int, _SharedStep] = {}
        self._factor: float | Tensor = 1.0
        super().__init__(params, *arguments, **keywords)
        # GradScaler then leaves scale and finding to us instead of asking the GPU.
        self._step_supports_amp_scaling = True

    # Around it torch has a wrapper that keeps its compiler out, and imports the compiler for that.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What unpickling and loading a state dict call: the steps that come are not ours."""
        super().__setstate__(state)
        self.__dict__.setdefault("_copies", {})
        self.__dict__.setdefault("_factor", 1.0)
        self._step_supports_amp_scaling = True
        self._steps = {}

    def state_dict(self) -> dict[str, Any]:
        """As torch's: a step for each parameter, since torch would count a shared one several times."""
        found = super().state_dict()
        found["state"] = {
            key: {**state, "step": state["step"].clone()} if isinstance(state.get("step"), Tensor) else state
            for key, state in found["state"].items()
        }
        return found

    def write_copies_to(self, copies: Mapping[Tensor, Tensor]) -> None:
        """From now on each step leaves the rounded value of a parameter in its copy, bf16 or fp16 of the same size."""
        self._copies = dict(copies)

    def scale_next_gradients(self, factor: float | Tensor) -> None:
        """The next step, and it alone, takes gradients times `factor`, a number or a tensor of one."""
        self._factor = factor

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; gives back what `closure`, which computes gradients anew, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        factor, self._factor = self._factor, 1.0
        if not parameters:
            return loss
        # A tensor is not looked at: its value may not have been computed yet.
        if not isinstance(factor, Tensor) and factor == 1:
            self._step(parameters)
            return loss
        given = getattr(self, "grad_scale", None)
        if isinstance(factor, Tensor):
            scale = factor.detach().reshape(()).float().reciprocal()
        else:
            scale = torch.full((), 1 / factor, dtype=torch.float32, device=parameters[0].device)
        self.grad_scale = scale if given is None else scale * given.to(scale.device)
        try:
            self._step(parameters)
        finally:
            if given is None:
                del self.grad_scale
            else:
                self.grad_scale = given
        return loss

    def _step(self, parameters: Sequence[Tensor]) -> None:
        reason = self._why_not_fused()
        if reason is not None:
            SWITCH.fell_back(parameters[0], reason or None)
            self._torch_step(parameters)
            return
        found_inf = getattr(self, "found_inf", None)
        self._make_state(parameters)
        steps = self._steps_of(parameters)
        for step in steps:
            step += 1
        for group in self.param_groups:
            for batch in self._batches(group):
                self._step_batch(group, batch, found_inf)
        if found_inf is not None:
            for step in steps:
                step -= found_inf.to(step.device)

    def _why_not_fused(self) -> str | None:
        """None when `adamw` takes every group; else why not, "" for what the switch itself can tell."""
        for group in self.param_groups:
            if group["amsgrad"] or group.get("differentiable"):
                return "amsgrad and differentiable steps have no kernel"
            if not group.get("decoupled_weight_decay", True):
                return "weight decay that enters the gradient has no kernel"
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                if not SWITCH.takes(parameter):
                    return ""
                if not SWITCH.takes(parameter, _WIDE):
                    return f"parameters are {parameter.dtype}, the kernel has float32"
                if gradient.layout is not torch.strided or not parameter.is_contiguous():
                    return "a gradient is sparse or a parameter not contiguous"
                double = parameter.dtype is torch.float64
                if not SWITCH.takes(gradient) or double != (gradient.dtype is torch.float64):
                    return f"gradients are {gradient.dtype} beside {parameter.dtype}"
        return None

    def _torch_step(self, parameters: Sequence[Tensor]) -> None:
        """AdamW's own step; what a GradScaler left to us is done before, where torch's form does not do it."""
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        self._part_steps()
        left_to_us = not all(group.get("fused") for group in self.param_groups)
        if left_to_us and (scale is not None or found_inf is not None):
            if found_inf is not None and found_inf.item():
                return
            if scale is not None:
                torch._foreach_div_([cast(Tensor, parameter.grad) for parameter in parameters], scale)
        kept = {
            name: self.__dict__.pop(name) for name in ("grad_scale", "found_inf") if left_to_us and hasattr(self, name)
        }
        # Torch wraps the step of each optimizer class in hooks, which have run for ours.
        step: Any = torch.optim.AdamW.step
        while getattr(step, "hooked", False):
            step = step.__wrapped__
        try:
            step(self)
        finally:
            self.__dict__.update(kept)
        for parameter in parameters:
            copy = self._copies.get(parameter)
            if copy is not None:
                copy.copy_(parameter)

    def _make_state(self, parameters: Sequence[Tensor]) -> None:
        """Zero moments for parameters that have none yet, and steps of ours in place of everybody else's."""
        strangers: dict[tuple[torch.device, float], list[dict[str, Any]]] = {}
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                # The order of torch's state.
                state["step"] = None
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            step = state.get("step")
            if id(step) not in self._steps:
                # Read once after a state was loaded, from a GPU too.
                value = 0.0 if step is None else float(step)
                strangers.setdefault((parameter.device, value), []).append(state)
        for (device, value), states in strangers.items():
            self._share(torch.tensor(value, dtype=torch.float32, device=device), states)

    def _steps_of(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The step tensors of these parameters, each owned by no others."""
        users: dict[int, list[dict[str, Any]]] = {}
        for parameter in parameters:
            state = self.state[parameter]
            users.setdefault(id(state["step"]), []).append(state)
        found = []
        for key, states in users.items():
            shared = self._steps[key]
            if len(states) < shared.owners:
                # Some parameters have no gradient this time and stand still.
                shared.owners -= len(states)
                found.append(self._share(shared.step.clone(), states))
            else:
                found.append(shared.step)
        return found

    def _share(self, step: Tensor, states: Sequence[dict[str, Any]]) -> Tensor:
        for state in states:
            state["step"] = step
        self._steps[id(step)] = _SharedStep(step, len(states))
        return step

    def _part_steps(self) -> None:
        """Gives each parameter a step of its own, as torch counts them."""
        for state in self.state.values() if self._steps else ():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()
        self._steps = {}

    def _batches(self, group: dict[str, Any]) -> Iterable[list[Tensor]]:
        """Parameters of the group with a gradient, by device, dtypes and step."""
        found: dict[tuple[Any, ...], list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                copy = self._copies.get(parameter)
                step = self.state[parameter]["step"]
                key = (
                    parameter.device,
                    parameter.dtype,
                    parameter.grad.dtype,
                    copy is not None and copy.dtype,
                    id(step),
                )
                found.setdefault(key, []).append(parameter)
        return found.values()

    def _step_batch(self, group: dict[str, Any], batch: Sequence[Tensor], found_inf: Tensor | None) -> None:
        device = batch[0].device
        scale = getattr(self, "grad_scale", None)
        states = [self.state[parameter] for parameter in batch]
        adamw(
            batch,
            [cast(Tensor, parameter.grad).contiguous() for parameter in batch],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            states[0]["step"],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            copies=[self._copies[parameter] for parameter in batch] if batch[0] in self._copies else (),
            maximize=group["maximize"],
            gradient_scale=None if scale is None else scale.to(device),
            found_inf=None if found_inf is None else found_inf.to(device),
        )


class _SharedStep:
    """A step tensor and how many parameters go by it."""

    __slots__ = ("owners", "step")

    def __init__(self, step: Tensor, owners: int) -> None:
        self.step = step
        self.owners = owners


def _learning_rate(lr: float | Tensor, parameter: Tensor) -> tuple[float, Tensor | None]:
    """(number, None), or (0, fp32 scalar on a GPU): a graph that was captured reads it anew each time."""
    if isinstance(lr, Tensor):
        if parameter.is_cuda and lr.is_cuda:
            return 0.0, lr.to(torch.float32)
        return float(lr), None
    return lr, None


def _sample(
    label: str,
    sizes: tuple[tuple[int, ...], ...],
    *,
    t: int = 3,
    copies: torch.dtype | None = None,
    parameter_size: float = 1.0,
    gradient_size: float = 1.0,
    fresh: bool = False,
    tensors: Mapping[str, float] | None = None,
    **changed: Any,
) -> Sample:
    """Parameters of `sizes` at step t; `tensors` are settings that are scalars on the device; dtype is the
    gradients'."""

    def make(device: str, dtype: torch.dtype) -> Call:
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def several(seed: int, kind: torch.dtype, size: float) -> list[Tensor]:
            return [
                random_tensor(*shape, device=device, dtype=kind, seed=seed + number, size=size, leaf=False)
                for number, shape in enumerate(sizes)
            ]

        moment = 0.0 if fresh else 0.1
        settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, **changed}
        if copies is not None:
            settings["copies"] = several(400, copies, 1.0)
        for name, value in (tensors or {}).items():
            settings[name] = torch.tensor(value, dtype=torch.float32, device=device)
        squares = [square.square_() for square in several(300, wide, moment)]
        return Call(
            arguments=(
                several(0, wide, parameter_size), several(100, dtype, gradient_size), several(200, wide, moment),
                squares, torch.tensor(float(t), dtype=torch.float32, device=device),
            ),
            keywords=settings,
        )  # fmt: skip

    return Sample(label=label, make=make, gradients=False)


def _results(call: Call, _: Any) -> tuple[Tensor, ...]:
    parameters, _, first_moments, second_moments, _ = call.arguments
    return (*parameters, *first_moments, *second_moments, *call.keywords.get("copies", ()))


def _case(elements: int, tensors: int, *, half: bool) -> BenchmarkCase:
    """fp32 gradients without copies, or bf16 gradients with bf16 copies: 28 bytes for each parameter both ways."""
    sample = _sample("", ((elements // tensors,),) * tensors, copies=torch.bfloat16 if half else None)

    def bytes_moved(dtype: torch.dtype) -> tuple[int, int]:
        return elements * (24 + dtype.itemsize + (2 if half else 0)), 0

    return BenchmarkCase(
        label=f"{elements // 2**20}M in {tensors} tensors" + (", bf16 gradients and copies" if half else ""),
        make=sample.make,
        bytes_moved=bytes_moved,
        dtype=torch.bfloat16 if half else torch.float32,
    )


_ODD = ((7,), (3, 5), (1,), (0,), (4099,), (64, 130))
_TOLERANCE = Tolerance(
    ulps=1,
    wide=4,
    reason="fp32 throughout, some ten operations for each number; a copy is rounded once more",
)

register(
    Op(
        name="adamw",
        switch="adamw",
        summary="AdamW over many tensors, with rounded copies",
        function=adamw,
        plain=adamw_plain,
        reference=adamw_reference,
        samples=(
            _sample("odd sizes", _ODD),
            _sample("first step", _ODD, t=1, fresh=True),
            # From zero, a parameter shows the whole error of the change.
            _sample("parameters at zero", _ODD, t=1, fresh=True, parameter_size=0.0, weight_decay=0.0),
            _sample("far along", _ODD, t=123_456, parameter_size=0.0),
            _sample("bf16 copies", _ODD, copies=torch.bfloat16),
            _sample("fp16 copies", _ODD, copies=torch.float16, maximize=True),
            _sample("tiny gradients", _ODD, gradient_size=1e-6, eps=1e-15),
            _sample("no gradients", _ODD, gradient_size=0.0, fresh=True),
            _sample("learning rate on the device", _ODD, tensors={"lr": 3e-3}),
            _sample("scaled gradients", _ODD, gradient_size=64.0, tensors={"gradient_scale": 128.0, "found_inf": 0.0}),
            _sample("found infinity", _ODD, copies=torch.bfloat16, tensors={"gradient_scale": 128.0, "found_inf": 1.0}),
        ),
        cases=(
            _case(256 * 2**20, 256, half=False),
            _case(256 * 2**20, 256, half=True),
            _case(256 * 2**20, 4, half=False),
        ),
        tolerance=_TOLERANCE,
        gradient_tolerance=_TOLERANCE,
        plain_tolerance=_TOLERANCE,
        torch_ops=("adamw_",),
        differentiable=False,
        results=_results,
    )
)
