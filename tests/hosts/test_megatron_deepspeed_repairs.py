"""What trains wrongly in the latest checkouts is found by probing them, and put right from outside."""

import io
import pickle
import sys
from argparse import Namespace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_ru.foundation.errors import UserError
from megatron_ru.hosts import megatron_deepspeed_repairs as repairs
from megatron_ru.hosts.megatron_deepspeed_repairs import RotaryAngles, in_thirds
from megatron_ru.ops import backend

SOUND = SimpleNamespace(
    ru_host_repairs="all",
    use_rotary_position_embeddings=True,
    normalization="rmsnorm",
    sequence_parallel=False,
    num_attention_heads=4,
    num_key_value_heads=2,
    tensor_model_parallel_size=1,
)


class RotaryEmbedding(nn.Module):
    """Gives angles, as it did for long."""

    def __init__(self, dim, theta=10000):
        super().__init__()
        self.inv_freq = 1.0 / (theta ** (torch.arange(0, dim, 2).float() / dim))

    def forward(self, max_seq_len, offset=0):
        angles = torch.outer(torch.arange(max_seq_len).float() + offset, self.inv_freq)
        return torch.cat((angles, angles), -1)[:, None, None]


class TablesEmbedding(RotaryEmbedding):
    """Gives cosines and sines, as it does since December 2024."""

    def forward(self, max_seq_len, offset=0):
        angles = super().forward(max_seq_len, offset)
        return [angles.cos(), angles.sin()]


class ParallelAttention(nn.Module):
    """Cuts the projection head by head; a seam counts on these names."""

    def __init__(self, config, layer_number, attention_type=1, attn_mask_type=1):
        super().__init__()
        self.num_key_value_groups = config.heads // config.groups
        self.hidden_size_per_attention_head = config.size
        self.use_gqa = config.heads != config.groups
        self.query_key_value = config.projection

    def repeated(self, keys):
        return keys.repeat_interleave(self.num_key_value_groups, dim=2) if self.use_gqa else keys

    def split_tensor(self, mixed):
        heads = mixed.view(*mixed.shape[:2], -1, self.num_key_value_groups + 2, self.hidden_size_per_attention_head)
        queries, keys, values = heads.split([self.num_key_value_groups, 1, 1], dim=3)
        return queries.flatten(2, 3), keys.squeeze(3), values.squeeze(3)

    def forward(self, hidden):
        mixed, _ = self.query_key_value(hidden)
        queries, keys, values = self.split_tensor(mixed)
        return queries, self.repeated(keys), self.repeated(values)


class ThirdsAttention(ParallelAttention):
    """Cuts it in thirds."""

    def __init__(self, config, layer_number, attention_type=1, attn_mask_type=1):
        super().__init__(config, layer_number)

    def forward(self, hidden):
        mixed, _ = self.query_key_value(hidden)
        parts = [part.reshape(*mixed.shape[:2], -1, self.hidden_size_per_attention_head) for part in mixed.chunk(3, 2)]
        return parts[0], self.repeated(parts[1]), self.repeated(parts[2])


class CoreAttention(nn.Module):
    def forward(self, query_layer, key_layer, value_layer, attention_mask):
        return [part.view(part.shape[0], -1) for part in (query_layer, key_layer, value_layer)]


@pytest.fixture
def host(monkeypatch):
    """host(embedding, attention): a checkout with these classes."""

    def make(embedding, attention):
        rotary, transformer = ModuleType("rotary"), ModuleType("transformer")
        rotary.RotaryEmbedding = type("RotaryEmbedding", (embedding,), dict(vars(embedding)))
        transformer.ParallelAttention = attention
        transformer.CoreAttention = type("CoreAttention", (CoreAttention,), {})
        monkeypatch.setitem(sys.modules, "megatron.model", ModuleType("megatron.model"))
        monkeypatch.setitem(sys.modules, "megatron.model.rotary_pos_embedding", rotary)
        monkeypatch.setitem(sys.modules, "megatron.model.transformer", transformer)
        return rotary, transformer

    return make


