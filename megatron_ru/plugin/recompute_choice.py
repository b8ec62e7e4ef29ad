"""`--ru-recompute auto`: each pipeline stage measures a layer before training, and recomputes what its memory asks."""

import functools
import inspect
import sys
from collections.abc import Callable
from itertools import chain, combinations
from typing import Any

from megatron_ru.foundation.errors import UserError
from megatron_ru.models.recompute_plan import WHOLE, Cost, Plan, choose, cost_table, micro_batches_in_flight
from megatron_ru.plugin.arguments import HOST_SPEC
from megatron_ru.plugin.ranks_together import RanksTogether
from megatron_ru.seams.cpu_device import CPU_DEVICE
from megatron_ru.seams.seam import Seam

_GIB = 2**30


def recompute_seams(args: Any, tell: Callable[[dict[str, Any]], None]) -> list[Seam]:
    """The seam of a run that chooses by itself; `tell` gets `{"iteration", "recompute"}`. Raises `UserError`."""
    if args.ru_recompute == "off":
        if args.ru_memory_budget is not None:
            raise UserError("--ru-memory-budget was given, which needs --ru-recompute auto: add it, or drop the budget")
        return []
    check_recompute(args)
    return [
        Seam(
            target="megatron.training.training:train",
            make=functools.partial(_choosing_first, tell),
            expects=("model", "optimizer"),
            reason="Megatron is told what to recompute before it has a layer to measure",
        )
    ]


def check_recompute(args: Any) -> None:
    """Raises `UserError` for what `--ru-recompute auto` cannot be combined with."""
    flags = ("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules",
             "recompute_activations", "distribute_saved_activations")  # fmt: skip
    own = [f"--{flag.replace('_', '-')}" for flag in flags if getattr(args, flag, None)]
    if own:
        raise UserError(
            f"--ru-recompute auto was given with {', '.join(own)}, and both say what is recomputed: drop one of the two"
        )
    without_value = (None, False, 0, "none", "megatron")
    names = ("engine", "num_experts", "mtp_num_layers", "use_torch_fsdp2", "use_megatron_fsdp", "use_custom_fsdp",
             "cuda_graph_impl", "enable_cuda_graph", "external_cuda_graph", "cpu_offloading",
             "fine_grained_activation_offloading", "overlap_moe_expert_parallel_comm", "fp8", "fp4")  # fmt: skip
    found = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name, None) not in without_value]
    if args.spec != HOST_SPEC:
        found.append("--spec with other layers")
    if found:
        raise UserError(
            f"--ru-recompute auto was given with {', '.join(found)}, whose layers it cannot measure one by one; use "
            "--recompute-granularity"
        )
    if args.ru_memory_budget is None and CPU_DEVICE.installed:
        raise UserError(
            "--ru-recompute auto on a CPU needs --ru-memory-budget GIB, the memory that the activations of a rank may "
            "take: main memory belongs to all ranks and programs of the machine"
        )
    if args.ru_memory_budget is not None and not args.ru_memory_budget > 0:
        raise UserError(f"--ru-memory-budget {args.ru_memory_budget:g} was given, expected GiB above 0")


