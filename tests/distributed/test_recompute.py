"""Ranks that divide layers decide alike, stages by themselves, and no loss changes."""

import json

import pytest

# The op that sums the residual and the next norm does so in one where layers are not recomputed whole.
SAME_SUMS = ("--ru-ops", "rope,activation,cross_entropy,adamw,embedding")
LAYOUTS = {
    "tp2_sp": (("--tensor-model-parallel-size", "2", "--sequence-parallel"), 0.001),
    "pp2": (("--pipeline-model-parallel-size", "2"), 0.0015),
    "virtual_pp2": (("--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"), 0.0015),
    "dp2_overlap": (("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"), 0.0015),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_have_the_bits_of_no_recomputation(trainer, layout):
    flags, budget = LAYOUTS[layout]
    plain = trainer.run(2, *flags, *SAME_SUMS, name=f"{layout}_kept", steps=5)
    plain.assert_trained(range(1, 6))
    auto = ("--ru-recompute", "auto", "--ru-memory-budget", str(budget))
    run = trainer.run(2, *flags, *SAME_SUMS, *auto, name=f"{layout}_recomputed", steps=5)
    run.assert_trained(range(1, 6))
    assert run.losses == plain.losses
    stages = json.loads(run.metrics.read_text().splitlines()[0])["recompute"]
    assert [stage["stage"] for stage in stages] == ([0, 1] if "pp2" in layout else [0])
    assert all(stage["activation_bytes"] <= stage["budget_bytes"] for stage in stages)
    assert set(stages[0]["layers"]) - {"nothing"}, "nothing was recomputed, which proves nothing"
    assert run.output.count("computed again  MiB a layer") == 1
