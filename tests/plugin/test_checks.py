"""What is refused before the first process group."""

from argparse import Namespace

import pytest
import torch

from megatron_ru.foundation.errors import UserError
from megatron_ru.plugin import checks
from megatron_ru.plugin.arguments import HOST_SPEC
from megatron_ru.plugin.checks import (
    check_checkpoint_format,
    check_complete,
    check_fp8,
    check_host,
    check_supported,
    data_prefixes,
    vocab_size_of,
)


def test_what_our_entry_does_not_carry_out():
    check_supported(Namespace())
    check_supported(Namespace(context_parallel_size=1, sft=False, logits_load_dir=None))
    with pytest.raises(UserError) as error:
        check_supported(Namespace(context_parallel_size=2, sft=True))
    assert str(error.value) == (
        "--context-parallel-size, --sft was given, which megatron-ru pretrain_gpt does not carry out; drop it, or run "
        "Megatron-LM's own script with megatron-ru run_host PATH/pretrain_gpt.py"
    )


@pytest.mark.parametrize(
    "flag",
    ["fim_data", "dataloader_inter_document_masking", "hybrid_context_parallel", "overlap_moe_expert_parallel_comm"],
)
def test_each_unsupported_switch_is_named(flag):
    with pytest.raises(UserError, match=f"^--{flag.replace('_', '-')} was given"):
        check_supported(Namespace(**{flag: True}))


def complete(**changes):
    settings = {
        "data_path": ["text"], "train_data_path": None, "valid_data_path": None, "test_data_path": None,
        "data_args_path": None, "per_split_data_args_path": None, "micro_batch_size": 1, "train_iters": 5,
        "train_samples": None, "skip_train": False, "lr": 1e-3, "mock_data": False, "tokenizer_type": None,
        "tokenizer_model": "a.model", "num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": None,
        "save": None, "save_interval": None,
    }  # fmt: skip
    return Namespace(**settings | changes)


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"micro_batch_size": None}, "--micro-batch-size N"),
        ({"train_iters": None}, "--train-iters N (or --train-samples N)"),
        ({"lr": None}, "--lr X"),
        ({"data_path": None}, "--data-path PREFIX (or --mock-data)"),
        ({"tokenizer_model": None}, "--tokenizer-model FILE"),
        ({"num_layers": None}, "--num-layers N, --hidden-size N and --num-attention-heads N (or --ru-variant NAME)"),
        ({"save": "checkpoints"}, "--save-interval N (beside --save)"),
        ({"lr": None, "micro_batch_size": None}, "--micro-batch-size N; --lr X"),
    ],
)
def test_what_is_missing_is_named(changes, missing):
    check_complete(complete())
    with pytest.raises(UserError) as error:
        check_complete(complete(**changes))
    assert str(error.value) == f"missing: {missing}; megatron-ru pretrain_gpt --help lists every flag"


def test_other_ways_to_be_complete():
    check_complete(complete(data_path=None, mock_data=True))
    check_complete(complete(data_path=None, per_split_data_args_path="splits.json"))
    check_complete(complete(data_path=None, train_data_path=["text"]))
    check_complete(complete(train_iters=None, train_samples=10))
    check_complete(complete(save="checkpoints", save_interval=5))
    check_complete(complete(train_iters=None, lr=None, skip_train=True))


@pytest.mark.parametrize("version", ["0.16.1", "0.17.0rc0", "0.19.2+abc", "0.20.3"])
def test_supported_hosts(monkeypatch, version):
    monkeypatch.setattr("megatron.core.package_info.__version__", version)
    check_host(Namespace(num_layers_per_virtual_pipeline_stage=None, num_virtual_stages_per_pipeline_rank=None))


@pytest.mark.parametrize("version", ["0.15.3", "0.21.0", "1.0"])
def test_unsupported_hosts(monkeypatch, version):
    monkeypatch.setattr("megatron.core.package_info.__version__", version)
    message = f"^this Megatron-LM carries megatron-core {version}, expected 0.16 to 0.20; check out one of those$"
    with pytest.raises(UserError, match=message):
        check_host(Namespace())


