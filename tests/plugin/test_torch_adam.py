"""The distributed optimizer around torch's AdamW, stopped and restarted in one process."""

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ru.plugin.torch_adam import torch_adam_seams

pytestmark = pytest.mark.skipif(
    getattr(distrib_optimizer, "HAVE_APEX_OR_TE", True), reason="with Apex or TransformerEngine Adam is not torch's"
)


class TwoLayers(MegatronModule):
    """Two weights, so that one step tensor shared by both would count twice."""

    def __init__(self, config):
        super().__init__(config)
        torch.manual_seed(0)
        self.first = torch.nn.Linear(8, 8)
        self.second = torch.nn.Linear(8, 1)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Training:
    """A model, its distributed optimizer, and steps whose gradients depend on the step alone."""

    def __init__(self):
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        data_parallel = DistributedDataParallelConfig(use_distributed_optimizer=True)
        self.model = DistributedDataParallel(config, data_parallel, TwoLayers(config))
        settings = OptimizerConfig(
            optimizer="adam", lr=0.01, weight_decay=0.1, adam_beta1=0.5, adam_beta2=0.9, clip_grad=1.0,
            use_distributed_optimizer=True,
        )  # fmt: skip
        optimizer = get_megatron_optimizer(settings, [self.model])
        [self.optimizer] = getattr(optimizer, "chained_optimizers", [optimizer])

    def train(self, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            self.model(torch.randn(4, 8, generator=generator)).square().mean().backward()
            self.model.finish_grad_sync()
            assert self.optimizer.step()[0]

    @property
    def shards(self):
        """The parameters that this rank's optimizer steps, in its order."""
        return [parameter for group in self.optimizer.optimizer.param_groups for parameter in group["params"]]

    def restarted(self):
        """A fresh training that has loaded the state of this one."""
        fresh = Training()
        # As Megatron does: the state of an optimizer without steps is the template of the loading.
        fresh.optimizer.state_dict()
        fresh.optimizer.load_state_dict(self.optimizer.state_dict())
        # The formats of checkpoints bring back the tensors of one shape with their parameter, and no step count.
        mine, theirs = self.optimizer.optimizer.state, fresh.optimizer.optimizer.state
        with torch.no_grad():
            for old, new in zip(self.shards, fresh.shards, strict=True):
                new.copy_(old)
                for name in ("exp_avg", "exp_avg_sq"):
                    theirs[new][name].copy_(mine[old][name])
        return fresh

    @property
    def steps(self):
        return [state["step"] for state in self.optimizer.optimizer.state.values()]


@pytest.fixture
def seams(one_process):
    installed = torch_adam_seams()
    for seam in installed:
        seam.install()
    yield installed
    for seam in reversed(installed):
        seam.undo()


def test_a_restart_goes_on_bit_for_bit(seams):
    whole = Training()
    whole.train(range(6))
    begun = Training()
    begun.train(range(3))
    continued = begun.restarted()
    assert [step.item() for step in continued.steps] == [3.0] * len(continued.steps)
    continued.train(range(3, 6))
    for name, weight in whole.model.module.state_dict().items():
        assert torch.equal(continued.model.module.state_dict()[name], weight), name


def test_every_parameter_has_a_step_tensor_of_its_own(seams):
    begun = Training()
    begun.train(range(2))
    continued = begun.restarted()
    assert len(continued.steps) > 1
    assert len({step.data_ptr() for step in continued.steps}) == len(continued.steps)
    continued.train([2])
    assert [step.item() for step in continued.steps] == [3.0] * len(continued.steps)


def test_an_optimizer_without_steps_has_a_state(seams):
    fresh = Training()
    assert not fresh.optimizer.optimizer.state
    state = fresh.optimizer.state_dict()
    assert [group["step"] for group in state["optimizer"]["param_groups"]] == [0.0] * len(
        state["optimizer"]["param_groups"]
    )
    for entry in fresh.optimizer.optimizer.state.values():
        assert entry["step"].item() == 0
        assert not entry["exp_avg"].any()
        assert not entry["exp_avg_sq"].any()
    # What was made for the asking changes nothing.
    fresh.train(range(2))
    asked_never = Training()
    asked_never.train(range(2))
    for name, weight in fresh.model.module.state_dict().items():
        assert torch.equal(asked_never.model.module.state_dict()[name], weight), name


@pytest.mark.parametrize("saved", [{}, {"step": torch.tensor(99.0)}], ids=["no count", "stale count"])
def test_tensors_of_a_checkpoint_leave_the_count_alone(seams, saved):
    begun = Training()
    begun.train(range(2))
    weight = begun.model.module.second.weight
    main = next(shard for shard in begun.shards if shard.numel() == weight.numel())
    zeros = dict.fromkeys(("param", "exp_avg", "exp_avg_sq"), torch.zeros(weight.numel()))
    with torch.no_grad():
        begun.optimizer._set_main_param_and_optimizer_states(weight, {**zeros, **saved})
    state = begun.optimizer.optimizer.state[main]
    assert state["step"].item() == 2
    assert not main.any()
    assert not state["exp_avg"].any()


def test_without_the_seams_megatron_fails_here(one_process):
    # The day it does not, the seams can go.
    with pytest.raises(AssertionError):
        Training().optimizer.state_dict()


def test_no_seams_beside_apex_or_transformer_engine(monkeypatch):
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    assert torch_adam_seams() == []
