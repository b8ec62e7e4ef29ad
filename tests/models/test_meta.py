"""A model built on meta is the model, and nobody held its weights twice."""

import pytest
import torch
from torch import nn

from megatron_ru.foundation.errors import UserError
from megatron_ru.models import meta
from megatron_ru.models.meta import materialise, on_meta


def parameters_of(model):
    return dict(model.named_parameters())


def marks(parameter):
    """What Megatron wrote on a weight, as far as it can be compared."""
    return {name: value for name, value in vars(parameter).items() if isinstance(value, (bool, int, str))}


@pytest.mark.parametrize("name", ["llama3_tiny", "gpt2_tiny", "rugpt3_13b", "ru_demo", "gpt2_pos_every_layer"])
def test_the_model_is_the_one_that_is_built_in_memory(build_gpt, name):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 128}
    expected = build_gpt(name, sizes=sizes, meta="off")[0]
    model = build_gpt(name, sizes=sizes, meta="on")[0]
    found, wanted = parameters_of(model), parameters_of(expected)
    assert found.keys() == wanted.keys()
    for key, weight in found.items():
        assert torch.equal(weight, wanted[key]), key
        assert weight.dtype == wanted[key].dtype
        assert marks(weight) == marks(wanted[key]), key
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer, dict(expected.named_buffers())[key]), key


@pytest.mark.parametrize("config", [{"use_cpu_initialization": True}, {"params_dtype": torch.bfloat16}])
def test_so_it_is_on_the_cpu_and_in_bf16(build_gpt, config):
    expected = parameters_of(build_gpt("llama3_tiny", config=config, meta="off")[0])
    for key, weight in parameters_of(build_gpt("llama3_tiny", config=config, meta="on")[0]).items():
        assert torch.equal(weight, expected[key]), key
        # Megatron turns what is left, the norms, after the building.
        assert weight.dtype == (config.get("params_dtype", torch.float32) if weight.dim() == 2 else torch.float32)


def test_no_memory_is_given_before_the_model_is_complete(build_gpt, monkeypatch):
    found = {}

    def looking(model, device):
        found.update({name: parameter.is_meta for name, parameter in model.named_parameters()})
        return materialise(model, device)

    monkeypatch.setattr(meta, "materialise", looking)
    build_gpt("ru_demo", meta="on")
    matrices = {name for name, parameter in parameters_of(build_gpt("ru_demo")[0]).items() if parameter.dim() == 2}
    assert {name for name, on in found.items() if on} == matrices
    found.clear()
    build_gpt("ru_demo", meta="off")
    assert not found


@pytest.mark.parametrize("name", ["gpt2_tiny", "rugpt3_13b", "ru_demo", "gpt2_pos_every_layer"])
def test_weights_that_are_taken_by_the_module_are_the_same(build_gpt, name):
    taken = {}

    def take(weights):
        for weight in weights:
            assert not weight.is_meta
            taken[weight] = weight.detach().clone()
            weight.data = torch.zeros((), dtype=weight.dtype).expand(weight.shape)

    expected = build_gpt(name, meta="off")[0]
    model = build_gpt(name, meta="on", hand_over=take)[0]
    wanted = parameters_of(expected)
    assert list(parameters_of(model)) == list(wanted)
    # In the order of the model, which all ranks have.
    assert [*taken] == [*model.parameters()]
    for key, weight in parameters_of(model).items():
        assert torch.equal(taken[weight], wanted[key]), key
        assert marks(weight) == marks(wanted[key]), key


def test_no_more_than_one_module_has_memory_when_its_weights_are_taken(build_gpt, monkeypatch):
    made = []
    original = meta.materialise_own

    def making(name, module, device, replaced):
        found = original(name, module, device, replaced)
        made.extend(weight for _, weight in found)
        return found

    monkeypatch.setattr(meta, "materialise_own", making)
    together = []

    def take(weights):
        together.append(len(made))
        assert {id(weight) for weight in made} <= {id(weight) for weight in weights}
        made.clear()

    build_gpt("llama3_tiny", meta="on", hand_over=take)
    # Two layers of four matrices, two tables.
    assert max(together) == 1
    assert sum(together) == 10


def test_without_meta_nothing_is_taken(build_gpt):
    build_gpt("llama3_tiny", meta="off", hand_over=lambda weights: pytest.fail("taken"))


def test_the_random_state_is_where_it_would_be(build_gpt):
    states = []
    for how in ("off", "on"):
        torch.manual_seed(3)
        build_gpt("rugpt3_13b", meta=how)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_only_matrices_that_say_what_they_are_have_no_memory():
    with on_meta():
        assert torch.empty(2, 3, dtype=torch.bfloat16).is_meta
        assert torch.empty((2, 3), device="cpu").is_meta
        assert torch.empty(2, 2, 3, device="cpu").is_meta
        assert not torch.empty(2, 3).is_meta
        assert not torch.empty(3, dtype=torch.bfloat16).is_meta
        assert not torch.empty(2, 3, dtype=torch.int64).is_meta
        assert not torch.zeros(2, 3, dtype=torch.bfloat16).is_meta
        assert not nn.Embedding(2, 3).weight.is_meta
    assert not torch.empty(2, 3, dtype=torch.bfloat16).is_meta


@pytest.mark.parametrize("persistent", [True, False])
def test_a_matrix_that_is_no_weight_is_refused(persistent):
    model = nn.Linear(2, 2)
    matrix = torch.empty(2, 2, device="meta")
    if persistent:
        model.register_buffer("table", matrix)
    else:
        model.table = matrix
    with pytest.raises(UserError, match=r"table is no weight .* --ru-meta-init off"):
        materialise(model, torch.device("cpu"))


def test_a_weight_that_megatron_alone_can_draw_is_refused(build_gpt, monkeypatch):
    monkeypatch.setattr("megatron_ru.models.initialisation.draws", lambda parameter: False)
    with pytest.raises(UserError, match=r"embedding\.word_embeddings\.weight is drawn by .* --ru-meta-init off"):
        build_gpt("llama3_tiny", meta="on")
    build_gpt("llama3_tiny", meta="off")
    build_gpt("llama3_tiny", meta="on", config={"perform_initialization": False})


def test_what_stands_in_two_places_stays_one():
    model = nn.Sequential(nn.Linear(2, 2, bias=False, device="meta"), nn.Linear(2, 2, device="meta"))
    model[1].weight = model[0].weight
    model[0].weight.tensor_model_parallel = True
    found = materialise(model, torch.device("cpu"))
    assert [name for name, _ in found] == ["0.weight", "1.bias"]
    assert model[0].weight is model[1].weight is found[0][1]
    assert model[0].weight.tensor_model_parallel is True
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert materialise(model, torch.device("cpu")) == []
