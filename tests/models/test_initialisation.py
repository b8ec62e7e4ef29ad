"""Initial weights depend on the seed and the name alone."""

import math

import pytest
import torch
from megatron.core import parallel_state

from megatron_ru.models.initialisation import _MARK, initialisation_seams, initialise

WIDE = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 128}


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name


def matrices(weights):
    return {name: weight for name, weight in weights.items() if weight.dim() == 2}


def test_the_same_seed_gives_the_same_weights_whatever_the_state(build_gpt):
    torch.manual_seed(1)
    first, _ = build_gpt("llama3_tiny")
    torch.manual_seed(2)
    again, _ = build_gpt("llama3_tiny")
    assert_equal(weights_of(again), weights_of(first))
    other = weights_of(build_gpt("llama3_tiny", seed=8)[0])
    for name, weight in matrices(weights_of(first)).items():
        assert not torch.equal(weight, other[name]), name


def test_left_to_megatron_it_is_megatron_s(build_gpt):
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    first = weights_of(build_gpt("llama3_tiny", init="megatron")[0])
    again = weights_of(build_gpt("llama3_tiny", init="megatron")[0])
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    assert not torch.equal(first[name], again[name])
    whole = weights_of(build_gpt("llama3_tiny")[0])
    assert not torch.equal(first[name], whole[name])


def test_weights_of_one_shape_differ(build_gpt):
    weights = matrices(weights_of(build_gpt("llama2_tiny", sizes={"num_layers": 3})[0]))
    for name, weight in weights.items():
        for other, candidate in weights.items():
            if name < other and weight.shape == candidate.shape:
                assert not torch.equal(weight, candidate), f"{name} is {other}"


def test_the_global_random_state_does_not_move(build_gpt):
    model, _ = build_gpt("llama3_tiny")
    torch.manual_seed(4)
    before = torch.get_rng_state()
    initialise(model, 7)
    assert torch.equal(torch.get_rng_state(), before)


def test_norms_and_biases_stay(build_gpt):
    for name, parameter in build_gpt("gpt2_rope_preln")[0].named_parameters():
        if parameter.dim() == 1:
            value = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            assert (parameter == value).all(), name


def test_the_spread_is_the_config_s(build_gpt):
    config = {"init_method_std": 0.03}
    model, variant = build_gpt("rugpt3_13b", sizes={**WIDE, "num_layers": 2, "seq_length": 64}, config=config)
    for name, weight in matrices(weights_of(model)).items():
        scaled = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        # Outputs into the residual stream: std / sqrt(2·layers), Radford et al., 2019.
        expected = 0.03 / math.sqrt(2 * variant.num_layers) if scaled else 0.03
        # Some thousands of draws: the spread is known to 4 standard errors within 5%.
        assert weight.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(weight.mean().item()) < 4 * expected / math.sqrt(weight.numel()), name


def test_the_tied_output_is_the_embedding(build_gpt):
    tied, _ = build_gpt("ru_demo")
    assert "output_layer.weight" not in weights_of(tied)
    # The last stage of a pipeline has an output layer of its own.
    last, _ = build_gpt("ru_demo", model={"pre_process": False})
    assert torch.equal(last.output_layer.weight, tied.embedding.word_embeddings.weight)
    untied, _ = build_gpt("llama2_tiny")
    assert not torch.equal(untied.output_layer.weight, untied.embedding.word_embeddings.weight)


def test_a_pipeline_stage_draws_the_weights_of_its_own_layers(build_gpt):
    whole = weights_of(build_gpt("llama2_tiny", sizes={"num_layers": 4})[0])
    stage, _ = build_gpt("llama2_tiny", sizes={"num_layers": 4}, model={"pre_process": False})
    # As on the second of two stages: it holds layers 3 and 4 of the model under the names of 0 and 1.
    del stage.decoder.layers[:2]
    assert [layer.layer_number for layer in stage.decoder.layers] == [3, 4]
    with torch.no_grad():
        for parameter in stage.parameters():
            if parameter.dim() == 2:
                parameter.zero_()
    initialise(stage, 7)
    for name, parameter in stage.named_parameters():
        renamed = name.replace("layers.1.", "layers.3.").replace("layers.0.", "layers.2.")
        assert torch.equal(parameter, whole[renamed]), name


