"""Hugging Face's Llama with our ops against itself without them."""

import copy
import inspect

import pytest
import torch

from megatron_ru.foundation.errors import UserError
from megatron_ru.ops import backend, hf_llama
from tests.compiled_calls import CompiledCalls, needs_library

transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip("transformers.models.llama.modeling_llama")


loss_utils = pytest.importorskip("transformers.loss.loss_utils")
needs_shifted_labels = pytest.mark.skipif(
    "shift_labels" not in inspect.signature(loss_utils.ForCausalLMLoss).parameters,
    reason=f"transformers {transformers.__version__} knows no shift_labels",
)

VOCABULARY = 61
PARTS = ["rms_norm", "activation", "rope", "cross_entropy", "linear_cross_entropy"]


def llama(**changes):
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.0,
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | changes)).float()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    return model


IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))
LABELS = IDS.clone()
LABELS[0, :4] = -100
LABELS[1, -1] = -100


def step(model, train=True, **keywords):
    """(loss, logits or None, gradients by name)."""
    model.train(train).zero_grad()
    output = model(IDS, **{"labels": LABELS, **keywords})
    output.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return output.loss.detach(), None if output.logits is None else output.logits.detach(), gradients


def assert_same(found, expected, logits=True):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    if logits:
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
    for name, gradient in expected[2].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[2][name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name)


def snapshot():
    """Everything that a patch of the classes may replace."""
    classes = ("LlamaRMSNorm", "LlamaMLP", "LlamaAttention", "LlamaForCausalLM")
    found = {name: getattr(modeling, name).forward for name in classes}
    found["rotation"] = modeling.apply_rotary_pos_emb
    found["loss"] = inspect.getattr_static(modeling.LlamaForCausalLM, "loss_function")
    return found


@pytest.mark.parametrize("whole_process", [True, False])
@pytest.mark.parametrize("ops", [*PARTS, "all", "rms_norm, rope"])
def test_loss_logits_and_gradients_are_the_unpatched_ones(ops, whole_process):
    model = llama()
    expected = step(model)
    before = snapshot()
    with hf_llama.patch_hf_llama(None if whole_process else model, ops=ops):
        found = step(model)
        evaluated = step(model, train=False)
    fused_loss = ops in ("all", "linear_cross_entropy")
    assert (found[1] is None) is fused_loss
    assert_same(found, expected, logits=not fused_loss)
    # Outside training the logits are there.
    assert_same(evaluated, expected)
    assert snapshot() == before
    assert all("forward" not in vars(module) for module in model.modules())
    assert "_loss_function" not in vars(model)


@needs_library
@pytest.mark.parametrize(
    ("ops", "calls"),
    [
        ("rms_norm", {"norm_forward": 5, "norm_backward": 5}),
        ("activation", {"glu": 2, "glu_backward": 2}),
        # Queries and keys together, forward and backward.
        ("rope", {"rope_qk": 4}),
        ("cross_entropy", {"cross_entropy_one_pass_mean": 1}),
        ("none", {}),
    ],
)
def test_each_part_calls_its_op(ops, calls):
    model = llama()
    with hf_llama.patch_hf_llama(model, ops=ops), CompiledCalls() as counted:
        step(model)
    counted.calls.pop("cross_entropy_rescale_", None)
    assert counted.calls == calls


@needs_library
def test_in_training_the_loss_comes_from_the_hidden_states():
    model = llama()
    with hf_llama.patch_hf_llama(model, ops="linear_cross_entropy"), CompiledCalls() as counted:
        step(model)
    # Logits of a chunk become their gradient where they lie, instead of being kept for a backward.
    assert counted.calls["cross_entropy_gradient_"] == 1
    assert set(counted.calls) <= {"cross_entropy_gradient_", "cross_entropy_rescale_"}


def test_only_the_given_model_is_patched():
    patched, other = llama(), llama()
    expected = step(other)
    handle = hf_llama.patch_hf_llama(patched)
    for module in other.modules():
        assert "forward" not in vars(module)
    with CompiledCalls() as counted:
        assert_same(step(other), expected)
    assert counted.calls == {}
    handle.undo()
    handle.undo()


