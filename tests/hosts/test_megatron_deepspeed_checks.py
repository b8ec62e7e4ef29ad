"""What the host cannot do, or does wrongly without a word, is refused before the ranks meet."""

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.hosts.megatron_deepspeed_arguments import extend_parser
from megatron_ru.hosts.megatron_deepspeed_checks import check_data_of, check_supported
from tests.hosts.deepspeed_parser import host_parser

SIZES = ["--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4", "--seq-length", "32"]


@pytest.fixture(autouse=True)
def two_processes_on_the_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.fixture
def parsed(tmp_path):
    def parse(*words, engine=True):
        settings = tmp_path / "ds.json"
        settings.write_text("{}")
        given = ["--deepspeed", "--deepspeed_config", str(settings)] if engine else []
        return extend_parser(host_parser(), lambda args: None).parse_args([*SIZES, *given, *words])

    return parse


def test_a_run_that_is_carried_out(parsed):
    check_supported(parsed())
    check_supported(parsed("--tensor-model-parallel-size", "2", "--sequence-parallel", "--bf16"))
    # One rank has nothing to cut.
    check_supported(parsed("--sequence-parallel", "--no-pipeline-parallel"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--num-layers-per-virtual-pipeline-stage 1", "DeepSpeed's pipeline has no virtual stages"),
        ("--ds-sequence-parallel-size 2", "DeepSpeed's sequence parallelism"),
        ("--force-ds-sequence-parallel", "DeepSpeed's sequence parallelism"),
        (
            "--sequence-parallel --tensor-model-parallel-size 2 --no-pipeline-parallel",
            "--sequence-parallel with --no-pipeline-parallel crashes in Megatron-DeepSpeed",
        ),
        (
            "--sequence-parallel --tensor-model-parallel-size 2 --ru-host-repairs none",
            "the gradients of the norms are not summed",
        ),
        ("--fp16", "--fp16 was given, and DeepSpeed's CPU accelerator has no fp16; use --bf16 or fp32"),
        ("--use-flash-attn-v2", "--use-flash-attn-v2 needs a GPU"),
    ],
)
def test_what_is_refused(parsed, words, sentence):
    args = parsed(*words.split())
    with pytest.raises(UserError) as error:
        check_supported(args)
    assert sentence in str(error.value)


def test_chunked_attention_of_the_latest_checkouts(parsed):
    args = parsed()
    args.ds_sequence_parallel_fpdt = True
    with pytest.raises(UserError, match="--ds-sequence-parallel-fpdt"):
        check_supported(args)


def test_a_gpu_has_what_the_cpu_has_not(parsed, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR")
    check_supported(parsed("--fp16", "--use-flash-attn-v2"))


def test_without_deepspeed_nothing_trains(parsed, tmp_path):
    with pytest.raises(UserError, match="add --deepspeed --deepspeed_config FILE"):
        check_supported(parsed(engine=False))
    with pytest.raises(UserError, match=r"nowhere\.json is not a file, expected DeepSpeed's JSON settings"):
        check_supported(parsed("--deepspeed", "--deepspeed_config", "nowhere.json", engine=False))


def test_data_is_looked_at_before_the_ranks_meet(parsed):
    null = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "7")
    check_data_of(parsed(*null))
    with pytest.raises(UserError, match=r"there is no nothing\.bin and no nothing\.idx"):
        check_data_of(parsed(*null, "--data-path", "1.0", "nothing"))
    with pytest.raises(UserError, match=r"there is no tokenizer at none\.model"):
        check_data_of(parsed("--tokenizer-model", "none.model", "--data-path", "nothing"))


def test_a_dataset_of_a_larger_vocabulary(parsed, tmp_path):
    import numpy as np

    from megatron_ru.tokens.indexed_dataset import write_dataset

    with write_dataset(tmp_path / "text", 20) as writer:
        writer.add_documents(np.array([3, 9, 1], dtype=writer.dtype), np.array([3], dtype=np.int32))
    words = ("--tokenizer-type", "NullTokenizer", "--data-path", str(tmp_path / "text"), "--vocab-size")
    # The end of a document is an id more than --vocab-size counts.
    check_data_of(parsed(*words, "9"))
    with pytest.raises(UserError, match="holds the token id 9, but the vocabulary has 9 ids"):
        check_data_of(parsed(*words, "8"))