@pytest.fixture
def install():
    installed = []

    def put(seams):
        for seam in seams:
            assert seam.install()
            installed.append(seam)

    yield put
    for seam in reversed(installed):
        seam.undo()


def targets(**changes):
    return [seam.target.rpartition(":")[2] for seam in repairs.repair_seams(Namespace(**{**vars(SOUND), **changes}))]


def test_a_sound_checkout_stays_as_it_is(host):
    host(RotaryEmbedding, ParallelAttention)
    assert targets() == []
    assert targets(ru_host_repairs="none") == []


def test_each_fault_is_found_by_itself(host):
    order = ["ParallelAttention.__init__", "CoreAttention.forward"]
    host(TablesEmbedding, ParallelAttention)
    assert targets() == ["RotaryEmbedding.__call__"]
    assert targets(use_rotary_position_embeddings=False) == []
    host(RotaryEmbedding, ThirdsAttention)
    assert targets() == order
    host(TablesEmbedding, ThirdsAttention)
    assert targets() == ["RotaryEmbedding.__call__", *order]
    # Without rotary positions the thirds of one rank are another model, and still one.
    assert targets(ru_host_repairs="none", use_rotary_position_embeddings=False) == []
    with pytest.raises(UserError, match="takes the cosines and sines of --use-rotary-position-embeddings for angles"):
        targets(ru_host_repairs="none")


def test_one_group_of_queries_in_each_rank_is_expanded_into_views(host):
    host(RotaryEmbedding, ParallelAttention)
    assert targets(tensor_model_parallel_size=2) == ["CoreAttention.forward"]
    assert targets(tensor_model_parallel_size=2, num_key_value_heads=4) == []
    assert targets(tensor_model_parallel_size=4, num_key_value_heads=4) == [], "every query has its key"


def test_layer_norm_of_the_pipeline_on_the_cpu(host, monkeypatch):
    host(RotaryEmbedding, ParallelAttention)
    with backend.only("none"):
        assert targets(normalization="layernorm") == []
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        assert targets(normalization="layernorm") == ["LayerNorm", "LayerNorm"]
    with backend.only("layer_norm"):
        # The op brings it.
        assert targets(normalization="layernorm") == []


def test_angles_reach_attention_through_what_was_made_for_tables(host, install):
    """Both consumers: the model, which unpacks, rounds and hands on, and the pipeline, which keeps one tensor."""
    rotary, _ = host(TablesEmbedding, ParallelAttention)
    expected = RotaryEmbedding(8)(12, 3)
    embedding = rotary.RotaryEmbedding(8)
    install(repairs.repair_seams(Namespace(**vars(SOUND))))
    first, second = embedding(12, 3)
    first.no_checkpointing = True
    for angles in (first.to(torch.bfloat16), second.to(dtype=torch.bfloat16), embedding(12, 3).to("cpu")):
        assert angles.dtype is torch.float32
        assert torch.equal(angles.as_subclass(torch.Tensor), expected)
        assert type(angles.cos()) is torch.Tensor
    assert embedding(12, 3) is embedding(12, 3), "one object, for which tables are made once"
    # ZeRO 3 hooks every module and hands its result on as a plain tensor.
    embedding.register_forward_hook(lambda module, given, result: result.as_subclass(torch.Tensor))
    assert isinstance(embedding(12, 3), RotaryAngles)
    assert not torch.equal(embedding(12).as_subclass(torch.Tensor), expected)


