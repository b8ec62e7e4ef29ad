"""The peers' loop on a CPU, and the peers themselves against each other."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from megatron_ru.benchmarks.training.loop import MasterAdamW, batches, train
from megatron_ru.benchmarks.training.peer import TRAINING_PEERS, Built
from megatron_ru.benchmarks.training.peers import torch_compile
from megatron_ru.benchmarks.training.task import Task

TASK = Task(variant="llama3_tiny", layers=1, sequence=16, micro_batch=2, steps=6, device="cpu")


def test_step_is_adamw_on_clipped_gradients_in_fp32():
    torch.manual_seed(1)
    model = nn.Linear(8, 4, bias=False).to(torch.bfloat16)
    master = model.weight.detach().float().clone().requires_grad_()
    adamw = torch.optim.AdamW([master], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    ours = MasterAdamW(model, 0.01)
    for _ in range(3):
        gradient = 10 * torch.randn(4, 8)
        model.weight.grad = gradient.to(torch.bfloat16)
        clipped = nn.Parameter(torch.zeros(4, 8, dtype=torch.bfloat16))
        clipped.grad = gradient.to(torch.bfloat16)
        nn.utils.clip_grad_norm_([clipped], 1.0)
        master.grad = clipped.grad.float()
        adamw.step()
        ours.step()
        torch.testing.assert_close(model.weight, master.to(torch.bfloat16), atol=0, rtol=0)


def test_masters_keep_what_bf16_would_lose():
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ours = MasterAdamW(model, 1e-4)
    for _ in range(40):
        model.weight.grad = torch.ones_like(model.weight)
        ours.step()
    # A step of 1e-4 is below half a unit of bf16 at 1; forty of them are not.
    assert model.weight.item() < 1.0


def test_batches_are_the_same_for_the_same_seed():
    first, second = (list(batches(TASK, TASK.shape())) for _ in range(2))
    assert len(first) == TASK.steps
    for (tokens, targets), (again, _) in zip(first, second, strict=True):
        assert torch.equal(tokens, again)
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
        assert tokens.max() < TASK.shape().vocabulary


def test_document_of_a_training():
    torch.manual_seed(2)
    model = torch_compile.Llama(TASK.architecture(), TASK.shape()).to(torch.bfloat16)
    found = train(Built(model=model, loss=model), TASK, TASK.shape())
    assert (found["steps"], found["timed_steps"], found["traced_steps"]) == (6, 1, "4:6")
    # Random tokens: the logarithm of their number.
    assert found["first_loss"] == pytest.approx(6.93, abs=0.1)
    assert found["forward_backward_seconds"] < found["step_seconds"]
    assert {one["cause"] for one in found["causes"]} >= {"GEMM", "attention", "cross entropy", "optimizer"}


def test_the_roof_is_the_products_of_a_step_and_nothing_else():
    found = TRAINING_PEERS["roof"].measure(TASK, TASK.shape())
    assert found["forward_backward_seconds"] > 0
    calls = {kernel["name"]: kernel["calls"] for kernel in found["kernels"]}
    # Four matrices of the layer and the output projection, each once forward and twice backward.
    assert calls["aten::mm"] == 15
    assert sum(count for name, count in calls.items() if name.endswith("attention_for_cpu")) == 1
    assert sum(count for name, count in calls.items() if name.endswith("attention_for_cpu_backward")) == 1
    assert not any("add" in name or "copy" in name for name in calls)


def test_all_peers_are_known_and_say_what_they_lack():
    assert list(TRAINING_PEERS) == ["compile", "hf", "liger", "mcore", "roof", "te"]
    assert TRAINING_PEERS["liger"].missing("cpu")
    assert TRAINING_PEERS["te"].missing("cpu")


def test_the_plain_llama_is_hugging_faces():
    transformers = pytest.importorskip("transformers")
    del transformers
    torch.manual_seed(3)
    variant, shape = TASK.architecture(), TASK.shape()
    theirs = TRAINING_PEERS["hf"].build(variant, shape, "cpu")
    ours = torch_compile.Llama(variant, shape).to(torch.bfloat16)
    layer, other = ours.layers[0], theirs.model.model.layers[0]
    attention, block = other.self_attn, other.mlp
    with torch.no_grad():
        ours.embedding.weight.copy_(theirs.model.model.embed_tokens.weight)
        ours.output.weight.copy_(theirs.model.lm_head.weight)
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        layer.query_key_value.weight.copy_(torch.cat([part.weight for part in parts]))
        layer.attention_output.weight.copy_(attention.o_proj.weight)
        layer.gate_up.weight.copy_(torch.cat((block.gate_proj.weight, block.up_proj.weight)))
        layer.down.weight.copy_(block.down_proj.weight)
    ours, theirs_model = ours.float(), theirs.model.float()
    tokens, targets = next(batches(TASK, shape))
    found, expected = ours(tokens, targets), theirs.loss(tokens, targets)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    expected.backward()
    torch.testing.assert_close(
        layer.down.weight.grad, theirs_model.model.layers[0].mlp.down_proj.weight.grad, rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize(
    "name", ["mcore", pytest.param("compile", marks=pytest.mark.slow), pytest.param("hf", marks=pytest.mark.slow)]
)
def test_a_peer_trains_in_its_process(tmp_path, name):
    output = tmp_path / "out.json"
    module = "megatron_ru.benchmarks.training.peer_process"
    done = subprocess.run([sys.executable, "-m", module, name, json.dumps(TASK.json()), str(output)],
                          capture_output=True, text=True, timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(output.read_text())
    assert found["first_loss"] == pytest.approx(6.93, abs=0.2)
    assert found["tokens_per_second"] > 0
    assert found["parameters"] == 1024 * 128 * 2 + 128 * 3 + 2 * 128**2 + 2 * 128 * 64 + 3 * 128 * 448
