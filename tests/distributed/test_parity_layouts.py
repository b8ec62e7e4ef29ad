"""Every parallel layout gives the losses of the single process, step by step (fp32, CPU, same seed)."""

import pytest

from tests.training_runs import relative_difference

TENSOR = ("--tensor-model-parallel-size", "2")
PIPELINE = ("--pipeline-model-parallel-size", "2")
SEQUENCE = ("--sequence-parallel",)
OPTIMIZER = ("--use-distributed-optimizer",)
VIRTUAL = (*PIPELINE, "--num-layers-per-virtual-pipeline-stage", "1")
RECOMPUTE = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")

LAYOUTS = {
    "tp2": (2, TENSOR),
    "tp2_sp": (2, (*TENSOR, *SEQUENCE)),
    "pp2": (2, PIPELINE),
    "virtual_pp2": (2, VIRTUAL),
    "dp2_distributed_optimizer": (2, OPTIMIZER),
    "recompute": (1, RECOMPUTE),
    "tp2_pp2_sp_distributed_optimizer": (4, (*TENSOR, *PIPELINE, *SEQUENCE, *OPTIMIZER)),
}
SLOW_LAYOUTS = {
    "dp2": (2, ()),
    "tp2_pp2": (4, (*TENSOR, *PIPELINE)),
    "tp2_virtual_pp2_sp": (4, (*TENSOR, *VIRTUAL, *SEQUENCE)),
    "tp2_dp2_sp_distributed_optimizer": (4, (*TENSOR, *SEQUENCE, *OPTIMIZER)),
    "pp2_dp2_recompute": (4, (*PIPELINE, *RECOMPUTE, *OPTIMIZER)),
    "dp2_overlap": (2, (*OPTIMIZER, "--overlap-grad-reduce", "--overlap-param-gather")),
    "tp2_selective_recompute": (2, (*TENSOR, "--recompute-granularity", "selective")),
    "tp2_explicit_masks": (2, (*TENSOR, "--reset-attention-mask", "--reset-position-ids")),
    "cpu_initialization_tp2": (2, (*TENSOR, "--use-cpu-initialization")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_losses_of_one_process(trainer, single, layout):
    processes, flags = LAYOUTS[layout]
    run = trainer.run(processes, *flags, name=layout)
    run.assert_trained(range(1, 21))
    assert relative_difference(single, run) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("layout", SLOW_LAYOUTS)
def test_further_layout_gives_the_losses_of_one_process(trainer, single, layout):
    processes, flags = SLOW_LAYOUTS[layout]
    run = trainer.run(processes, *flags, name=layout)
    run.assert_trained(range(1, 21))
    if layout == "tp2_explicit_masks":
        # Masked document borders are another model input: it has a single process of its own.
        single = trainer.run(1, *flags[len(TENSOR) :], name=f"{layout}_single")
    assert relative_difference(single, run) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gpt2_tiny", "gpt2_pos_every_layer", "rugpt3_13b", "ru_demo", "activation_reglu"])
def test_variant_gives_the_losses_of_one_process_at_tp2_sp_pp2(trainer, variant):
    sizes = ("--ru-variant", variant, "--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4",
             "--max-position-embeddings", "64", "--attention-dropout", "0", "--hidden-dropout", "0")  # fmt: skip
    one = trainer.run(1, *sizes, name=f"{variant}_one", steps=6)
    one.assert_trained(range(1, 7))
    four = trainer.run(4, *sizes, *TENSOR, *SEQUENCE, *PIPELINE, name=f"{variant}_four", steps=6)
    four.assert_trained(range(1, 7))
    assert relative_difference(one, four) < 1e-4