@pytest.mark.parametrize("version", ["0.16.1", "0.17.1"])
@pytest.mark.parametrize("name", ["num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"])
def test_virtual_stages_on_the_cpu_of_an_old_host(monkeypatch, cpu_device, version, name):
    monkeypatch.setattr("megatron.core.package_info.__version__", version)
    plain = {"num_layers_per_virtual_pipeline_stage": None, "num_virtual_stages_per_pipeline_rank": None}
    args = Namespace(**plain | {name: 2})
    if version == "0.17.1":
        check_host(args)
        return
    with pytest.raises(
        UserError, match=r"vary from run to run with megatron-core 0.16.1; drop --num-layers-per-virtual"
    ):
        check_host(args)


def test_virtual_stages_of_an_old_host_on_gpus(monkeypatch):
    monkeypatch.setattr("megatron.core.package_info.__version__", "0.16.1")
    check_host(Namespace(num_layers_per_virtual_pipeline_stage=1, num_virtual_stages_per_pipeline_rank=None))


def test_prefixes_without_their_weights():
    args = complete(data_path=["0.3", "data/a", "1e-1", "data/b", "7"], valid_data_path=["data/c"])
    assert data_prefixes(args) == ["data/a", "data/b", "data/c"]
    assert data_prefixes(Namespace()) == []
    assert data_prefixes(complete(data_path=None)) == []


def test_every_dataset_is_checked_against_the_vocabulary(monkeypatch):
    seen = []
    monkeypatch.setattr(checks, "check_dataset", lambda prefix, *rest, **more: seen.append((prefix, rest[0])))
    monkeypatch.setattr(checks, "vocab_size_of", lambda args: 300)
    checks.check_data(complete(data_path=["0.5", "a", "0.5", "b"]))
    assert seen == [("a", 300), ("b", 300)]


def test_a_missing_dataset(tmp_path):
    prefix = tmp_path / "nothing"
    with pytest.raises(UserError, match=str(prefix)):
        checks.check_data(complete(data_path=[str(prefix)], tokenizer_type="NullTokenizer", tokenizer_model=None))


def test_vocabulary_of_the_arguments():
    null = {"tokenizer_type": "NullTokenizer", "tokenizer_model": None}
    assert vocab_size_of(complete(**null, vocab_size=100)) == 101
    assert vocab_size_of(complete(**null)) is None
    assert vocab_size_of(complete(tokenizer_type="TikTokenizer", tokenizer_model="x.json")) is None
    with pytest.raises(UserError, match=r"^--tokenizer-type SentencePieceTokenizer needs --tokenizer-model FILE$"):
        vocab_size_of(complete(tokenizer_type="SentencePieceTokenizer", tokenizer_model=None))


def checkpoints(**changes):
    settings = {"ckpt_format": "torch", "use_distributed_optimizer": True, "save": "checkpoints", "load": None}
    return Namespace(**settings | changes)


def test_checkpoints_that_could_not_be_read_again(monkeypatch):
    monkeypatch.setattr("megatron.core.optimizer.distrib_optimizer.HAVE_APEX_OR_TE", False)
    for changes in ({}, {"save": None, "load": "checkpoints"}):
        with pytest.raises(UserError, match="--ckpt-format torch with --use-distributed-optimizer cannot be loaded"):
            check_checkpoint_format(checkpoints(**changes))


@pytest.mark.parametrize(
    "changes", [{"ckpt_format": "torch_dist"}, {"use_distributed_optimizer": False}, {"save": None}]
)
def test_checkpoints_that_can(monkeypatch, changes):
    monkeypatch.setattr("megatron.core.optimizer.distrib_optimizer.HAVE_APEX_OR_TE", False)
    assert check_checkpoint_format(checkpoints(**changes)) is None


def test_apex_and_transformer_engine_read_every_format(monkeypatch):
    monkeypatch.setattr("megatron.core.optimizer.distrib_optimizer.HAVE_APEX_OR_TE", True)
    assert check_checkpoint_format(checkpoints()) is None


def fp8(**changes):
    return Namespace(**{"ru_fp8": "tensorwise", "spec": HOST_SPEC} | changes)


@pytest.mark.parametrize(("capability", "fits"), [((7, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_fp8_needs_a_gpu_that_multiplies_it(monkeypatch, capability, fits):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    if fits:
        check_fp8(fp8())
    else:
        with pytest.raises(UserError, match=rf"a GPU has no fp8 products \(compute capability {capability[0]}"):
            check_fp8(fp8())
    check_fp8(fp8(ru_fp8=None))


def test_fp8_is_of_our_layers():
    with pytest.raises(UserError, match="--spec names layers that are not ours"):
        check_fp8(fp8(spec=["somebody.else", "SPEC"]))
