"""`--ru-recompute auto`: what it refuses, and what it decides, sets and says."""

from argparse import Namespace

import pytest
import torch

from megatron_ru.foundation.errors import UserError
from megatron_ru.plugin import recompute_choice as recompute
from megatron_ru.plugin.arguments import HOST_SPEC
from tests.models.conftest import build_gpt  # noqa: F401

GIB = 2**30


def arguments(**changes):
    settings = {
        "ru_recompute": "auto", "ru_memory_budget": 1.0, "spec": HOST_SPEC, "iteration": 0, "seq_length": 24,
        "micro_batch_size": 2, "global_batch_size": 8, "tensor_model_parallel_size": 1,
        "create_attention_mask_in_dataloader": False,
    }  # fmt: skip
    return Namespace(**settings | changes)


def seams(**changes):
    return recompute.recompute_seams(arguments(**changes), lambda line: None)


def test_off_leaves_the_run_alone():
    assert seams(ru_recompute="off", ru_memory_budget=None) == []
    assert [seam.target for seam in seams()] == ["megatron.training.training:train"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ru_recompute": "off"}, "needs --ru-recompute auto"),
        ({"recompute_granularity": "full", "recompute_num_layers": 1},
         "with --recompute-granularity, --recompute-num-layers, and both say"),
        ({"num_experts": 4}, "with --num-experts, whose layers"),
        ({"engine": "deepspeed"}, "with --engine, whose layers"),
        ({"cuda_graph_impl": "local"}, "with --cuda-graph-impl, whose layers"),
        ({"spec": ["another", "SPEC"]}, "with --spec with other layers"),
        ({"ru_memory_budget": 0.0}, "--ru-memory-budget 0 was given, expected GiB above 0"),
    ],
)  # fmt: skip
def test_what_it_cannot_be_combined_with(changes, message):
    with pytest.raises(UserError, match=message):
        seams(**changes)


def test_harmless_values_of_these_flags_pass():
    assert seams(engine="megatron", cuda_graph_impl="none", fp8=None, cpu_offloading=False, num_experts=None)


def test_a_cpu_needs_a_budget(cpu_device):
    with pytest.raises(UserError, match="on a CPU needs --ru-memory-budget GIB"):
        seams(ru_memory_budget=None)


@pytest.fixture
def decide(build_gpt, one_process, capsys):  # noqa: F811
    """decide(budget in bytes) -> (model, line for the metrics, standard output, standard error)."""
    gpt, _ = build_gpt("llama3_tiny", sizes={"num_layers": 4}, ops="none")

    def choose(budget):
        lines = []
        recompute.choose_recompute(arguments(ru_memory_budget=budget / GIB), [gpt], None, lines.append)
        shown = capsys.readouterr()
        (line,) = lines
        return gpt, line, shown.out, shown.err

    return choose


def test_less_memory_keeps_less(decide):
    _, everything, out, _ = decide(GIB)
    (stage,) = everything["recompute"]
    assert stage["layers"] == {"nothing": 4}
    assert [line.split("  ")[0] for line in out.splitlines()[3:8]] == [
        "nothing", "core_attn", "mlp", "core_attn+mlp", "whole layer",
    ]  # fmt: skip
    assert "recomputed: nothing in 4 of 4 layers" in out
    kept = [stage["activation_bytes"]]
    for share in (0.8, 0.5, 0.25, 0.1):
        budget = int(share * kept[0])
        gpt, line, _, err = decide(budget)
        (stage,) = line["recompute"]
        assert stage["activation_bytes"] <= budget == stage["budget_bytes"]
        assert err == ""
        kept.append(stage["activation_bytes"])
        config = gpt.decoder.config
        assert (config.recompute_num_layers or 0) == stage["layers"].get("whole layer", 0)
        assert any(layer.recompute_mlp for layer in gpt.decoder.layers) == ("mlp" in "".join(stage["layers"]))
    assert kept == sorted(kept, reverse=True)


def test_what_cannot_fit_is_recomputed_whole_with_a_warning(decide):
    gpt, line, out, err = decide(1000)
    states = 4 * 24 * 2 * 32
    (stage,) = line["recompute"]
    assert (stage["layers"], stage["activation_bytes"]) == ({"whole layer": 4}, 4 * states)
    assert "whole layer in 4 of 4 layers" in out
    assert "WARNING: with all recomputed activations take 2.29e-05 GiB, and 9.31e-07 GiB are free" in err
    assert gpt.decoder.config.recompute_method == "block"


def test_it_happens_before_training_begins(monkeypatch):
    import megatron.training

    called = []
    monkeypatch.setattr(megatron.training, "get_args", lambda: "args")
    monkeypatch.setattr(recompute, "choose_recompute", lambda *given: called.append(given))

    def train(forward_step_func, model, optimizer, *others):
        return len(called)

    (seam,) = seams()
    assert seam.make(train)("step", ["model"], "optimizer", "more") == 1
    assert called[0][:3] == ("args", ["model"], "optimizer")


def test_state_that_the_first_step_will_allocate(one_process):
    from megatron_ru.plugin.activation_memory import loss_bytes, optimizer_bytes

    first, second = (torch.nn.Parameter(torch.ones(size)) for size in (10, 6))
    adam = torch.optim.AdamW([first, second])
    wrapped = Namespace(optimizer=adam)
    assert optimizer_bytes(wrapped, 8) == optimizer_bytes(Namespace(chained_optimizers=[wrapped]), 8) == 128
    first.grad = torch.ones(10)
    adam.step()
    assert optimizer_bytes(wrapped, 8) == 48
    args = arguments(padded_vocab_size=100, params_dtype=torch.bfloat16, tensor_model_parallel_size=2)
    from megatron_ru.ops import backend

    before = ",".join(backend.selected()) or "none"
    try:
        backend.select("cross_entropy")
        assert loss_bytes(args) == 2 * 24 * 50 * 4
        backend.select("none")
        assert loss_bytes(args) == 2 * 24 * 50 * 14
    finally:
        backend.select(before)
