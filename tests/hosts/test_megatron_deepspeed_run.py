"""The seams of one run inside the host: which there are, what they do, and that they are taken back."""

import json
import sys
from argparse import Namespace
from types import ModuleType

import pytest
import torch

from megatron_ru.foundation.heartbeat import Phase
from megatron_ru.hosts import megatron_deepspeed_run as host_run
from megatron_ru.ops import backend

LOOP = (
    "train", "train_step", "training_log", "evaluate", "evaluate_and_print_results", "save_checkpoint",
    "save_checkpoint_and_time", "load_checkpoint", "setup_model_and_optimizer", "build_train_valid_test_data_iterators",
    "get_forward_backward_func", "get_model",
)  # fmt: skip


def arguments(**changes):
    given = {
        "ru_ops": "none", "ru_metrics": None, "ru_init": "megatron", "ru_host_repairs": "all", "log_interval": 1,
        "sequence_parallel": False, "use_rotary_position_embeddings": False, "normalization": "rmsnorm", "kd": False,
        "mos": False, "zero_stage": 0, "num_experts": [1], "exit_signal_handler": False, "save": None,
        "num_attention_heads": 4, "num_key_value_heads": 4,
        "tensor_model_parallel_size": 1,
    }  # fmt: skip
    return Namespace(**{**given, **changes})


class ParallelAttention:
    split_tensor = None

    def forward(self):
        return self.split_tensor


@pytest.fixture
def host(monkeypatch, tmp_path):
    """The host's modules, whose functions write their names into `calls`."""
    monkeypatch.delenv("RU_HEARTBEAT", raising=False)
    monkeypatch.setattr(host_run, "current_heartbeat", lambda: None)
    monkeypatch.setattr(host_run, "listener", lambda: None)
    made = {name: ModuleType(name) for name in (
        "megatron.training", "megatron.initialize", "megatron.data", "megatron.data.dataset_utils", "megatron.model",
        "megatron.model.transformer", "megatron.dist_signal_handler",
    )}  # fmt: skip
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    training = made["megatron.training"]
    training.calls = []

    def function(name):
        def call(*given, **keywords):
            training.calls.append(name)
            return name

        return call

    for name in LOOP:
        setattr(training, name, function(name))

    def training_log(loss_dict, total_loss_dict, learning_rate, iteration, loss_scale, flag, skipped_iter, grad_norm):
        training.calls.append("training_log")

    def evaluate_and_print_results(prefix, iteration):
        training.evaluate()

    training.training_log, training.evaluate_and_print_results = training_log, evaluate_and_print_results
    training.get_args = lambda: Namespace(iteration=3, curr_iteration=3)
    made["megatron.initialize"]._initialize_distributed = function("_initialize_distributed")
    made["megatron.initialize"]._compile_dependencies = lambda: made["megatron.data.dataset_utils"].compile_helper()
    made["megatron.data.dataset_utils"].compile_helper = function("make")
    made["megatron.data"].__path__ = [str(tmp_path)]
    made["megatron.model.transformer"].ParallelAttention = ParallelAttention
    made["megatron.dist_signal_handler"].DistributedSignalHandler = lambda sig=15: "theirs"
    yield training
    host_run.undo_run()


def test_everything_is_taken_back(host, tmp_path):
    before = {name: getattr(host, name) for name in LOOP}
    chosen = backend.selected()
    host_run.install_run(arguments(ru_metrics=str(tmp_path / "m.jsonl")))
    assert backend.selected() == ()
    changed = {name for name in LOOP if getattr(host, name) is not before[name]}
    assert changed == {
        "training_log", "evaluate", "evaluate_and_print_results", "train_step", "load_checkpoint",
        "setup_model_and_optimizer", "build_train_valid_test_data_iterators",
    }  # fmt: skip
    # A second run in one process takes the place of the first.
    host_run.install_run(arguments())
    assert host.training_log is before["training_log"]
    host_run.undo_run()
    assert {name: getattr(host, name) for name in LOOP} == before
    assert backend.selected() == chosen


