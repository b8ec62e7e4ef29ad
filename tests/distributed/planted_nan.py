"""pretrain_gpt with a NaN planted in a gradient; what is reduced is written down. Run by test_nan_gradients.py:

    PLANT='[[rank, step, "part of a parameter name", value], ...]' DUMP=FOLDER DUMP_STEP=S python planted_nan.py WORDS

Before the reduction of step S each rank writes its gradients (before.RANK.pt), and after it those that it then holds
(after.RANK.pt), by parameter name: [start, end, numbers] where the reduction leaves a rank a part.
"""

import json
import os
import sys
from pathlib import Path

import torch

from megatron_ru.engines.megatron_core import main
from megatron_ru.plugin import run
from megatron_ru.seams.seam import Seam

PLANTS = json.loads(os.environ.get("PLANT", "[]"))
DUMP, DUMP_STEP = os.environ.get("DUMP"), int(os.environ.get("DUMP_STEP", "1"))
names, groups, before = {}, [], {}


def step_now():
    from megatron.training import get_args

    return get_args().curr_iteration + 1


def gradients_of(group):
    for bucket in group.buckets:
        for parameter in bucket.params_list:
            start, end = bucket.param_to_index[parameter]
            yield names[parameter], bucket, start, end


def planting(original):
    def start_grad_sync(group, *arguments, **keywords):
        rank, step = torch.distributed.get_rank(), step_now()
        for name, bucket, start, end in gradients_of(group):
            for plant_rank, plant_step, part, value in PLANTS:
                if (plant_rank, plant_step) == (rank, step) and part in name:
                    bucket.grad_data[(start + end) // 2] = float(value)
            if DUMP and step == DUMP_STEP:
                before[name] = bucket.grad_data[start:end].clone()
        groups.append(group)
        return original(group, *arguments, **keywords)

    return start_grad_sync


def held_after(group):
    """What the reduction leaves in the hands of this rank."""
    config = group.ddp_config
    for name, bucket, start, end in gradients_of(group):
        if config.use_distributed_optimizer:
            size = bucket.grad_data.numel() // group.intra_distributed_optimizer_instance_size
            first = size * group.intra_distributed_optimizer_instance_rank
            low, high = max(start, first), min(end, first + size)
            if low < high:
                yield name, (low - start, high - start, bucket.grad_data[low:high].clone())
        else:
            yield name, (0, end - start, bucket.grad_data[start:end].clone())


def watching(original):
    def get_megatron_optimizer(config, chunks, *arguments, **keywords):
        names.update({parameter: name for chunk in chunks for name, parameter in chunk.named_parameters()})
        optimizer = original(config, chunks, *arguments, **keywords)
        step = optimizer.step

        def watched_step(*arguments, **keywords):
            if DUMP and step_now() == DUMP_STEP:
                rank = torch.distributed.get_rank()
                after = {name: held for group in dict.fromkeys(groups) for name, held in held_after(group)}
                torch.save(before, Path(DUMP) / f"before.{rank}.pt")
                torch.save(after, Path(DUMP) / f"after.{rank}.pt")
            groups.clear()
            return step(*arguments, **keywords)

        optimizer.step = watched_step
        return optimizer

    return get_megatron_optimizer


seams = run.run_seams


def seams_with_mine(*arguments):
    reason = "a test"
    return [
        *seams(*arguments),
        Seam(
            target="megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup.start_grad_sync",
            make=planting, reason=reason,
        ),
        Seam(target="megatron.training.training:get_megatron_optimizer", make=watching, reason=reason),
    ]  # fmt: skip


run.run_seams = seams_with_mine
if __name__ == "__main__":
    sys.exit(main())