def test_a_copy_of_a_patched_model_uses_its_own_weights():
    model = llama()
    with hf_llama.patch_hf_llama(model):
        twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(step(twin, train=False), step(llama(), train=False))


def test_names_and_weights_stay():
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with hf_llama.patch_hf_llama(model):
        assert list(model.state_dict()) == list(before)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("keywords", [{}, {"num_beams": 2}])
def test_generation_is_the_same(keywords):
    model = llama().eval()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **keywords}
    expected = model.generate(IDS, attention_mask=torch.ones_like(IDS), **settings)
    with hf_llama.patch_hf_llama(model), torch.no_grad():
        found = model.generate(IDS, attention_mask=torch.ones_like(IDS), **settings)
    assert torch.equal(found, expected)


def test_padding_on_the_left_gives_each_sequence_its_own_positions():
    model = llama().eval()
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    keywords = {"attention_mask": mask, "position_ids": positions}
    expected = step(model, train=False, **keywords)
    plain = step(model, train=False, attention_mask=mask)
    assert (expected[0] - plain[0]).abs() >= 0
    with hf_llama.patch_hf_llama(model):
        assert_same(step(model, train=False, **keywords), expected)
        # The tables of the last call are not those of this one.
        assert_same(step(model, train=False, attention_mask=mask), plain)


