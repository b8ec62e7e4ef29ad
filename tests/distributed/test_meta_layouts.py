"""A model that is built on meta starts from the weights of one that is not, in every layout and host."""

import sys

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load

from tests.distributed.test_megatron_lm_host import checkouts
from tests.training_runs import torchrun

TENSOR = ("--tensor-model-parallel-size", "2")
PIPELINE = ("--pipeline-model-parallel-size", "2")
VIRTUAL = (*PIPELINE, "--num-layers-per-virtual-pipeline-stage", "1")
TIED = ("--ru-variant", "ru_demo", "--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4",
        "--max-position-embeddings", "64", "--seq-length", "64")  # fmt: skip


def first_weights(trainer, processes, *flags, name, command=None):
    """The weights of the whole model that a run starts from, by name: it saves them after a step of size zero."""
    save = trainer.folder / f"first_{name}"
    run = trainer.run(processes, *flags, "--lr", "0", "--min-lr", "0", "--save", str(save), "--save-interval", "1",
                      "--no-save-optim", "--no-save-rng", name=f"first_{name}", steps=1, command=command)  # fmt: skip
    run.assert_trained(range(1, 2))
    reader = FileSystemReader(save / "iter_0000001")
    known = reader.read_metadata().state_dict_metadata
    whole = {key: torch.empty(value.size, dtype=value.properties.dtype)
             for key, value in known.items() if hasattr(value, "size")}  # fmt: skip
    load(whole, storage_reader=reader, no_dist=True)
    return whole


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert any(weight.dim() == 2 and weight.std() > 0 for weight in found.values())
    for key, weight in found.items():
        assert torch.equal(weight, expected[key]), key


def test_tensor_parallel_shards_are_the_ones_of_one_process_without_meta(trainer):
    expected = first_weights(trainer, 1, "--ru-meta-init", "off", name="off")
    assert_same(first_weights(trainer, 2, *TENSOR, "--ru-meta-init", "on", name="tp2"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [(), TIED], ids=["llama3_tiny", "tied"])
def test_every_layout_starts_from_the_same_model(trainer, variant):
    expected = first_weights(trainer, 1, *variant, "--ru-meta-init", "off", name=f"one_{len(variant)}")
    layouts = {
        "one": (1, ()),
        "tp2": (2, TENSOR),
        "pp2": (2, PIPELINE),
        "virtual_pp2": (2, VIRTUAL),
        "dp2": (2, ("--use-distributed-optimizer",)),
        "tp2_pp2": (4, (*TENSOR, *PIPELINE, "--sequence-parallel")),
    }
    for name, (processes, flags) in layouts.items():
        flags = (*variant, *flags, "--ru-meta-init", "on")
        assert_same(first_weights(trainer, processes, *flags, name=f"{name}_{len(variant)}"), expected)


@pytest.mark.slow
def test_bf16_weights_are_the_same(trainer):
    expected = first_weights(trainer, 1, "--bf16", "--ru-meta-init", "off", name="bf16_off")
    assert_same(first_weights(trainer, 2, *TENSOR, "--bf16", "--ru-meta-init", "on", name="bf16_on"), expected)


@pytest.mark.slow
def test_a_restart_draws_nothing_and_goes_on(trainer):
    flags = (*TENSOR, "--use-distributed-optimizer", "--bf16", "--save-interval", "5")
    whole = trainer.run(2, *flags, "--save", str(trainer.folder / "meta_whole"), name="meta_whole", steps=10)
    whole.assert_trained(range(1, 11))
    save = trainer.folder / "meta_cut"
    trainer.run(2, *flags, "--save", str(save), "--exit-interval", "5", name="meta_cut", steps=10)
    for how in ("off", "on"):
        again = trainer.run(2, *flags, "--load", str(save), "--ru-meta-init", how, name=f"meta_{how}", steps=10)
        again.assert_trained(range(6, 11))
        assert again.losses == {step: whole.losses[step] for step in range(6, 11)}


@pytest.mark.slow
@pytest.mark.hosts
@pytest.mark.parametrize("checkout", checkouts(), ids=lambda folder: folder.name)
def test_an_unmodified_megatron_lm_starts_from_the_same_model(trainer, checkout):
    expected = first_weights(trainer, 1, *TIED, "--ru-meta-init", "off", name=f"off_{checkout.name}")
    launcher, host = torchrun(2), ["-m", "megatron_ru", "run_host", str(checkout / "pretrain_gpt.py")]
    assert sys.executable in launcher
    found = first_weights(trainer, 2, *TIED, *PIPELINE, "--ru-meta-init", "on", name=f"host_{checkout.name}",
                          command=[*launcher, *host])  # fmt: skip
    assert_same(found, expected)
