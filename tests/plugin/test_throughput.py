from argparse import Namespace

import pytest

from megatron_ru.plugin import throughput
from megatron_ru.plugin.throughput import Throughput, sentence


@pytest.fixture
def run(monkeypatch):
    """Megatron's arguments, its writer and a clock that stands still until it is turned."""
    from megatron import training

    args = Namespace(
        consumed_train_samples=0, seq_length=10, world_size=2, num_experts=None, padded_vocab_size=32, num_layers=1,
        hidden_size=8, ffn_hidden_size=16, num_attention_heads=2, kv_channels=4, swiglu=True,
        group_query_attention=False, num_query_groups=1,
    )  # fmt: skip
    written = []
    writer = Namespace(add_scalar=lambda name, value, step: written.append((name, value, step)))
    state = Namespace(args=args, now=100.0, written=written)
    monkeypatch.setattr(training, "get_args", lambda: args)
    monkeypatch.setattr(training, "get_tensorboard_writer", lambda: writer)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: state.now)
    monkeypatch.setattr(throughput, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(throughput, "memory_gib", lambda device: {"peak_memory_gib": 3.0, "peak_reserved_gib": 4.0})
    return state


def by_name(speed):
    return {seam.target.partition(":")[2]: seam.make for seam in speed.seams()}


def test_speed_since_the_line_before_without_what_is_no_training(run):
    speed, printed = Throughput(), []
    make = by_name(speed)

    def train_step():
        run.now += 2.0
        run.args.consumed_train_samples += 4

    def training_log(loss, iteration):
        log(f" [date] iteration {iteration} | consumed samples: 4 |")
        log("something else |")

    log = make["print_rank_last"](printed.append)
    step, logged = make["train_step"](train_step), make["training_log"](training_log)

    def evaluate():
        run.now += 50.0

    run.now += 1000.0
    step()
    logged(0.0, 1)
    # 4 samples of 10 tokens in 2 s.
    assert speed.report()["tokens_per_second"] == 20
    make["evaluate_and_print_results"](evaluate)()
    make["save_checkpoint_and_time"](evaluate)()
    step()
    step()
    logged(0.0, iteration=3)
    found = speed.report()
    assert found["tokens_per_second"] == 20
    flops = 80 * 6 * (4 * 64 + 3 * 8 * 16 + 32 * 8 + 10 * 8)
    assert found["tflop_s_per_gpu"] == pytest.approx(flops / 4 / 2 / 1e12)
    assert found["mfu"] == pytest.approx(flops / 4 / 2 / 989e12)
    assert found["peak_memory_gib"] == 3.0
    assert printed[0].startswith(" [date] iteration 1 | consumed samples: 4 | tokens/s: 20 |")
    assert "MFU: 0.0% | peak memory (GiB): 3.0 |" in printed[0]
    assert printed[1] == "something else |"
    assert ("ru/tokens_per_second", 20.0, 3) in run.written
    # Once for each line, whoever asks.
    assert len([one for one in run.written if one[0] == "ru/mfu"]) == 2


def test_nothing_before_the_first_step(run):
    speed = Throughput()
    by_name(speed)["training_log"](lambda iteration: None)(iteration=1)
    assert speed.report() == {}


def test_sentence():
    assert sentence({}) == ""
    found = {"tokens_per_second": 40512.4, "tflop_s_per_gpu": 497.08, "mfu": 0.5026, "peak_memory_gib": 48.44}
    assert sentence(found) == " tokens/s: 40,512 | TFLOP/s/GPU: 497.1 | MFU: 50.3% | peak memory (GiB): 48.4 |"


def test_the_seams_fit_this_megatron(cpu_device):
    for seam in Throughput().seams():
        assert seam.install()
        seam.undo()
