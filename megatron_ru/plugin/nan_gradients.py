"""What becomes of a NaN in a gradient, before the data-parallel reduction hands it to all ranks (`--ru-nan-grads`)."""

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ru.foundation.errors import UserError
from megatron_ru.ops.gradient_guard import zero_nonfinite
from megatron_ru.seams.seam import Seam

_REASON = "Megatron stops at a NaN, or spreads it, and has no door between a gradient and its reduction"


class NanFoundError(UserError):
    """The run ends by a NaN: nothing is wrong with its input."""

    exit_code = 1


@dataclass(frozen=True)
class Reduced:
    """The gradients that one reduction carries, as this rank holds them before it."""

    parameters: Sequence[Any]
    gradients: Sequence[Tensor]
    """What is read, and becomes zero: of each parameter, flat or in its shape."""
    replicated: Sequence[int]
    """Places of the parameters that every tensor-parallel rank holds whole; empty without tensor parallelism."""
    replicated_there: Tensor | None
    """The same as int64 on the gradients' device, so that nobody waits for it; None where it is empty."""
    tensor_group: Any
    """The tensor-parallel ranks, None without."""
    data_groups: Sequence[Any]
    """The groups over which the reduction goes, one after the other."""


def guard(reduced: Reduced, rescales: bool) -> Tensor:
    """int32 [parameters]: 1 where the gradient held a NaN or an infinity, here or in a replica of the parameter on
    another tensor-parallel rank, and has become zero.

    The divisor of the mean stays, unless `rescales`: then what is left is multiplied with ranks / ranks that
    contribute. The host waits for nothing.
    """
    flags = zero_nonfinite(reduced.gradients)
    if reduced.replicated_there is not None:
        # Replicas that took different steps would never agree again.
        shared = flags[reduced.replicated_there]
        torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX, group=reduced.tensor_group)
        flags[reduced.replicated_there] = shared
        # What is here is finite by now, so a factor of zero is enough.
        _multiply([reduced.gradients[i] for i in reduced.replicated], 1 - shared)
    if rescales:
        missing, ranks = flags.clone(), 1
        for group in reduced.data_groups:
            torch.distributed.all_reduce(missing, group=group)
            ranks *= torch.distributed.get_world_size(group)
        _multiply(reduced.gradients, ranks / (ranks - missing).clamp_(min=1))
    return flags


@torch.no_grad()
def _multiply(tensors: Sequence[Tensor], factors: Tensor) -> None:
    """Each tensor by its factor, on the device; a factor of 1 leaves every bit."""
    for tensor, factor in zip(tensors, factors.to(torch.float32).unbind(), strict=True):
        tensor.mul_(factor)


_current: "NanGradients | None" = None


def current_nan_gradients() -> "NanGradients | None":
    """What the run does with NaNs, None where that is left to Megatron."""
    return _current


def nan_gradient_seams(args: Any) -> "tuple[NanGradients | None, list[Seam]]":
    """What `--ru-nan-grads` asks for, and its seams; nothing without the flag. Megatron's own checks are turned off,
    since they end the run. Raises `UserError` where the gradients cannot be guarded."""
    global _current
    _current = None
    if args.ru_nan_grads is None:
        if args.ru_nan_names:
            raise UserError("--ru-nan-names has no meaning without --ru-nan-grads: give both, or neither")
        return None, []
    check_nan_policy(args)
    args.check_for_nan_in_loss_and_grad = False
    _current = NanGradients(args.ru_nan_grads, args.log_interval, args.ru_nan_names)
    return _current, _current.seams()


