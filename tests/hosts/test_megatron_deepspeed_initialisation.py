"""Weights by their names in our own model, in each of the host's two shapes of a model."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_ru.hosts.megatron_deepspeed_initialisation import draw_whole, initialisation_seams, names_in_our_model
from megatron_ru.models.initialisation import _MARK, ShardedDraw, initialise

ARGS = Namespace(ru_init="whole", zero_stage=0, num_experts=[1], seed=7, swiglu=True)
HIDDEN, FFN, WORDS, POSITIONS = 4, 6, 10, 5
OURS = [
    "embedding.word_embeddings.weight",
    "embedding.position_embeddings.weight",
    *(
        f"decoder.layers.{number}.{linear}.weight"
        for number in (0, 1)
        for linear in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    ),
    "output_layer.weight",
]


def draw(weight):
    return nn.init.normal_(weight, std=0.5)


class Linear(nn.Module):
    """A parallel weight as the host builds it, noted by the seams on its drawing."""

    def __init__(self, rows, columns, tp, partition_dim):
        super().__init__()
        shape = [rows, columns]
        shape[partition_dim] //= tp
        self.weight = nn.Parameter(torch.zeros(shape))
        setattr(self.weight, _MARK, ShardedDraw(draw=draw, partition_dim=partition_dim, stride=1))


def named(**modules):
    module = nn.Module()
    for name, child in modules.items():
        module.add_module(name, child)
    return module


def layer(tp, number):
    made = named(
        input_layernorm=nn.LayerNorm(HIDDEN),
        self_attention=named(query_key_value=Linear(3 * HIDDEN, HIDDEN, tp, 0), dense=Linear(HIDDEN, HIDDEN, tp, 1)),
        mlp=named(dense_h_to_4h=Linear(2 * FFN, HIDDEN, tp, 0), dense_4h_to_h=Linear(HIDDEN, FFN, tp, 1)),
    )
    made.layer_number = number
    return made


def embedding(tp):
    return {"word_embeddings": Linear(WORDS, HIDDEN, tp, 0), "position_embeddings": nn.Embedding(POSITIONS, HIDDEN)}


def whole_model(tp=1):
    encoder = named(layers=nn.ModuleList([layer(tp, 1), layer(tp, 2)]), final_layernorm=nn.LayerNorm(HIDDEN))
    head = Linear(WORDS, HIDDEN, tp, 0)
    return named(language_model=named(embedding=named(**embedding(tp)), encoder=encoder, output_layer=head))


def pipeline(tp=1, stage=None):
    """A model of DeepSpeed's pipeline, or one stage of two: its layers are numbered behind two other modules."""
    first = {"1": named(**embedding(tp)), "2": layer(tp, 0)}
    last = {"3": layer(tp, 1), "4": nn.LayerNorm(HIDDEN), "5": named(lm_head=Linear(WORDS, HIDDEN, tp, 0))}
    return named(**({**first, **last} if stage is None else (first, last)[stage]))


def tied_stage():
    return named(tied_modules=named(embed=named(**embedding(1))), **{"3": layer(1, 1)})


@pytest.fixture
def parallel(monkeypatch):
    """parallel(rank, size) sets the tensor-parallel rank."""

    def put(rank, size):
        monkeypatch.setattr("megatron.core.parallel_state.get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr("megatron.core.parallel_state.get_tensor_model_parallel_world_size", lambda: size)

    put(0, 1)
    return put


def weights(model):
    draw_whole(model, ARGS)
    return {name: module.weight.detach().clone() for name, _, module in names_in_our_model(model)}


def test_names_are_those_of_our_model(parallel):
    for model in (whole_model(), pipeline()):
        assert [name for name, _, _ in names_in_our_model(model)] == OURS
    found = [name for stage in (0, 1) for name, _, _ in names_in_our_model(pipeline(stage=stage))]
    assert found == OURS
    assert [name for name, _, _ in names_in_our_model(tied_stage())][:2] == OURS[:2]


def test_both_shapes_and_every_stage_begin_from_the_same_weights(parallel):
    right = weights(whole_model())
    assert all(value.std() > 0.1 for value in right.values())
    assert len({tuple(value.flatten()[:3].tolist()) for value in right.values()}) == len(right)
    for model in (pipeline(), pipeline(stage=0), pipeline(stage=1), tied_stage()):
        for name, found in weights(model).items():
            assert torch.equal(found, right[name]), name
    again = Namespace(**{**vars(ARGS), "seed": 8})
    model = whole_model()
    draw_whole(model, again)
    assert not torch.equal(next(names_in_our_model(model))[2].weight, right[OURS[0]])


def test_shards_put_together_are_the_whole(parallel):
    right = weights(whole_model())
    shards = []
    for rank in (0, 1):
        parallel(rank, 2)
        shards.append(weights(whole_model(tp=2)))
    for name, whole in right.items():
        parts = [shard[name] for shard in shards]
        if name.endswith("linear_fc1.weight"):
            # Each rank has a half of the gate and a half of the up projection.
            found = torch.cat([part.chunk(2)[block] for block in (0, 1) for part in parts])
        elif name == "embedding.position_embeddings.weight":
            assert torch.equal(*parts)
            found = parts[0]
        else:
            found = torch.cat(parts, dim=1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0)
        assert torch.equal(found, whole), name


def test_the_weights_are_those_of_our_own_model(parallel):
    """`models.initialisation` on modules of our names draws the same numbers."""
    right = weights(whole_model())
    config = SimpleNamespace(init_method=draw, use_cpu_initialization=False, gated_linear_unit=True)

    def ours_layer():
        mlp = named(linear_fc1=Linear(2 * FFN, HIDDEN, 1, 0), linear_fc2=Linear(HIDDEN, FFN, 1, 1))
        mlp.linear_fc1.config = config
        attention = named(linear_qkv=Linear(3 * HIDDEN, HIDDEN, 1, 0), linear_proj=Linear(HIDDEN, HIDDEN, 1, 1))
        return named(self_attention=attention, mlp=mlp)

    decoder = named(layers=nn.ModuleList([ours_layer(), ours_layer()]))
    for index, each in enumerate(decoder.layers):
        each.layer_number = index + 1
    model = named(embedding=named(**embedding(1)), decoder=decoder, output_layer=Linear(WORDS, HIDDEN, 1, 0))
    model.config = config
    initialise(model, ARGS.seed)
    for name, found in model.named_parameters():
        assert torch.equal(found, right[name]), name


def test_where_the_host_draws_by_itself():
    for changes in ({"ru_init": "megatron"}, {"zero_stage": 3}, {"num_experts": [4]}):
        assert initialisation_seams(Namespace(**{**vars(ARGS), **changes})) == []
    assert [seam.target for seam in initialisation_seams(ARGS)] == [
        "megatron.core.tensor_parallel.layers:_initialize_affine_weight_gpu",
        "megatron.core.tensor_parallel.layers:_initialize_affine_weight_cpu",
        "megatron.training:get_model",
    ]
