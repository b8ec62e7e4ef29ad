"""Training with the fused ops is training without them, and the vocabulary may be cut among ranks."""

import json
import subprocess

import pytest

from megatron_ru.experiments.corpus import Corpus
from megatron_ru.experiments.demo import DemoSettings, training_words
from tests.compiled_calls import needs_library
from tests.training_runs import clean_environment, relative_difference, torchrun

pytestmark = needs_library

LLAMA = ("--ru-variant", "llama2_tiny")
TENSOR = ("--tensor-model-parallel-size", "2")
STEPS = 5


@pytest.fixture(scope="module")
def without(trainer):
    run = trainer.run(1, *LLAMA, "--ru-ops", "none", name="ops_none", steps=STEPS)
    run.assert_trained(range(1, STEPS + 1))
    return run


@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        (1, ()),
        (1, ("--use-distributed-optimizer", "--cross-entropy-loss-fusion")),
        (2, (*TENSOR, "--sequence-parallel")),
    ],
    ids=["one process", "fused loss and distributed optimizer", "tp2_sp"],
)
def test_losses_with_all_ops_are_those_without(trainer, without, processes, flags):
    name = f"ops_all_{processes}_{len(flags)}"
    run = trainer.run(processes, *LLAMA, *flags, "--ru-ops", "all", name=name, steps=STEPS)
    run.assert_trained(range(1, STEPS + 1))
    assert relative_difference(without, run) < 1e-4
    assert "runs in plain torch" not in run.output, run.output[-3000:]
    # Other arithmetic gives other last digits: the flag does choose something.
    assert run.losses != without.losses


def test_the_demo_s_training_is_the_one_without_ops(trainer):
    """The demo's own arguments at a smaller size: variant, TP=2 x PP=2, learning rate and warmup."""
    settings = DemoSettings(steps=6, micro_batch=2, global_batch=4, warmup=2, evaluate_batches=1)
    corpus = Corpus(prefix=trainer.prefix, tokenizer=trainer.tokenizer, documents=600, tokens=0)
    runs = []
    for ops in ("none", "all"):
        words = training_words(trainer.folder, corpus, settings)
        own = ("--ru-ops", ops, "--ru-metrics", str(trainer.folder / f"demo_{ops}.jsonl"))
        run = trainer.run(4, *words, *own, name=f"demo_{ops}", steps=6)
        run.assert_trained(range(1, 7))
        runs.append(run)
    assert relative_difference(*runs) < 1e-4


LOSSES_OF_A_CUT_VOCABULARY = """
import json, os, sys
import torch
from megatron_ru.seams.cpu_device import CPU_DEVICE
CPU_DEVICE.install()
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.language_module import language_module
from megatron_ru.ops import backend
from megatron_ru.plugin.fused_ops import fused_op_seams

CPU_DEVICE.install_in_megatron()
dist.init_process_group("gloo")
parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
group, rank = parallel_state.get_tensor_model_parallel_group(), dist.get_rank()
sequence, batch, part = 5, 3, 19
whole = torch.randn(sequence, batch, 2 * part, generator=torch.Generator().manual_seed(0)) * 3
labels = torch.arange(sequence * batch).view(sequence, batch) * 7 % (2 * part)
upstream = torch.linspace(-1, 2, sequence * batch).view(sequence, batch)

def run(loss):
    shard = whole[..., rank * part : (rank + 1) * part].clone().requires_grad_()
    losses = loss(shard * 1)
    losses.backward(upstream)
    return losses.detach(), shard.grad

def plain(logits, **keywords):
    return tensor_parallel.vocab_parallel_cross_entropy(logits, labels, tp_group=group, **keywords)

def fused(logits):
    return language_module.fused_vocab_parallel_cross_entropy(logits, labels, group)

def smoothed(logits):
    return plain(logits, label_smoothing=0.1)

theirs = run(plain)
backend.select("cross_entropy")
for seam in fused_op_seams():
    seam.install()
found = {}
for name, loss in (("plain", plain), ("fused", fused)):
    ours = run(loss)
    found[name] = [(a - b).abs().max().item() for a, b in zip(ours, theirs)]
# Megatron spreads the smoothing over this rank's part of the vocabulary; it is meant for the whole of it.
logits = whole.clone().requires_grad_()
smoothing = 0.1 * 2 * part / (2 * part - 1)
losses = torch.nn.functional.cross_entropy(
    logits.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=smoothing
).view(sequence, batch)
losses.backward(upstream)
ours = run(smoothed)
exact = losses.detach(), logits.grad[..., rank * part : (rank + 1) * part]
found["smoothed"] = [(a - b).abs().max().item() for a, b in zip(ours, exact)]
collectives = []
for name in ("all_reduce", "all_gather_into_tensor", "all_gather"):
    def counted(*arguments, original=getattr(dist, name), name=name, **keywords):
        collectives.append(name)
        return original(*arguments, **keywords)
    setattr(dist, name, counted)
run(plain)
found["collectives"] = collectives
# One write, since two ranks share the pipe.
os.write(1, f"FOUND {json.dumps(found)}\\n".encode())
dist.destroy_process_group()
"""


def test_loss_over_a_cut_vocabulary_is_megatron_s(tmp_path):
    script = tmp_path / "losses.py"
    script.write_text(LOSSES_OF_A_CUT_VOCABULARY)
    done = subprocess.run(
        [*torchrun(2), str(script)], env=clean_environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads(line.partition("FOUND ")[2]) for line in done.stdout.splitlines() if "FOUND " in line]
    assert len(ranks) == 2, done.stdout
    for found in ranks:
        # One merged collective where Megatron has three.
        assert len(found.pop("collectives")) == 1
        for name, (loss, gradient) in found.items():
            assert loss < 5e-6, name
            assert gradient < 2e-6, name
