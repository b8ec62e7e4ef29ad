"""Unmodified Megatron-DeepSpeed checkouts train with us inside: one model in every layout, and the model of our engine.

Set MEGATRON_DEEPSPEED_CHECKOUT to a checkout, or to several separated by colons. Commit 6acc370a needs no repair, those
after it do; with both named, each must give the losses of the other.
"""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.distributed.rank_processes import RankProcesses
from tests.training_runs import relative_difference, torchrun

FLAT = ("--no-pipeline-parallel",)
TP2 = ("--tensor-model-parallel-size", "2")
PP2 = ("--pipeline-model-parallel-size", "2")
LAYOUTS = {
    "pipeline_of_one": (1, ()),
    "tp2": (2, (*FLAT, *TP2)),
    "pp2": (2, PP2),
    "dp2": (2, FLAT),
    "tp2_pp2_sp": (4, (*TP2, *PP2, "--sequence-parallel")),
}
# On the CPU the host's Adam is torch's, whose weight decay is another thing than AdamW's.
COMMON = ("--tokenizer-type", "GPTSentencePieceTokenizer", "--weight-decay", "0", "--deepspeed")


def checkouts():
    """The folders that MEGATRON_DEEPSPEED_CHECKOUT names."""
    named = [Path(word) for word in os.environ.get("MEGATRON_DEEPSPEED_CHECKOUT", "").split(":") if word]
    return sorted(folder for folder in named if (folder / "pretrain_gpt.py").exists())


each_checkout = pytest.mark.parametrize("checkout", checkouts(), ids=lambda folder: folder.name)
pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(not checkouts(), reason="MEGATRON_DEEPSPEED_CHECKOUT names no Megatron-DeepSpeed checkout"),
]


class Host:
    """Starts runs inside one checkout."""

    def __init__(self, trainer, checkout):
        self.trainer = trainer
        self.script = checkout / "pretrain_gpt.py"
        self.settings = trainer.folder / "deepspeed.json"
        # No clipping: in fp32 DeepSpeed's pipeline leaves the norms of later stages out of the gradient's length.
        settings = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0}
        self.settings.write_text(json.dumps({**settings, "zero_optimization": {"stage": 0}}))

    def words(self, *extra):
        return (*COMMON, "--deepspeed_config", str(self.settings), "--eval-iters", "1", *extra)

    def command(self, processes=1):
        start = torchrun(processes) if processes > 1 else [sys.executable]
        return [*start, "-m", "megatron_ru", "run_host", str(self.script)]

    def run(self, processes, *extra, name, steps=20):
        return self.trainer.run(processes, *self.words(*extra), name=name, steps=steps, command=self.command(processes))


@pytest.fixture
def host(trainer, checkout):
    return Host(trainer, checkout)


@pytest.fixture(scope="module")
def flat(trainer):
    """flat(checkout): its run of one process without DeepSpeed's pipeline, made once."""
    runs = {}

    def run(checkout):
        if checkout not in runs:
            runs[checkout] = Host(trainer, checkout).run(1, *FLAT, name=f"flat_{checkout.name}")
            runs[checkout].assert_trained(range(1, 21))
        return runs[checkout]

    return run


def files_of(checkout):
    """Every file but the bytecode that Python leaves."""
    return {(path, path.stat().st_mtime_ns) for path in checkout.rglob("*") if path.is_file() and path.suffix != ".pyc"}


@each_checkout
def test_the_model_and_the_losses_are_those_of_our_own_engine(trainer, flat, checkout):
    ours = trainer.run(1, "--weight-decay", "0", "--clip-grad", "0", name="engine_beside_megatron_deepspeed")
    ours.assert_trained(range(1, 21))
    assert ours.losses[20] < ours.losses[1] - 0.5, "the model must learn, or equal losses prove nothing"
    assert abs(flat(checkout).losses[1] / ours.losses[1] - 1) < 1e-6
    assert relative_difference(ours, flat(checkout)) < 1e-4


@each_checkout
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_losses_of_one_process(host, flat, checkout, layout):
    processes, words = LAYOUTS[layout]
    run = host.run(processes, *words, name=f"{layout}_{checkout.name}")
    run.assert_trained(range(1, 21))
    assert relative_difference(flat(checkout), run) < 1e-4


@each_checkout
def test_without_our_ops_the_losses_stay(host, flat, checkout):
    before = files_of(checkout)
    run = host.run(1, *FLAT, "--ru-ops", "none", name=f"plain_{checkout.name}")
    run.assert_trained(range(1, 21))
    with_ops, without = flat(checkout).losses, run.losses
    # Each op moves the first losses by a rounding; a model that goes from 6 to 2 in 20 steps lets that grow.
    assert max(abs(with_ops[step] / without[step] - 1) for step in range(1, 6)) < 1e-6
    assert relative_difference(flat(checkout), run) < 1e-4
    assert files_of(checkout) == before, "a run writes nothing into the checkout"


def test_the_checkouts_agree(flat):
    first, *others = [flat(checkout) for checkout in checkouts()]
    for other in others:
        assert other.losses == first.losses


@each_checkout
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--ru-nan-grads", "zero"), "--ru-nan-grads is not carried out inside Megatron-DeepSpeed"),
        (("--ru-variant", "gpt2_pos_every_layer"), "which Megatron-DeepSpeed has no argument for"),
        (("--data-path", "nothing"), "there is no nothing.bin"),
        (("--fp16",), "DeepSpeed's CPU accelerator has no fp16"),
        (("--warmup", "3"), "Megatron refuses these arguments: --warmup argument is no longer valid"),
    ],
)
def test_what_cannot_work_is_one_sentence(host, words, sentence):
    run = host.run(1, *FLAT, *words, name="refused", steps=1)
    assert run.returncode == 2
    assert run.output.splitlines()[-1].startswith("megatron-ru run_host: error: ")
    assert sentence in run.output.splitlines()[-1]


@each_checkout
def test_a_rank_that_fails_ends_at_once(trainer, host, checkout):
    fault = {"MEGATRON_RU_FAULT": "raise,rank=1,step=4"}
    with RankProcesses(
        trainer, 2, *host.words(*FLAT, *TP2), name=f"raising_{checkout.name}", environment=fault,
        command=tuple(host.command()),
    ) as ranks:  # fmt: skip
        assert ranks.codes() == [1, 1]
        assert (ranks.failure(1)["step"], ranks.failure(1)["exception"]) == (3, "RuntimeError")


@each_checkout
def test_a_signal_saves_and_the_run_goes_on(trainer, host, flat, checkout):
    save = trainer.folder / f"signalled_{checkout.name}"
    words = host.words(*FLAT, *TP2, "--save", str(save), "--load", str(save), "--save-interval", "1000")
    command = tuple(host.command())
    with RankProcesses(trainer, 2, *words, name=f"signalled_{checkout.name}", command=command) as ranks:
        ranks.reach(5)
        ranks.signal(1, signal.SIGUSR1)
        assert ranks.codes() == [75, 75], ranks.log(1)[-3000:]
        step = ranks.beat(0).step
    assert 5 <= step < 20
    run = host.run(2, *FLAT, *TP2, "--save", str(save), "--load", str(save), "--save-interval", "1000",
                   name=f"resumed_{checkout.name}")  # fmt: skip
    run.assert_trained(range(step + 1, 21))
    assert relative_difference(flat(checkout), run) < 1e-4