@pytest.mark.parametrize("ops", ["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize("items", [7, torch.tensor(7)])
def test_the_sum_over_a_given_number_of_items(ops, items):
    # As the Trainer does with accumulated gradients.
    model = llama()
    expected = step(model, num_items_in_batch=items)
    assert expected[0] > 1.01 * step(model)[0]
    with hf_llama.patch_hf_llama(model, ops=ops):
        found = step(model, num_items_in_batch=items)
    assert_same(found, expected, logits=ops == "cross_entropy")


@needs_shifted_labels
@pytest.mark.parametrize("ops", ["cross_entropy", "linear_cross_entropy"])
def test_labels_that_are_shifted_already_and_another_ignored_id(ops):
    model = llama()
    shifted = torch.nn.functional.pad(LABELS, (0, 1), value=-100)[:, 1:].clone()
    shifted[shifted == -100] = 5
    expected = step(model, shift_labels=shifted, ignore_index=5)
    with hf_llama.patch_hf_llama(model, ops=ops):
        assert_same(step(model, shift_labels=shifted, ignore_index=5), expected, logits=ops == "cross_entropy")


def test_gradients_accumulate_and_scale():
    model = llama()

    def accumulate():
        model.train().zero_grad()
        for weight in (0.25, 3.0):
            (weight * model(IDS, labels=LABELS).loss).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = accumulate()
    for ops in ("cross_entropy", "linear_cross_entropy"):
        with hf_llama.patch_hf_llama(model, ops=ops):
            found = accumulate()
        for name, gradient in expected.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_gradient_checkpointing():
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = step(model)
    with hf_llama.patch_hf_llama(model):
        assert_same(step(model), expected, logits=False)


def test_tied_embeddings():
    model = llama(tie_word_embeddings=True)
    expected = step(model)
    with hf_llama.patch_hf_llama(model):
        assert_same(step(model), expected, logits=False)


@needs_library
def test_bf16_is_as_near_to_fp32_as_the_unpatched_model():
    exact = step(llama(), train=False)
    model = llama().bfloat16()
    plain = step(model, train=False)
    with hf_llama.patch_hf_llama(model):
        found = step(model, train=False)
    assert found[1].dtype == torch.bfloat16
    error, own = (found[1].float() - exact[1]).abs().mean(), (plain[1].float() - exact[1]).abs().mean()
    assert error < 1.2 * own


def test_a_tuple_instead_of_an_output():
    model = llama().train()
    expected = model(IDS, labels=LABELS, use_cache=False).loss
    with hf_llama.patch_hf_llama(model):
        found = model(IDS, labels=LABELS, use_cache=False, return_dict=False)
    assert isinstance(found, tuple)
    torch.testing.assert_close(found[0], expected)


@needs_shifted_labels
def test_asking_for_some_logits_in_training_gives_them():
    model = llama().train()
    shift = torch.full((2, 3), 7)
    expected = model(IDS, labels=IDS, shift_labels=shift, logits_to_keep=3)
    with hf_llama.patch_hf_llama(model):
        found = model(IDS, labels=IDS, shift_labels=shift, logits_to_keep=3)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss)


def test_a_loss_of_the_user_s_own_is_kept():
    model = llama().train()
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum() * 0 + 5
    with hf_llama.patch_hf_llama():
        output = model(IDS, labels=LABELS)
    assert output.loss.item() == 5
    assert output.logits.shape == (2, 9, VOCABULARY)


def test_an_output_layer_that_is_more_than_a_matrix_is_called():
    model = llama().train()

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    doubled = Doubled(32, VOCABULARY, bias=False)
    doubled.weight = model.lm_head.weight
    model.lm_head = doubled
    expected = step(model)
    with hf_llama.patch_hf_llama(model):
        found = step(model)
    assert_same(found, expected)


@pytest.mark.parametrize("act", ["gelu", "relu", "gelu_pytorch_tanh"])
def test_other_gates(act):
    # The tanh form of GELU is no gate of ours: Llama's own code runs.
    model = llama(hidden_act=act)
    expected = step(model)
    with hf_llama.patch_hf_llama(model, ops="activation"), CompiledCalls() as counted:
        assert_same(step(model), expected)
    if backend.library_status().path is not None:
        assert ("glu" in counted.calls) is (act != "gelu_pytorch_tanh")


def test_the_base_model_alone():
    model = llama().model
    ids = {"input_ids": IDS}
    expected = model(**ids).last_hidden_state
    with hf_llama.patch_hf_llama(model):
        torch.testing.assert_close(model(**ids).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


def test_models_built_later_are_patched_with_the_classes():
    with hf_llama.patch_hf_llama(ops="rms_norm"):
        model = llama()
        with CompiledCalls() as counted:
            found = step(model)
    assert_same(found, step(llama()))
    if backend.library_status().path is not None:
        assert counted.calls["norm_forward"] == 5


@pytest.mark.parametrize("ops", PARTS)
def test_patching_the_classes_twice(ops):
    before = snapshot()
    with hf_llama.patch_hf_llama(ops=ops):
        with pytest.raises(UserError, match="patched already"):
            hf_llama.patch_hf_llama(ops="rms_norm," + ops)
        if ops != "rms_norm":
            assert modeling.LlamaRMSNorm.forward is before["LlamaRMSNorm"], "half a patch was left"
    assert snapshot() == before


def test_unknown_words():
    with pytest.raises(UserError) as error:
        hf_llama.patch_hf_llama(ops="rms_norm,adamw")
    assert str(error.value) == (
        "ops='rms_norm,adamw': Llama has no place for 'adamw', expected all, none, or words of rms_norm, activation, "
        "rope, cross_entropy, linear_cross_entropy"
    )


def test_another_model():
    with pytest.raises(UserError, match=r"^this Linear holds no LlamaRMSNorm of transformers, expected a LlamaForCaus"):
        hf_llama.patch_hf_llama(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("ops", PARTS)
def test_a_version_that_moved_what_is_replaced(monkeypatch, ops):
    names = {"rms_norm": "LlamaRMSNorm", "activation": "LlamaMLP", "rope": "LlamaAttention"}
    name = names.get(ops, "LlamaForCausalLM")
    version = transformers.__version__

    class Moved:
        def forward(self, x):
            return x

    with monkeypatch.context() as patched:
        patched.delattr(modeling, name)
        with pytest.raises(UserError, match=f"^transformers {version}: has no {name}, so {name} cannot be patched"):
            hf_llama.patch_hf_llama(ops=ops)
    with monkeypatch.context() as patched:
        patched.setattr(modeling, name, Moved)
        with pytest.raises(
            UserError, match=f"^transformers {version}: {name}.forward does not use .*leave that op out"
        ):
            hf_llama.patch_hf_llama(ops=ops)


def test_from_the_package():
    import megatron_ru.ops

    assert megatron_ru.ops.patch_hf_llama is hf_llama.patch_hf_llama
    with pytest.raises(AttributeError, match="no_such_op"):
        _ = megatron_ru.ops.no_such_op
