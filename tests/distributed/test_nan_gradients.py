"""A NaN in one tensor of one rank, on four ranks: what the others see of it, and what the counters say."""

import json
from pathlib import Path
from random import Random

import pytest
import torch

from tests.training_runs import Trainer, torchrun

SCRIPT = str(Path(__file__).with_name("planted_nan.py"))
POISONED = "layers.1.mlp.linear_fc2.weight"
REPLICATED = "layers.0.input_layernorm.weight"
OPTIMIZER = ("--use-distributed-optimizer",)
OVERLAP = ("--overlap-grad-reduce",)


def planted(trainer: Trainer, name, *words, plants=(), dump_step=1, steps=2, ranks=4):
    folder = trainer.folder / name
    folder.mkdir()
    environment = {"PLANT": json.dumps(list(plants)), "DUMP": str(folder), "DUMP_STEP": str(dump_step)}
    run = trainer.run(
        ranks, *words, name=name, steps=steps, command=[*torchrun(ranks), SCRIPT], environment=environment
    )
    assert run.returncode == 0, run.output[-4000:]
    return run, folder


def parts(folder, when, ranks=4):
    return [torch.load(folder / f"{when}.{rank}.pt") for rank in range(ranks)]


def lines(run):
    """What was written of each step."""
    found = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [line for line in found if "lm loss" in line]


def expected_mean(befores, name, without=(), divisor=None):
    whole = [torch.zeros_like(before[name]) if rank in without else before[name] for rank, before in enumerate(befores)]
    return torch.stack(whole).double().sum(0) / (divisor or len(befores))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("plain", ()),
        ("overlap", (*OPTIMIZER, *OVERLAP)),
        pytest.param("distributed", OPTIMIZER, marks=pytest.mark.slow),
        pytest.param("bf16", ("--bf16", *OPTIMIZER, *OVERLAP), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("policy", ["zero", pytest.param("rescale", marks=pytest.mark.slow)])
def test_the_reduced_gradient_is_the_mean_without_that_tensor(trainer, name, words, policy):
    # With overlap the first step reduces at its end; the second one inside the backward.
    step = 2 if OVERLAP[0] in words else 1
    clean, clean_folder = planted(trainer, f"{name}-{policy}-clean", *words, dump_step=step)
    run, folder = planted(
        trainer, f"{name}-{policy}", *words, "--ru-nan-grads", policy, dump_step=step,
        plants=[[2, step, POISONED, "nan"]],
    )  # fmt: skip
    befores, unguarded = parts(clean_folder, "before"), parts(clean_folder, "after")
    touched = 0
    for rank, after in enumerate(parts(folder, "after")):
        assert after.keys() == unguarded[rank].keys()
        for parameter, (start, end, found) in after.items():
            if POISONED not in parameter:
                assert torch.equal(found, unguarded[rank][parameter][2]), (rank, parameter)
                continue
            touched += 1
            mean = expected_mean(befores, parameter, without=(2,), divisor=4 if policy == "zero" else 3)[start:end]
            # Megatron divides before it adds.
            torch.testing.assert_close(found.double(), mean, rtol=1e-5, atol=1e-9)
            assert found.isfinite().all()
            assert found.any()
    assert touched >= (4 if name == "plain" else 1)
    assert [line.get("nan_gradients", 0) for line in lines(run)] == [int(s == step) for s in (1, 2)]
    assert [line.get("nan_ranks", 0) for line in lines(run)] == [int(s == step) for s in (1, 2)]
    assert all("nan_gradients" not in line for line in lines(clean))


@pytest.mark.parametrize("words", [(), pytest.param(OPTIMIZER, marks=pytest.mark.slow)], ids=["plain", "distributed"])
def test_replicas_of_a_parameter_agree(trainer, words):
    """DP=2 x TP=2: an infinity in a norm's gradient on one tensor-parallel rank; the other one has none."""
    layout = ("--tensor-model-parallel-size", "2", *words)
    name = f"tp-{len(words)}"
    _, clean_folder = planted(trainer, f"{name}-clean", *layout)
    run, folder = planted(
        trainer, name, *layout, "--ru-nan-grads", "zero", "--ru-nan-names", plants=[[1, 1, REPLICATED, "inf"]]
    )
    befores = parts(clean_folder, "before")
    # Ranks 0 and 1 are one model, 2 and 3 the other.
    for rank, after in enumerate(parts(folder, "after")):
        for parameter, (start, end, found) in after.items():
            if REPLICATED in parameter:
                mean = (befores[rank % 2 + 2][parameter].double() / 2)[start:end]
                torch.testing.assert_close(found.double(), mean, rtol=1e-5, atol=1e-9)
    assert lines(run)[0]["nan_gradients"] == 2
    assert lines(run)[0]["nan_ranks"] == 2
    assert "nan_gradients" not in lines(run)[1]
    assert REPLICATED in run.output
    assert "a NaN or an infinity in the gradients of" in run.output


def test_a_step_is_skipped_by_all(trainer):
    run, _ = planted(
        trainer, "skip", "--ru-nan-grads", "skip", ranks=2, steps=3, plants=[[1, 2, POISONED, "-inf"]], dump_step=9
    )
    assert [line["skipped"] for line in lines(run)] == [0, 1, 0]
    assert lines(run)[1]["nan_gradients"] == 1


def test_an_error_says_where(trainer):
    environment = {"PLANT": json.dumps([[1, 2, POISONED, "nan"]])}
    run = trainer.run(
        2, "--ru-nan-grads", "error", name="error", steps=3, command=[*torchrun(2), SCRIPT], environment=environment
    )
    assert run.returncode != 0
    assert f"rank 1: a gradient holds a NaN or an infinity: the gradients of module.decoder.{POISONED}" in run.output
    assert "rank 0: a gradient holds a NaN or an infinity: another rank says where" in run.output
    assert "nan_gradients.py" not in run.output


def test_names_alone_are_refused(trainer):
    run = trainer.run(1, "--ru-nan-names", name="names", steps=1)
    assert run.returncode == 2
    assert "--ru-nan-names has no meaning without --ru-nan-grads" in run.output


@pytest.mark.slow
def test_training_goes_on_through_nans(trainer):
    """NaNs in 25% of the steps, each in one to four tensors of one rank of four: `zero` ends like the
    clean run, `skip` has made fewer steps."""
    steps, random = 60, Random(5)
    poisoned = random.sample(range(2, steps + 1), steps // 4)
    parts = ("linear_qkv.weight", "linear_fc1.weight", "linear_fc2.weight", "word_embeddings.weight", "input_layernorm")
    plants = [[random.randrange(4), step, random.choice(parts), "nan"] for step in poisoned]
    schedule = ("--lr-decay-iters", str(steps), "--use-distributed-optimizer")
    clean, _ = planted(trainer, "clean-60", *schedule, steps=steps, dump_step=999)
    ends = {}
    for policy in ("zero", "skip"):
        run, _ = planted(
            trainer, f"{policy}-60", *schedule, "--ru-nan-grads", policy, plants=plants, steps=steps, dump_step=999
        )
        assert sum("nan_gradients" in line for line in lines(run)) == len(poisoned)
        assert sum(line["skipped"] for line in lines(run)) == (len(poisoned) if policy == "skip" else 0)
        ends[policy] = _end(run)
    assert abs(ends["zero"] - _end(clean)) < 0.05 * _end(clean)
    assert abs(ends["zero"] - _end(clean)) < abs(ends["skip"] - _end(clean))


def _end(run):
    """The mean loss of the last ten steps: single steps see other text."""
    return sum(list(run.losses.values())[-10:]) / 10