def _choosing_first(tell: Callable[[dict[str, Any]], None], original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def train(*arguments: Any, **keywords: Any) -> Any:
        from megatron.training import get_args

        given = signature.bind(*arguments, **keywords).arguments
        choose_recompute(get_args(), given["model"], given["optimizer"], tell)
        return original(*arguments, **keywords)

    return train


def choose_recompute(args: Any, model: list[Any], optimizer: Any, tell: Callable[[dict[str, Any]], None]) -> None:
    """Measures, decides with the ranks of this pipeline stage, sets it, and says what was decided."""
    from megatron.core import mpu
    from megatron.core.utils import get_attr_wrapped_model

    from megatron_ru.models.recompute import recompute_layers

    chunks = [get_attr_wrapped_model(chunk, "decoder", return_model_obj=True) for chunk in model]
    stage = mpu.get_pipeline_model_parallel_rank()
    costs: list[Cost] = []
    plan = None
    layers = max(len(chunk.decoder.layers) for chunk in chunks)
    if layers:
        costs, free = _agreed(*_measured(args, next(c for c in chunks if len(c.decoder.layers)), optimizer))
        in_flight = micro_batches_in_flight(
            stage=stage,
            stages=mpu.get_pipeline_model_parallel_world_size(),
            micro_batches=args.global_batch_size // (args.micro_batch_size * mpu.get_data_parallel_world_size()),
            chunks=len(chunks),
            group=getattr(chunks[0].config, "microbatch_group_size_per_vp_stage", None),
        )
        plan = choose(costs, layers, in_flight, free)
        for chunk in chunks:
            recompute_layers(chunk.decoder, plan.ways)
    stages = dict(RanksTogether().all((stage, plan)))
    plans = {stage: plan for stage, plan in sorted(stages.items()) if plan is not None}
    _say(costs, plans)
    tell({"iteration": args.iteration, "recompute": [{"stage": s, **plan.document()} for s, plan in plans.items()]})


def _measured(args: Any, chunk: Any, optimizer: Any) -> tuple[list[Cost], int]:
    """Costs of the first layer's ways, and bytes for activations, as this rank sees them."""
    import torch

    from megatron_ru.models.recompute import recomputable
    from megatron_ru.plugin.activation_memory import free_for_activations
    from megatron_ru.plugin.layer_cost import layer_costs

    layer, config = chunk.decoder.layers[0], chunk.config
    device = "cpu" if CPU_DEVICE.installed else "cuda"
    length = args.seq_length // (args.tensor_model_parallel_size if config.sequence_parallel else 1)
    dtype = torch.float32 if config.fp32_residual_connection else config.params_dtype
    hidden = torch.empty(length, args.micro_batch_size, config.hidden_size, dtype=dtype, device="cuda")
    shared = _shared_inputs(args, chunk)
    parts = recomputable(layer)
    ways = [*chain.from_iterable(combinations(parts, count) for count in range(len(parts) + 1)), WHOLE]
    costs, beyond = layer_costs(
        layer,
        lambda hidden: layer(hidden, **shared)[0],
        hidden,
        ways=ways,
        device=device,
        slowest=lambda seconds: _largest([seconds])[0],
    )
    if args.ru_memory_budget is not None:
        return costs, int(args.ru_memory_budget * _GIB)
    computes_loss = bool(getattr(chunk, "post_process", False))
    return costs, sum(free_for_activations(args, optimizer, beyond=beyond, computes_loss=computes_loss).values())


def _shared_inputs(args: Any, chunk: Any) -> dict[str, Any]:
    """What Megatron's block hands to each of its layers beside the hidden states."""
    import torch

    mask = angles = None
    if args.create_attention_mask_in_dataloader:
        later = torch.ones(args.seq_length, args.seq_length, dtype=torch.bool, device="cuda").triu(1)
        mask = later.repeat(args.micro_batch_size, 1, 1, 1)
    if chunk.position_embedding_type in ("rope", "yarn") and not chunk.config.multi_latent_attention:
        angles = chunk.rotary_pos_emb(args.seq_length)
        # With YaRN a factor comes along.
        angles = angles[0] if isinstance(angles, tuple) else angles
    return {"attention_mask": mask, "rotary_pos_emb": angles}


def _agreed(costs: list[Cost], free: int) -> tuple[list[Cost], int]:
    """The largest costs and the least memory among the ranks that train the same layers: all of them decide alike."""
    most = _largest([-float(free), *(float(cost.kept) for cost in costs), *(cost.seconds for cost in costs)])
    kept, seconds = most[1 : len(costs) + 1], most[len(costs) + 1 :]
    return [
        Cost(way=cost.way, kept=int(size), seconds=time) for cost, size, time in zip(costs, kept, seconds, strict=True)
    ], -int(most[0])


def _largest(numbers: list[float]) -> list[float]:
    """Each number's largest value over the tensor- and data-parallel ranks of this pipeline stage."""
    import torch
    from megatron.core import mpu

    found = torch.tensor(numbers, dtype=torch.float64, device="cuda")
    group = mpu.get_tensor_and_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX, group=group)
    return found.tolist()


def _say(costs: list[Cost], plans: dict[int, Plan]) -> None:
    if RanksTogether().rank:
        return
    if costs:
        print(f"megatron_ru: recomputation, measured on a layer with one micro-batch:\n{cost_table(costs)}", flush=True)
    for stage, plan in plans.items():
        where = f" on pipeline stage {stage}" if len(plans) > 1 else ""
        print(f"megatron_ru: recomputed{where}: {plan.sentence}", flush=True)
        if not plan.fits:
            print(
                f"megatron_ru: WARNING: with all{where} recomputed activations take {plan.kept / _GIB:.3g} GiB, and "
                f"{plan.budget / _GIB:.3g} GiB are free for them: memory may run out; use a smaller --micro-batch-size "
                "or more --tensor-model-parallel-size",
                file=sys.stderr,
                flush=True,
            )
