"""The optimizer that Megatron's loop holds beside a DeepSpeedEngine."""

from types import SimpleNamespace

import pytest
import torch

from megatron_ru.engines.deepspeed.engine_state import PlainState
from megatron_ru.engines.deepspeed.optimizer import EngineOptimizer, LossScale
from megatron_ru.engines.deepspeed.optimizer_checkpoint import _is_distributed, _take_over
from megatron_ru.foundation.errors import UserError
from megatron_ru.plugin.nan_gradients import NanFoundError


class Scaler:
    """The counters of DeepSpeed's DynamicLossScaler."""

    dynamic, scale_window = True, 1000

    def __init__(self, scale, steps, overflow, hysteresis):
        self.cur_scale, self.cur_iter, self.last_overflow_iter = scale, steps, overflow
        self.cur_hysteresis, self.overflows = hysteresis, []

    def update_scale(self, overflow):
        self.overflows.append(overflow)


def test_the_loss_scale_is_written_in_megatrons_words_and_read_back():
    there = Scaler(2.0**16, steps=57, overflow=40, hysteresis=1)
    state = LossScale(SimpleNamespace(loss_scaler=there)).state_dict()
    assert state == {"scale": torch.tensor([2.0**16]), "growth_tracker": 16, "hysteresis_tracker": 1}
    here = Scaler(2.0**32, steps=0, overflow=-1, hysteresis=2)
    scale = LossScale(SimpleNamespace(loss_scaler=here))
    scale.load_state_dict(state)
    assert scale.state_dict() == state
    scale.update(True)
    assert here.overflows == [True]


def test_a_constant_loss_scale_stays():
    constant = SimpleNamespace(cur_scale=128.0, dynamic=False)
    scale = LossScale(SimpleNamespace(loss_scaler=constant))
    scale.load_state_dict({"scale": torch.tensor([2.0]), "growth_tracker": 1, "hysteresis_tracker": 1})
    assert scale.state_dict() == {"scale": torch.tensor([128.0])}


class Engine:
    """A step that is made or not, with ZeRO."""

    def __init__(self, applied, norm):
        self.applied, self.norm, self.steps = applied, norm, 0
        self.optimizer = SimpleNamespace(param_groups=[])

    def zero_optimization(self):
        return True

    def step(self):
        self.steps += 1

    def was_step_applied(self):
        return self.applied

    def get_global_grad_norm(self):
        return self.norm


def optimizer_of(engine, forgotten=None):
    state = SimpleNamespace(forget_gradients=lambda: forgotten.append(True))
    return EngineOptimizer(engine, SimpleNamespace(fp16=False), state, None)


def test_a_step_tells_whether_it_was_made():
    assert optimizer_of(Engine(True, torch.tensor(2.0))).step() == (True, 2.0, None)
    assert optimizer_of(Engine(False, float("inf"))).step() == (False, None, None)


@pytest.mark.parametrize(("applied", "norm"), [(False, float("inf")), (True, float("nan")), (True, -1.0)])
def test_a_nan_ends_the_run_where_megatron_would_end_it(applied, norm):
    optimizer = optimizer_of(Engine(applied, norm))
    optimizer.stop_at_nan()
    with pytest.raises(NanFoundError, match="one of them holds a NaN"):
        optimizer.step()


def test_gradients_of_a_step_that_was_not_made_are_forgotten():
    forgotten = []
    optimizer = optimizer_of(Engine(True, 1.0), forgotten)
    for made in (True, False, True):
        optimizer.zero_grad()
        if made:
            optimizer.step()
    assert forgotten == [True]


def test_moments_are_made_before_the_first_step():
    weight = torch.nn.Parameter(torch.ones(3))
    adam = torch.optim.AdamW([weight], lr=0.1)
    state = PlainState(adam)
    state.prepare()
    assert state.steps == 0
    assert state.read(weight, "exp_avg").tolist() == [0.0] * 3
    state.write(weight, "exp_avg_sq", torch.full((3,), 4.0))
    state.steps = 9.0
    weight.grad = torch.zeros(3)
    adam.step()
    assert state.steps == 10
    assert torch.allclose(state.read(weight, "exp_avg_sq"), torch.full((3,), 4.0 * 0.999))


def test_groups_are_found_by_what_they_are():
    saved = [{"wd_mult": 0.0, "lr": 1.0, "step": 5}, {"wd_mult": 1.0, "lr": 2.0, "params": [1]}]
    group = {"wd_mult": 1.0, "lr": 0.0, "params": ["mine"]}
    _take_over(group, saved)
    assert group == {"wd_mult": 1.0, "lr": 2.0, "params": ["mine"]}
    with pytest.raises(UserError, match="no group of parameters with the settings of this run"):
        _take_over({"wd_mult": 0.5}, saved)


def test_what_only_one_layout_can_read_is_refused():
    assert _is_distributed({"distrib_optim_sharding_type": "fully_reshardable"})
    assert not _is_distributed({})
    with pytest.raises(UserError, match=r"shards it \(dp_reshardable\).*--dist-ckpt-optim-fully-reshardable"):
        _is_distributed({"distrib_optim_sharding_type": "dp_reshardable"})
