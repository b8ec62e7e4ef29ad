"""--engine deepspeed on several ranks: losses, checkpoints and NaNs as with Megatron's own engine (fp32, CPU)."""

import json
from pathlib import Path

import pytest
import torch

from tests.training_runs import relative_difference, torchrun

SCRIPT = str(Path(__file__).with_name("planted_nan_deepspeed.py"))
MEMORY = str(Path(__file__).with_name("building_memory.py"))
POISONED = "layers.1.mlp.linear_fc2.weight"
REPLICATED = "layers.0.input_layernorm.weight"
DEEPSPEED = ("--engine", "deepspeed")
TENSOR = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
RESHARDABLE = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
HALF = ("--save-interval", "10", "--exit-interval", "10")
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def zero(trainer):
    """The flags of a stage; in stage 3 no weight is so small that every rank keeps it, and buckets are many."""
    config = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 20_000}
    file = trainer.folder / "zero3.json"
    file.write_text(json.dumps({"zero_optimization": config, "bf16": {"enabled": "auto"}}))

    def flags(stage):
        return (*DEEPSPEED, *(("--deepspeed_config", str(file)) if stage == 3 else ("--zero-stage", str(stage))))

    return flags


@pytest.mark.parametrize(
    ("ranks", "words", "stage"),
    [
        (4, TENSOR, 2),
        pytest.param(1, (), 0, marks=slow),
        pytest.param(2, (), 1, marks=slow),
        pytest.param(2, (), 0, marks=slow),
        pytest.param(2, (), 2, marks=slow),
        pytest.param(2, (), 3, marks=slow),
        pytest.param(2, TENSOR, 0, marks=slow),
        pytest.param(2, TENSOR, 3, marks=slow),
        pytest.param(4, TENSOR, 0, marks=slow),
        pytest.param(4, TENSOR, 1, marks=slow),
        pytest.param(4, TENSOR, 3, marks=slow),
        pytest.param(4, TENSOR[:2], 2, marks=slow),
    ],
)
def test_every_stage_gives_the_losses_of_the_megatron_engine(trainer, single, zero, ranks, words, stage):
    run = trainer.run(ranks, *words, *zero(stage), name=f"stage{stage}_{ranks}_{len(words)}")
    run.assert_trained(range(1, 21))
    assert relative_difference(single, run) < 1e-4
    assert _norms(run) == pytest.approx(_norms(single), rel=1e-3)


@slow
@pytest.mark.parametrize(
    "words",
    [(), TENSOR, (*TENSOR, "--bf16"), ("--zero-offload", "cpu"), ("--ru-variant", "ru_demo", "--num-layers", "4")],
    ids=["dp4", "tp2", "tp2_bf16", "offload", "tied"],
)
def test_zero_3_trains_alike_where_no_rank_ever_held_the_model(trainer, zero, words):
    runs = [
        trainer.run(4, *zero(3), *words, "--ru-meta-init", how, name=f"meta_{how}_{len(words)}_{words[-1:]}", steps=12)
        for how in ("off", "on")
    ]
    for run in runs:
        run.assert_trained(range(1, 13))
    assert runs[1].losses == runs[0].losses
    assert _norms(runs[1]) == _norms(runs[0])
    said = [sorted(line for line in run.output.splitlines() if "number of parameters on" in line) for run in runs]
    assert said[0] == said[1] != []


@slow
def test_no_rank_ever_holds_the_model_while_it_is_built(trainer, zero):
    found = {}
    size = ("--hidden-size", "1024", "--num-layers", "8", "--num-attention-heads", "16")
    for how in ("off", "on"):
        folder = trainer.folder / f"memory_{how}"
        folder.mkdir()
        run = trainer.run(
            4, *zero(3), *size, "--ru-variant", "llama3_tiny", "--ru-meta-init", how, name=f"memory_{how}", steps=1,
            command=[*torchrun(4), MEMORY],
            # Without it malloc keeps what was freed, in holes between the shares.
            environment={"MEMORY": str(folder), "MALLOC_MMAP_THRESHOLD_": "1000000"},
        )  # fmt: skip
        run.assert_trained(range(1, 2))
        found[how] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]
    whole = found["off"][0]["model"]
    assert {rank["model"] for ranks in found.values() for rank in ranks} == {whole}
    assert all(rank["building"] > whole for rank in found["off"])
    # A quarter, the largest weight and what draws it.
    assert all(rank["building"] < 0.5 * whole for rank in found["on"])
    # The optimizer, which both need, is most of it by then.
    assert all(rank["engine"] < 0.9 * max(other["engine"] for other in found["off"]) for rank in found["on"])