def shard(part, rank, size, monkeypatch):
    """What rank `rank` of `size` would hold: the model with its parallel weights cut and drawn again."""
    for module in part.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            noted = getattr(parameter, _MARK, None)
            if noted is None:
                continue
            shape = list(parameter.shape)
            assert shape[noted.partition_dim] % size == 0
            shape[noted.partition_dim] //= size
            empty = torch.nn.Parameter(torch.full(shape, float("nan")))
            setattr(empty, _MARK, noted)
            setattr(module, name, empty)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: size)
    initialise(part, 7)
    return part


@pytest.mark.parametrize("name", ["llama3_tiny", "gpt2_tiny", "ru_demo", "activation_reglu"])
@pytest.mark.parametrize("size", [2, 4])
def test_shards_are_cut_from_the_whole(build_gpt, name, size, monkeypatch):
    sizes = {**WIDE, "num_attention_heads": 16}
    whole, variant = build_gpt(name, sizes=sizes)
    parts = [shard(build_gpt(name, sizes=sizes)[0], rank, size, monkeypatch) for rank in range(size)]
    monkeypatch.undo()
    cut = 0
    for name, parameter in whole.named_parameters():
        shards = [part.get_parameter(name) for part in parts]
        noted = getattr(parameter, _MARK, None)
        if noted is None:
            assert all(torch.equal(found, parameter) for found in shards), name
            continue
        cut += 1
        if name.endswith("linear_fc1.weight") and variant.gated:
            # A rank holds its part of the gate above its part of the up projection.
            gates, ups = zip(*(found.chunk(2) for found in shards), strict=True)
            joined = torch.cat((*gates, *ups))
        else:
            joined = torch.cat(shards, dim=noted.partition_dim)
        assert torch.equal(joined, parameter), name
    assert cut == 1 + 4 * variant.num_layers + (not variant.tied_embeddings)
    rows = {"linear_qkv": 0, "linear_fc1": 0, "linear_proj": 1, "linear_fc2": 1, "word_embeddings": 0}
    for name, parameter in whole.named_parameters():
        for part, dim in rows.items():
            if name.endswith(f"{part}.weight"):
                assert getattr(parameter, _MARK).partition_dim == dim, name


def test_learned_positions_are_whole_on_every_rank(build_gpt, monkeypatch):
    whole, _ = build_gpt("rugpt3_13b", sizes=WIDE)
    part = shard(build_gpt("rugpt3_13b", sizes=WIDE)[0], 1, 2, monkeypatch)
    assert torch.equal(part.embedding.position_embeddings.weight, whole.embedding.position_embeddings.weight)


def test_drawing_on_the_cpu_gives_the_same(build_gpt):
    whole = weights_of(build_gpt("llama3_tiny")[0])
    assert_equal(weights_of(build_gpt("llama3_tiny", config={"use_cpu_initialization": True})[0]), whole)


def test_weights_in_bf16_are_the_rounded_ones(build_gpt):
    whole = weights_of(build_gpt("llama3_tiny")[0])
    config = {"params_dtype": torch.bfloat16}
    for name, weight in matrices(weights_of(build_gpt("llama3_tiny", config=config)[0])).items():
        assert torch.equal(weight, whole[name].bfloat16()), name


def test_without_initialisation_nothing_is_drawn(build_gpt):
    model, _ = build_gpt("llama3_tiny", config={"perform_initialization": False})
    linear = model.decoder.layers[0].mlp.linear_fc1.weight
    with torch.no_grad():
        linear.fill_(5)
    initialise(model, 7)
    assert (linear == 5).all()


def test_weights_are_pinned(build_gpt):
    # A change of these numbers changes the first loss of every run: it belongs in the changelog.
    model, _ = build_gpt("llama2_tiny")
    linear = model.decoder.layers[1].mlp.linear_fc2.weight
    # Torch draws with or without vector instructions, which moves the last digits.
    assert linear.flatten()[:3].tolist() == pytest.approx([0.008528328, 0.003271159, -0.006990001], abs=1e-7)


def test_the_seams_fit_this_megatron():
    for seam in initialisation_seams():
        assert seam.install()
        seam.undo()
