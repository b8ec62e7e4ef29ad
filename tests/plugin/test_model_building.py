"""When a model is built on meta, when nothing is drawn, and that nothing is trained which was neither."""

from argparse import Namespace

import pytest
import torch
from torch import nn

from megatron_ru.foundation.errors import UserError
from megatron_ru.plugin.model_building import ModelBuilding

TRACKER = "latest_checkpointed_iteration.txt"


def building(**changes):
    settings = {"ru_init": "whole", "ru_meta_init": "auto", "num_experts": None, "load": None, "seed": 7}
    return ModelBuilding(Namespace(**settings | changes), None)


@pytest.fixture
def saved(tmp_path):
    (tmp_path / TRACKER).write_text("20")
    return str(tmp_path)


def test_nothing_is_drawn_where_a_checkpoint_will_be_loaded(tmp_path):
    assert building().will_be_loaded is False
    assert building(load=str(tmp_path)).will_be_loaded is False
    (tmp_path / TRACKER).write_text("20")
    load = str(tmp_path)
    assert building(load=load).will_be_loaded is True
    assert building(load=load, dist_ckpt_strictness="raise_all").will_be_loaded is True
    # Then a weight that the checkpoint lacks keeps what it has.
    assert building(load=load, dist_ckpt_strictness="log_all").will_be_loaded is False
    assert building(load=load, use_torch_fsdp2=True).will_be_loaded is False
    assert building(load=load, ru_init="megatron", ru_meta_init="off").will_be_loaded is False


def test_on_meta_where_no_weight_is_left_for_megatron_to_draw(saved):
    assert building().meta is True
    assert building(ru_meta_init="off").meta is False
    assert building(ru_init="megatron").meta is False
    assert building(num_experts=8).meta is False
    # Nothing is drawn by anybody.
    assert building(ru_init="megatron", load=saved).meta is True
    assert building(num_experts=8, load=saved).meta is True


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ru_init": "megatron"}, "with --ru-init megatron Megatron draws"),
        ({"num_experts": 8}, "with --num-experts Megatron draws"),
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp moves the model"),
        ({"init_model_with_meta_device": True}, "--init-model-with-meta-device is Megatron's own way"),
    ],
)
def test_a_wish_that_cannot_be_is_refused(changes, said):
    assert building(**changes).meta is False
    with pytest.raises(UserError, match=said):
        building(ru_meta_init="on", **changes)


class Stage(nn.Module):
    """A stage of two weights."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)


def loaded(saved, load):
    """What a run says after building and loading its stage, and the stage."""
    run = building(load=saved)
    run.meta = False
    made = {seam.target.rpartition(":")[2]: seam.make for seam in run.seams()}
    stages = []

    def build(stage):
        stage.__init__()
        stages.append(stage)

    made["GPTModel.__init__"](build)(Stage.__new__(Stage))
    made["load_checkpoint"](lambda: load(stages[0]))()
    return stages[0]


def fill(*parts):
    def load(stage):
        with torch.no_grad():
            for part in parts:
                for parameter in getattr(stage, part).parameters():
                    parameter.fill_(5)

    return load


def test_what_was_loaded_may_be_trained(saved):
    stage = loaded(saved, fill("one", "two"))
    assert all((parameter == 5).all() for parameter in stage.parameters())


def test_what_was_not_loaded_ends_the_run(saved):
    with pytest.raises(UserError, match=r"gave no number to two\.weight, two\.bias, which"):
        loaded(saved, fill("one"))
    with pytest.raises(UserError, match=r"one\.weight, one\.bias, two\.weight and 1 more"):
        loaded(saved, fill())


def test_weights_that_are_taken_and_loaded_are_not_drawn(saved, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    taken, run = [], building(load=saved)
    run._finish_by_modules(Stage(), [], lambda weights: taken.extend(weight.flatten().tolist() for weight in weights))
    assert [len(weight) for weight in taken] == [12, 4, 8, 2]
    assert all(weight[0] != weight[0] for weight in taken)
    assert [name for name, _ in run._unloaded] == ["one.weight", "one.bias", "two.weight", "two.bias"]


def test_a_weight_in_two_modules_cannot_be_taken_twice(saved, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    stage = Stage()
    stage.two.weight = stage.one.weight
    with pytest.raises(UserError, match="two shares a weight with a module before it; use --ru-meta-init off"):
        building(load=saved)._finish_by_modules(stage, [], lambda weights: None)


def test_without_a_checkpoint_there_is_nothing_to_check():
    assert not [seam for seam in building().seams() if seam.target.endswith("load_checkpoint")]