def test_a_line_for_each_step_and_each_evaluation(host, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_ru.plugin.step_metrics._is_last_rank", lambda: True)
    host.evaluate = lambda *given, **keywords: ({"lm loss": torch.tensor([2.5])}, None)
    file = tmp_path / "m.jsonl"
    host_run.install_run(arguments(ru_metrics=str(file)))
    host.training_log({"lm loss": torch.tensor(4.25)}, {}, 1e-3, 4, None, False, 0, None)
    host.evaluate_and_print_results("iteration 4", 4)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        assert line.pop("seconds") >= 0
    assert lines == [
        {"iteration": 4, "lm loss": 4.25, "learning_rate": 1e-3, "gradient_norm": None, "skipped": 0},
        {"iteration": 4, "validation lm loss": 2.5},
    ]


class Beats:
    """A heartbeat that remembers."""

    def __init__(self):
        self.phase, self.beats = Phase.TRAINING, []

    def beat(self, step=None, phase=None):
        self.phase = self.phase if phase is None else phase
        self.beats.append((step, self.phase))


def test_signs_of_life(host, monkeypatch):
    beats = Beats()
    monkeypatch.setattr(host_run, "current_heartbeat", lambda: beats)
    steps = host.evaluate
    host.evaluate = lambda: (host.get_forward_backward_func(), host.get_forward_backward_func(), steps())
    host_run.install_run(arguments())
    host.train()
    host.get_forward_backward_func()
    host.training_log({}, {}, 1e-3, 4, None, False, 0, None)
    assert beats.beats == [(3, Phase.TRAINING), (4, Phase.TRAINING)]
    beats.beats.clear()
    host.evaluate()
    assert beats.beats == [(None, Phase.EVALUATING)] * 3 + [(None, Phase.TRAINING)]
    beats.beats.clear()
    host.save_checkpoint()
    assert beats.beats == [(None, Phase.SAVING), (None, Phase.TRAINING)]


def test_signals_end_a_run_behind_the_host_s_own_door(host, monkeypatch):
    from megatron_ru.plugin.exit_signals import ExitSignals

    signals = ExitSignals()
    monkeypatch.setattr(host_run, "listener", lambda: signals)
    args = arguments()
    host_run.install_run(args)
    assert args.exit_signal_handler is True
    assert sys.modules["megatron.dist_signal_handler"].DistributedSignalHandler() is signals
    # The host would save into no folder.
    assert host.save_checkpoint_and_time(4) is None
    assert host.calls == []
    args.save = "here"
    assert host.save_checkpoint_and_time(4) == "save_checkpoint_and_time"

    def leave(*given):
        raise SystemExit(0)

    host_run.undo_run()
    host.train = leave
    host_run.install_run(arguments())
    signals.agreed = 10
    with pytest.raises(SystemExit) as end:
        host.train()
    assert end.value.code == 75


def test_faults_on_request(host, monkeypatch):
    monkeypatch.setenv("MEGATRON_RU_FAULT", "raise,rank=0,step=4")
    monkeypatch.setenv("RANK", "0")
    host_run.install_run(arguments())
    with pytest.raises(RuntimeError, match="asked for an exception before step 4"):
        host.train_step()


@pytest.mark.parametrize(("local_rank", "built"), [("0", [True, False]), ("1", [False])])
def test_dataset_helpers_are_compiled_outside_the_checkout(host, monkeypatch, tmp_path, local_rank, built):
    calls = []
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(host_run, "load_helpers", lambda name, source, build: calls.append((name, source, build)))
    host_run.install_run(arguments())
    sys.modules["megatron.initialize"]._compile_dependencies()
    assert calls == [("megatron.data.helpers", tmp_path / "helpers.cpp", build) for build in built]
    assert host.calls == [], "the Makefile was not run"


def test_what_was_put_right_is_told_by_the_first_rank(host, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    attention = type("ParallelAttention", (), {"forward": lambda self: None, "__init__": lambda self, config,
                     layer_number, attention_type, attn_mask_type: None})  # fmt: skip
    transformer = sys.modules["megatron.model.transformer"]
    monkeypatch.setattr(transformer, "ParallelAttention", attention)
    core = type("CoreAttention", (), {"forward": lambda self, query_layer, key_layer, value_layer, attention_mask: 0})
    monkeypatch.setattr(transformer, "CoreAttention", core, raising=False)
    host_run.install_run(arguments())
    assert capsys.readouterr().out == (
        "megatron_ru: put right in this Megatron-DeepSpeed: ParallelAttention.__init__, CoreAttention.forward\n"
    )
    monkeypatch.setenv("RANK", "1")
    host_run.install_run(arguments())
    assert capsys.readouterr().out == ""


def test_the_page_on_versions_names_every_seam(host, monkeypatch, tmp_path):
    from pathlib import Path

    import megatron_ru
    from megatron_ru.plugin.exit_signals import ExitSignals

    monkeypatch.setattr(host_run, "current_heartbeat", Beats)
    monkeypatch.setattr(host_run, "listener", ExitSignals)
    monkeypatch.setenv("MEGATRON_RU_FAULT", "kill,rank=0,step=4")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    forward = type("ParallelAttention", (), {"forward": lambda self: None})
    monkeypatch.setattr(sys.modules["megatron.model.transformer"], "ParallelAttention", forward)
    tables = ModuleType("megatron.model.rotary_pos_embedding")
    tables.RotaryEmbedding = lambda dim: lambda length: []
    monkeypatch.setitem(sys.modules, tables.__name__, tables)
    args = arguments(
        ru_metrics=str(tmp_path / "m.jsonl"), ru_init="whole", sequence_parallel=True, normalization="layernorm",
        use_rotary_position_embeddings=True,
    )  # fmt: skip
    targets = set()
    for words in ("all", "none"):
        with backend.only(words):
            targets |= {seam.target for seam in host_run.run_seams(args)}
    assert len(targets) >= 28
    page = (Path(megatron_ru.__file__).parents[1] / "docs" / "en" / "versions.md").read_text(encoding="utf-8")
    table = page.partition("### Inside Megatron-DeepSpeed")[2]
    assert sorted(target for target in targets if f"`{target}`" not in table) == []