class NanGradients:
    """The policy of a run: `zero`, `rescale`, `skip` (no rank makes the step) or `error` (the run ends and says where).

    Counts stay on the device until a step is logged.
    """

    def __init__(self, policy: str, log_interval: int, with_names: bool = False):
        self._policy = policy
        self._log_interval = log_interval
        self._with_names = with_names
        self._names: dict[Any, str] = {}
        # Of this step: flags of each reduction, and the parameters that they are of.
        self._found: list[tuple[Tensor, Sequence[Any]]] = []
        self._losses: list[Tensor] = []
        # Of the steps since the last line of the log: [tensors, whether there were any, losses] each.
        self._steps: list[Tensor] = []
        self._report: dict[str, int] = {}

    def seams(self) -> list[Seam]:
        """The seams on the reduction, on the optimizer and on the log."""
        return [
            Seam(
                target="megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup.start_grad_sync",
                make=self._before_reduction,
                reason=_REASON,
            ),
            Seam(
                target="megatron.training.training:get_megatron_optimizer",
                make=self._around_optimizer,
                reason=_REASON,
            ),
            Seam(
                target="megatron.training.training:training_log",
                make=self._before_log,
                expects=("loss_dict", "iteration"),
                reason="Megatron's log has no line for these counts",
            ),
        ]

    def report(self) -> dict[str, int]:
        """Since the line before in the log, over all ranks: gradient tensors that held a NaN or an infinity, ranks that
        had any, counted again in each step, and losses that were none; empty when there was nothing."""
        return self._report

    def before_reduction(self, reduced: Reduced) -> None:
        """Guards what one reduction carries, and remembers what it found until the step ends."""
        self._found.append((guard(reduced, self._policy == "rescale"), reduced.parameters))

    def finite_loss(self, total: Tensor, tokens: Tensor) -> Tensor:
        """[2]: the sum of a micro-batch's losses and the number of its tokens, for the log; zeros where it is none."""
        finite = total.detach().isfinite()
        self._losses.append(~finite)
        report = torch.stack((total.detach(), tokens.to(total.dtype)))
        return torch.where(finite, report, torch.zeros_like(report))

    def _before_reduction(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def start_grad_sync(group: Any, *arguments: Any, **keywords: Any) -> Any:
            # In the first batch the reduction may be asked for twice, and happens once.
            if not (group.is_first_batch and group.grad_reduce_handle is not None):
                reduced = getattr(group, "_ru_reduced", None)
                if reduced is None:
                    reduced = group._ru_reduced = _reduced_by(group)
                if reduced.gradients:
                    self.before_reduction(reduced)
            return original(group, *arguments, **keywords)

        return start_grad_sync

    def _around_optimizer(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def get_megatron_optimizer(config: Any, model_chunks: Any, *arguments: Any, **keywords: Any) -> Any:
            self._names = {parameter: name for chunk in model_chunks for name, parameter in chunk.named_parameters()}
            optimizer = original(config, model_chunks, *arguments, **keywords)
            step = optimizer.step

            def guarded_step(*arguments: Any, **keywords: Any) -> Any:
                anything = self._end_of_reductions()
                if self._policy == "error":
                    self._refuse(anything)
                self._found.clear()
                if self._policy == "skip" and _anywhere(anything):
                    _tell_scalers(optimizer)
                    return False, None, None
                result = step(*arguments, **keywords)
                if getattr(config, "fp16", False) and self._policy != "skip" and _anywhere(anything):
                    # The scaler saw finite numbers; without this it would never come down from an overflow.
                    _tell_scalers(optimizer)
                return result

            optimizer.step = guarded_step
            return optimizer

        return get_megatron_optimizer

    def _before_log(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def training_log(*arguments: Any, **keywords: Any) -> Any:
            iteration = signature.bind(*arguments, **keywords).arguments["iteration"]
            if iteration % self._log_interval == 0:
                self._sum_up(iteration)
            return original(*arguments, **keywords)

        return training_log

    def _end_of_reductions(self) -> Tensor:
        """int32 []: how many tensors of this rank held something in this step."""
        flags = [flags for flags, _ in self._found] or [torch.zeros(0, dtype=torch.int32, device=_device())]
        tensors = torch.cat(flags).sum(dtype=torch.int32)
        if self._with_names and tensors.item():
            print(
                f"megatron_ru: a NaN or an infinity in the gradients of {self._places()}", file=sys.stderr, flush=True
            )
        losses = torch.stack(self._losses).sum(dtype=torch.int32) if self._losses else torch.zeros_like(tensors)
        self._steps.append(torch.stack((tensors, (tensors > 0).to(torch.int32), losses.to(tensors.device))))
        self._losses.clear()
        return tensors

    def _places(self) -> str:
        names = [
            self._names.get(parameter, "an unnamed parameter")
            for flags, parameters in self._found
            for flag, parameter in zip(flags.tolist(), parameters, strict=True)
            if flag
        ]
        shown = ", ".join(names[:8])
        return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"

    def _refuse(self, anything: Tensor) -> None:
        """Raises `NanFoundError` on every rank when one of them holds a NaN; those that hold it say where."""
        if _anywhere(anything):
            here = f"the gradients of {self._places()} hold one on this rank"
            where = here if anything.item() else "another rank says where"
            raise NanFoundError(
                f"a gradient holds a NaN or an infinity: {where}; --ru-nan-grads zero would go on without these tensors"
            )

    def _sum_up(self, iteration: int) -> None:
        if not self._steps:
            return
        totals = torch.stack(self._steps).sum(dim=0)
        self._steps.clear()
        torch.distributed.all_reduce(totals)
        tensors, ranks, losses = totals.tolist()
        self._report = {"nan_gradients": tensors, "nan_ranks": ranks, "nan_losses": losses} if tensors + losses else {}
        if not self._report:
            return
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            done = {"zero": "became zero", "rescale": "were left out of the mean", "skip": "cost the step"}
            print(
                f" [megatron_ru] step {iteration}: {tensors} gradient tensors of {ranks} ranks held a NaN or an "
                f"infinity and {done.get(self._policy, 'ended the run')}; losses that were none: {losses}",
                flush=True,
            )
        from megatron.training import get_tensorboard_writer

        writer = get_tensorboard_writer()
        if writer is not None:
            for name, value in self._report.items():
                writer.add_scalar(f"ru/{name}", value, iteration)


def check_nan_policy(args: Any) -> None:
    """Raises `UserError` where gradients travel another way than the one that is guarded."""
    for flag in ("use_megatron_fsdp", "use_torch_fsdp2"):
        if getattr(args, flag, False):
            raise UserError(
                f"--ru-nan-grads guards Megatron's gradient buckets, which --{flag.replace('_', '-')} does not have: "
                "leave one of the two out"
            )


def reduction(parameters: Sequence[Any], gradients: Sequence[Tensor], data_groups: Sequence[Any]) -> Reduced:
    """What a reduction over these groups carries. `gradients` is not empty."""
    from megatron.core import mpu

    # Experts are spread over groups of their own, and have no replicas among the tensor-parallel ranks.
    replicated = [
        place
        for place, parameter in enumerate(parameters)
        if not getattr(parameter, "tensor_model_parallel", False) and getattr(parameter, "allreduce", True)
    ]
    spread = mpu.get_tensor_model_parallel_world_size() > 1 and bool(replicated)
    return Reduced(
        parameters=parameters,
        gradients=gradients,
        replicated=replicated if spread else (),
        replicated_there=torch.tensor(replicated, device=gradients[0].device) if spread else None,
        tensor_group=mpu.get_tensor_model_parallel_group() if spread else None,
        data_groups=data_groups,
    )


def _reduced_by(group: Any) -> Reduced:
    parameters, gradients = [], []
    for bucket in group.buckets:
        apart = {id(parameter) for parameter in getattr(bucket, "params_with_extra_main_grads", ())}
        for parameter in bucket.params_list:
            start, end = bucket.param_to_index[parameter]
            gradients.append(parameter.main_grad if id(parameter) in apart else bucket.grad_data[start:end])
            parameters.append(parameter)
    config = group.ddp_config
    if config.use_distributed_optimizer:
        data_groups = [group.intra_distributed_optimizer_instance_group]
        if config.num_distributed_optimizer_instances > 1:
            data_groups.append(group.inter_distributed_optimizer_instance_group)
    else:
        data_groups = [group.data_parallel_group]
    return reduction(parameters, gradients, data_groups)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _anywhere(anything: Tensor) -> bool:
    """Whether the count is above zero on any rank; the host waits for the answer."""
    anything = anything.clone()
    torch.distributed.all_reduce(anything, op=torch.distributed.ReduceOp.MAX)
    return bool(anything.item())


def _tell_scalers(optimizer: Any) -> None:
    scalers = {}
    for part in getattr(optimizer, "chained_optimizers", None) or [optimizer]:
        scaler = getattr(part, "grad_scaler", None)
        if scaler is not None:
            scalers[id(scaler)] = scaler
    for scaler in scalers.values():
        scaler.update(True)
