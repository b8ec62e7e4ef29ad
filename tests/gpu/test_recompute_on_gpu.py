"""What is recomputed is chosen by the memory of the GPU."""

import json

import pytest

pytestmark = pytest.mark.gpu


def test_free_memory_is_found_and_a_budget_is_kept(trainer):
    plain = trainer.run(1, "--device", "cuda", name="gpu_recompute_off", steps=4)
    plain.assert_trained(range(1, 5))
    for name, words in (("free", ()), ("budget", ("--ru-memory-budget", "0.0005"))):
        run = trainer.run(1, "--device", "cuda", "--ru-recompute", "auto", *words, name=f"gpu_{name}", steps=4)
        run.assert_trained(range(1, 5))
        (stage,) = json.loads(run.metrics.read_text().splitlines()[0])["recompute"]
        if name == "free":
            assert stage["layers"] == {"nothing": 4}
            assert stage["budget_bytes"] > 2**30
        else:
            assert "nothing" not in stage["layers"] or len(stage["layers"]) == 2
        assert all(abs(run.losses[step] - loss) / loss < 1e-3 for step, loss in plain.losses.items())