def test_a_checkpoint_goes_from_megatron_to_deepspeed_and_back(trainer, single, zero):
    save, again = trainer.folder / "to_deepspeed", trainer.folder / "to_megatron"
    trainer.run(2, *TENSOR, "--save", str(save), *HALF, name="there").assert_trained(range(1, 11))
    words = ("--load", str(save), "--save", str(again), "--save-interval", "15", "--exit-interval", "15")
    middle = trainer.run(2, *zero(3), *words, name="in_the_middle")
    middle.assert_trained(range(11, 16))
    last = trainer.run(1, "--load", str(again), name="back")
    last.assert_trained(range(16, 21))
    assert relative_difference(single, middle) < 1e-4
    assert relative_difference(single, last) < 1e-4


@slow
@pytest.mark.parametrize(
    ("stage", "words", "bf16"),
    [
        (0, (), ("--bf16",)),
        (1, RESHARDABLE, ("--bf16",)),
        (2, RESHARDABLE, ()),
        (2, (), ("--bf16",)),
        (3, RESHARDABLE, ("--bf16",)),
        (3, (), ()),
    ],
)
def test_every_stage_reads_and_writes_what_megatron_does(trainer, zero, stage, words, bf16):
    name = f"crossing{stage}_{len(words)}_{len(bf16)}"
    theirs, ours = trainer.folder / f"{name}_theirs", trainer.folder / f"{name}_ours"
    whole = trainer.run(2, *words, *bf16, "--save", str(theirs), "--save-interval", "10", name=f"{name}_whole")
    whole.assert_trained(range(1, 21))
    (theirs / "latest_checkpointed_iteration.txt").write_text("10")
    first = trainer.run(4, *TENSOR, *words, *bf16, *zero(stage), "--save", str(ours), *HALF, name=f"{name}_first")
    first.assert_trained(range(1, 11))
    back = trainer.run(2, *words, *bf16, "--load", str(ours), name=f"{name}_back")
    back.assert_trained(range(11, 21))
    there = trainer.run(4, *TENSOR, *words, *bf16, *zero(stage), "--load", str(theirs), "--ckpt-step", "10",
                        name=f"{name}_there")  # fmt: skip
    there.assert_trained(range(11, 21))
    # In bf16 the order of sums shows.
    allowed = 6e-2 if bf16 else 1e-4
    assert all(relative_difference(whole, run) < allowed for run in (first, back, there))
    assert there.losses[11] == pytest.approx(whole.losses[11], rel=1e-3)


@slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_resumed_run_is_the_one_that_never_stopped(trainer, zero, stage):
    save = trainer.folder / f"resumed{stage}"
    whole = trainer.run(2, *zero(stage), name=f"never_stopped{stage}")
    trainer.run(2, *zero(stage), "--save", str(save), *HALF, name=f"stopped{stage}").assert_trained(range(1, 11))
    rest = trainer.run(2, *zero(stage), "--load", str(save), name=f"went_on{stage}")
    rest.assert_trained(range(11, 21))
    assert rest.losses == {step: whole.losses[step] for step in range(11, 21)}


@slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16(trainer, zero, stage):
    megatron = trainer.run(2, "--bf16", name=f"megatron_bf16_{stage}")
    run = trainer.run(2, "--bf16", *zero(stage), name=f"stage{stage}_bf16")
    run.assert_trained(range(1, 21))
    # Megatron adds products to its buffer in fp32; here each gradient is bf16 first, and without ZeRO their sum too.
    assert relative_difference(megatron, run) < (6e-2 if stage == 0 else 3e-2)
    assert run.losses[2] == pytest.approx(megatron.losses[2], rel=1e-2 if stage == 0 else 1e-3)


@slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload(trainer, single, zero, stage):
    run = trainer.run(2, *zero(stage), "--zero-offload", "cpu", name=f"offload{stage}")
    run.assert_trained(range(1, 21))
    assert relative_difference(single, run) < 1e-4


@slow
def test_evaluation_and_frozen_data_of_validation(trainer, single, zero):
    words = ("--eval-iters", "2", "--eval-interval", "10", "--ru-validate-from-start")
    megatron, ours = (
        [json.loads(line) for line in trainer.run(2, *words, *engine, name=name).metrics.read_text().splitlines()]
        for engine, name in (((), "megatron_evaluated"), (zero(3), "deepspeed_evaluated"))
    )
    losses = [
        [line["validation lm loss"] for line in lines if "validation lm loss" in line] for lines in (megatron, ours)
    ]
    assert len(losses[0]) > 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def planted(trainer, name, *words, plants=(), steps=2, ranks=4):
    folder = trainer.folder / name
    folder.mkdir()
    environment = {"PLANT": json.dumps(list(plants)), "DUMP": str(folder), "DUMP_STEP": "1"}
    run = trainer.run(
        ranks, *words, name=name, steps=steps, command=[*torchrun(ranks), SCRIPT], environment=environment
    )
    assert run.returncode == 0, run.output[-4000:]
    return run, folder


