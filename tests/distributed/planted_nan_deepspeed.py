"""As planted_nan.py, for --engine deepspeed: what each rank hands to the reduction, and the reduced whole.

PLANT='[[rank, step, "part of a parameter name", value], ...]' DUMP=FOLDER DUMP_STEP=S python FILE WORDS
"""

import json
import os
import sys
from itertools import chain
from pathlib import Path

import torch

from megatron_ru.engines.megatron_core import main
from megatron_ru.plugin import run
from megatron_ru.seams.seam import Seam

PLANTS = json.loads(os.environ.get("PLANT", "[]"))
DUMP, DUMP_STEP = os.environ.get("DUMP"), int(os.environ.get("DUMP_STEP", "1"))
STAGE_3 = "DeepSpeedZeroOptimizer_Stage3"
names, before = {}, {}


def step_now():
    from megatron.training import get_args

    return get_args().curr_iteration + 1


def plant(parameters, gradients):
    rank, step = torch.distributed.get_rank(), step_now()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        name = names[parameter]
        for plant_rank, plant_step, part, value in PLANTS:
            if (plant_rank, plant_step) == (rank, step) and part in name:
                gradient.view(-1)[gradient.numel() // 2] = float(value)
        if DUMP and step == DUMP_STEP:
            before[name] = gradient.detach().clone().flatten()


def planting_whole(original):
    def buffered_allreduce_fallback(engine, *arguments, **keywords):
        optimizer = engine.optimizer
        if hasattr(optimizer, "fp32_groups_gradients"):
            plant([*chain(*optimizer.bf16_groups)], [*chain(*optimizer.fp32_groups_gradients)])
        else:
            parameters = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
            plant(parameters, [parameter.grad for parameter in parameters])
        return original(engine, *arguments, **keywords)

    return buffered_allreduce_fallback


def planting_in_a_bucket(original):
    def reduce_ipg_grads(optimizer, comm_dtype=None):
        for bucket in optimizer.ipg_buckets.values():
            plant([optimizer.bit16_groups[group][place] for group, place, _ in bucket.params], bucket.grads)
        return original(optimizer, comm_dtype)

    return reduce_ipg_grads


def planting_in_shards(original):
    def reduce_and_partition(optimizer, communication_data_type):
        parameters = optimizer.ipg_buckets[communication_data_type].params
        plant(parameters, [parameter.grad for parameter in parameters])
        return original(optimizer, communication_data_type)

    return reduce_and_partition


def watching(original):
    def get_megatron_optimizer(config, chunks, *arguments, **keywords):
        names.update({parameter: name for chunk in chunks for name, parameter in chunk.named_parameters()})
        optimizer = original(config, chunks, *arguments, **keywords)
        step = optimizer.step

        def watched_step(*arguments, **keywords):
            if DUMP and step_now() == DUMP_STEP:
                from deepspeed.utils import safe_get_full_grad

                rank = torch.distributed.get_rank()
                after = {name: safe_get_full_grad(parameter).clone().flatten() for parameter, name in names.items()}
                torch.save(before, Path(DUMP) / f"before.{rank}.pt")
                torch.save(after, Path(DUMP) / f"after.{rank}.pt")
            return step(*arguments, **keywords)

        optimizer.step = watched_step
        return optimizer

    return get_megatron_optimizer


seams = run.run_seams


def seams_with_mine(*arguments):
    places = {
        "deepspeed.runtime.engine:DeepSpeedEngine.buffered_allreduce_fallback": planting_whole,
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.reduce_ipg_grads": planting_in_a_bucket,
        f"deepspeed.runtime.zero.stage3:{STAGE_3}._{STAGE_3}__reduce_and_partition_ipg_grads": planting_in_shards,
        "megatron.training.training:get_megatron_optimizer": watching,
    }
    return [*seams(*arguments), *(Seam(target=target, make=make, reason="a test") for target, make in places.items())]


run.run_seams = seams_with_mine
if __name__ == "__main__":
    sys.exit(main())