def test_angles_in_a_checkpoint_are_read_without_us():
    angles = torch.rand(3, 1, 1, 4).as_subclass(RotaryAngles)
    stream = io.BytesIO()
    torch.save({"angles": angles}, stream)
    assert b"megatron_ru" not in stream.getvalue()
    stream.seek(0)
    found = torch.load(stream, weights_only=True)["angles"]
    assert type(found) is torch.Tensor
    assert torch.equal(found, angles.as_subclass(torch.Tensor))
    assert type(pickle.loads(pickle.dumps(angles))) is torch.Tensor


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
def test_thirds_are_the_heads_of_the_projection(host, install, heads, groups):
    class Projection(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    config = SimpleNamespace(heads=heads, groups=groups, size=5, projection=Projection(7, (heads + 2 * groups) * 5))
    hidden = torch.randn(3, 2, 7)
    expected = ParallelAttention(config, 1)(hidden)
    _, transformer = host(RotaryEmbedding, ThirdsAttention)
    install(repairs.repair_seams(Namespace(**vars(SOUND))))
    attention = transformer.ParallelAttention(config, 1)
    names = list(attention.state_dict())
    for found, right in zip(attention(hidden), expected, strict=True):
        assert torch.equal(found, right)
    # Weights, their names and so the checkpoints are the host's.
    assert names == ["query_key_value.weight", "query_key_value.bias"]
    # Views of one tensor are what the plain attention cannot take.
    core = transformer.CoreAttention()
    found = core(*(part.transpose(0, 1) for part in expected), None)
    assert torch.equal(found[0], expected[0].transpose(0, 1).reshape(2, -1))


def test_thirds_of_numbers():
    # One group of two queries, a key and a value, of one channel each; and a second group.
    mixed = torch.tensor([10.0, 11, 1, 2, 20, 21, 3, 4]).view(1, 1, 8)
    assert in_thirds(mixed, 2, 1).flatten().tolist() == [10, 11, 20, 21, 1, 1, 3, 3, 2, 2, 4, 4]


@pytest.fixture
def training(monkeypatch):
    module = ModuleType("megatron.training")
    module.settings = {"zero_optimization": {"stage": 1}}
    module._create_ds_config_dict = lambda: dict(module.settings)
    module.get_model = lambda provider: [provider()]
    monkeypatch.setitem(sys.modules, "megatron.training", module)
    return module


def test_the_pipeline_sends_whole_activations_with_sequence_parallelism(host, training, install):
    host(RotaryEmbedding, ParallelAttention)
    args = Namespace(**{**vars(SOUND), "sequence_parallel": True})
    install(repairs.repair_seams(args))
    off = {"pipe_partitioned": False, "grad_partitioned": False}
    assert training._create_ds_config_dict() == {"zero_optimization": {"stage": 1}, "pipeline": off}
    training.settings = {"pipeline": {"pipe_partitioned": True, "activation_checkpoint_interval": 1}}
    with pytest.raises(UserError, match="DeepSpeed's settings have pipe_partitioned true, with which each rank of"):
        training._create_ds_config_dict()
    # The host takes the flag back where TP is 1.
    args.sequence_parallel = False
    training.settings = {"train_batch_size": 8}
    assert training._create_ds_config_dict() == {"train_batch_size": 8}


def test_norm_gradients_are_summed_over_the_ranks_of_a_sequence(host, training, install, monkeypatch):
    host(RotaryEmbedding, ParallelAttention)
    monkeypatch.setattr("megatron.core.parallel_state.get_tensor_model_parallel_group", lambda: "tp")
    groups = []

    def all_reduce(tensor, group):
        groups.append(group)
        tensor.mul_(3)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)

    def provider():
        model = nn.ModuleDict({"norm": nn.Linear(2, 1), "other": nn.Linear(2, 1)})
        for parameter in model["norm"].parameters():
            parameter.sequence_parallel = True
        return model

    args = Namespace(**{**vars(SOUND), "sequence_parallel": True})
    install(repairs.repair_seams(args))
    (model,) = training.get_model(provider)
    x = torch.tensor([[1.0, 2.0]])
    for _ in range(2):
        (model["norm"](x) + model["other"](x)).sum().backward()
    # Each backward's own gradient is summed, and what had been accumulated is not summed again.
    assert model["norm"].weight.grad.tolist() == [[6.0, 12.0]]
    assert model["other"].weight.grad.tolist() == [[2.0, 4.0]]
    assert groups == ["tp"] * 4