def parts(folder, when, ranks=4):
    return [torch.load(folder / f"{when}.{rank}.pt") for rank in range(ranks)]


def lines(run):
    found = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [line for line in found if "lm loss" in line]


def _norms(run):
    return [line["gradient_norm"] for line in lines(run)]


@pytest.mark.parametrize(
    ("stage", "policy", "words"),
    [
        (2, "zero", ()),
        pytest.param(1, "zero", (), marks=slow),
        pytest.param(0, "zero", (), marks=slow),
        pytest.param(3, "zero", (), marks=slow),
        pytest.param(1, "zero", ("--bf16",), marks=slow),
        pytest.param(1, "rescale", (), marks=slow),
        pytest.param(2, "rescale", (), marks=slow),
        pytest.param(3, "rescale", (), marks=slow),
    ],
)
def test_the_reduced_gradient_is_the_mean_without_that_tensor(trainer, zero, stage, policy, words):
    name = f"planted{stage}_{policy}_{len(words)}"
    clean, clean_folder = planted(trainer, f"{name}_clean", *words, *zero(stage))
    run, folder = planted(
        trainer, name, *words, *zero(stage), "--ru-nan-grads", policy, plants=[[2, 1, POISONED, "nan"]]
    )
    befores, unguarded = parts(clean_folder, "before"), parts(clean_folder, "after")
    for rank, after in enumerate(parts(folder, "after")):
        assert after.keys() == unguarded[rank].keys()
        for parameter, found in after.items():
            if POISONED not in parameter:
                assert torch.equal(found, unguarded[rank][parameter]), (rank, parameter)
                continue
            others = [before[parameter].double() for other, before in enumerate(befores) if other != 2]
            mean = sum(others) / (4 if policy == "zero" else 3)
            torch.testing.assert_close(found.double(), mean, rtol=1e-5, atol=1e-8)
            assert found.any()
    assert [line.get("nan_gradients", 0) for line in lines(run)] == [1, 0]
    assert [line.get("nan_ranks", 0) for line in lines(run)] == [1, 0]
    assert all("nan_gradients" not in line for line in lines(clean))


@slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_replicas_of_a_parameter_agree(trainer, zero, stage):
    """DP=2 x TP=2: an infinity in a norm's gradient on one tensor-parallel rank; the other one has none."""
    layout = (*TENSOR[:2], *zero(stage))
    _, clean_folder = planted(trainer, f"replicas{stage}_clean", *layout)
    run, folder = planted(
        trainer, f"replicas{stage}", *layout, "--ru-nan-grads", "zero", "--ru-nan-names",
        plants=[[1, 1, REPLICATED, "inf"]],
    )  # fmt: skip
    befores = parts(clean_folder, "before")
    for rank, after in enumerate(parts(folder, "after")):
        (name,) = (name for name in after if REPLICATED in name)
        # Ranks 0 and 1 are one model, 2 and 3 the other; two micro-batches, of which the first was written down.
        if stage == 1:
            torch.testing.assert_close(
                after[name].double(), befores[rank % 2 + 2][name].double() / 2, rtol=1e-5, atol=1e-8
            )
        other = parts(folder, "after")[rank ^ 1][name]
        torch.testing.assert_close(after[name], other, rtol=1e-6, atol=1e-9)
        assert after[name].isfinite().all()
    assert lines(run)[0]["nan_gradients"] >= 2
    assert "nan_gradients" not in lines(run)[1]
    assert REPLICATED in run.output


@slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_is_skipped_by_all(trainer, zero, stage):
    plants = [[1, 2, POISONED, "-inf"]]
    run, _ = planted(trainer, f"skip{stage}", *zero(stage), "--ru-nan-grads", "skip", ranks=2, steps=4, plants=plants)
    megatron = trainer.run(
        2, "--ru-nan-grads", "skip", name=f"skip{stage}_megatron", steps=4,
        command=[*torchrun(2), SCRIPT.replace("_deepspeed", "")], environment={"PLANT": json.dumps(plants)},
    )  # fmt: skip
    assert [line["skipped"] for line in lines(run)] == [0, 1, 0, 0]
    assert relative_difference(megatron, run) < 1e-4


@slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("policy", ["error", None])
def test_a_nan_ends_the_run_where_nothing_else_is_asked(trainer, zero, stage, policy):
    words = ("--ru-nan-grads", policy) if policy else ()
    run = trainer.run(
        2, *zero(stage), *words, name=f"error{stage}_{policy}", steps=3, command=[*torchrun(2), SCRIPT],
        environment={"PLANT": json.dumps([[1, 2, POISONED, "nan"]])},
    )  # fmt: skip
    assert run.returncode != 0
    if policy:
        assert "hold one on this rank" in run.output
        assert POISONED in run.output
    else:
        assert "one of them holds a NaN or an infinity" in run.output
