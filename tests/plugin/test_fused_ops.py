"""Each replaced name of Megatron against Megatron's own: values, gradients, and what is handed back to it."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core import optimizer, tensor_parallel
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.language_module import language_module
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import mlp

from megatron_ru.ops import backend
from megatron_ru.plugin.fused_ops import fused_op_seams
from megatron_ru.plugin.optimizer_step import MegatronAdamW
from megatron_ru.seams.seam import Seam
from tests.compiled_calls import CompiledCalls, needs_library
from tests.models.test_rotary import angles_of


@pytest.fixture
def install():
    """install(words) installs the seams of these ops; all are taken back afterwards."""
    installed: list[Seam] = []
    before = ",".join(backend.selected()) or "none"

    def put(words):
        backend.select(words)
        for seam in fused_op_seams():
            assert seam.install()
            installed.append(seam)

    yield put
    for seam in reversed(installed):
        seam.undo()
    backend.select(before)


def leaf(*shape, dtype=torch.float32, seed=0, size=1.0):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
    return made.to(dtype).requires_grad_()


def run(function, *leaves):
    """(result, gradients of the leaves) under a gradient that is not constant."""
    for each in leaves:
        each.grad = None
    found = function()
    upstream = torch.linspace(-1, 2, found.numel()).view(found.shape).to(found.dtype)
    found.backward(upstream)
    return found.detach(), [each.grad.clone() for each in leaves]


def test_every_name_is_replaced_and_given_back(install):
    places = {
        "rope": [(rope_utils, "_apply_rotary_pos_emb_bshd")],
        "activation": [(mlp, "bias_swiglu_impl"), (mlp, "bias_gelu_impl")],
        "cross_entropy": [
            (language_module, "fused_vocab_parallel_cross_entropy"),
            (tensor_parallel, "vocab_parallel_cross_entropy"),
        ],
        "adamw": [(optimizer, "torch")],
    }
    before = {name: [getattr(*place) for place in of] for name, of in places.items()}
    for chosen in places:
        with backend.only(chosen):
            seams = fused_op_seams()
            for seam in seams:
                assert seam.install()
        for name, of in places.items():
            now = [getattr(*place) for place in of]
            assert (now != before[name]) is (name == chosen), (name, chosen)
        for seam in seams:
            seam.undo()
        assert {name: [getattr(*place) for place in of] for name, of in places.items()} == before
    with backend.only("none"):
        assert fused_op_seams() == []


# -------------------------------------------------------------------------------------------------------------- rope


def rope_config(**changes):
    settings = {"apply_rope_fusion": False, "rotary_interleaved": False, "multi_latent_attention": False,
                "mrope_section": None}  # fmt: skip
    return SimpleNamespace(**settings | changes)


def rotate(t, angles, **keywords):
    config = rope_config(rotary_interleaved=keywords.pop("interleaved", False))
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    return rope_utils.apply_rotary_pos_emb(t, angles, config, cp_group=group, **keywords)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [8, 6])
@pytest.mark.parametrize("mscale", [1.0, 1.3])
def test_rotation_is_megatron_s(install, interleaved, rotary, mscale):
    mixed = leaf(5, 2, 3, 24)
    angles = angles_of(5, rotary, interleaved)

    def turned():
        # A slice of the mixed projection, as attention has it.
        return rotate(mixed[..., 8:16], angles, interleaved=interleaved, mscale=mscale)

    expected, [expected_gradient] = run(turned, mixed)
    install("rope")
    found, [gradient] = run(turned, mixed)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-6)


@needs_library
def test_rotation_calls_the_op(install):
    t, angles = leaf(5, 2, 3, 8), angles_of(5, 8)
    install("rope")
    with CompiledCalls() as counted:
        run(lambda: rotate(t, angles), t)
    # Forward and backward.
    assert counted.calls == {"rope": 2}


@needs_library
def test_bf16_is_rotated_in_fp32_and_rounded_once(install):
    t, angles = leaf(64, 1, 2, 32, dtype=torch.bfloat16), angles_of(64, 32)
    exact = rope_utils._apply_rotary_pos_emb_bshd(t.detach().double(), angles.double())
    own = (rotate(t, angles).double() - exact).abs().max()
    install("rope")
    found = rotate(t, angles)
    assert found.dtype == torch.bfloat16
    error = (found.double() - exact).abs().max()
    assert error < exact.abs().max() * 2**-8
    assert error < own


def test_what_the_op_is_not_made_for_is_megatron_s_bit_for_bit(install):
    t, angles = leaf(6, 2, 3, 8), angles_of(6, 8)
    per_sequence = torch.cat((angles, angles + 1), dim=1)
    packed, boundaries = leaf(6, 3, 8), torch.tensor([0, 2, 6], dtype=torch.int32)

    def results():
        return [
            rotate(t, angles, mla_rotary_interleaved=True),
            rotate(t, per_sequence),
            rope_utils._apply_rotary_pos_emb_bshd(t[:, 0], angles[:, 0]),
            # Positional, as its signature allows.
            rope_utils._apply_rotary_pos_emb_bshd(t, angles, False, True, 1.5),
        ]

    expected, expected_packed = results(), rotate(packed, angles, cu_seqlens=boundaries)
    install("rope")
    for one, other in zip(results(), expected, strict=True):
        assert torch.equal(one, other)
    # Packed sequences are cut by Megatron and rotated piece by piece.
    torch.testing.assert_close(rotate(packed, angles, cu_seqlens=boundaries), expected_packed, rtol=1e-6, atol=1e-6)


def test_fused_rotation_stays_unavailable_where_there_is_none(install, monkeypatch):
    # Megatron refuses --apply-rope-fusion by finding None.
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", None)
    install("rope")
    assert rope_utils.fused_apply_rotary_pos_emb is None


def test_fused_rotation_is_ours_where_the_flag_asks_for_it(install, monkeypatch):
    t, angles = leaf(5, 2, 3, 8), angles_of(5, 8)
    expected, [expected_gradient] = run(lambda: rotate(t, angles), t)
    theirs = []

    def fused(t, freqs, transpose_output_memory=False, interleaved=False):
        theirs.append(t.shape)
        return rope_utils._apply_rotary_pos_emb_bshd(t, freqs, rotary_interleaved=interleaved)

    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", fused)
    install("rope")
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    config = rope_config(apply_rope_fusion=True)
    found, [gradient] = run(lambda: rope_utils.apply_rotary_pos_emb(t, angles, config, cp_group=group), t)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-6)
    if backend.library_status().path is not None:
        assert theirs == []
    double = t.detach().double()
    rope_utils.apply_rotary_pos_emb(double, angles, config, cp_group=group)
    assert theirs[-1] == double.shape, "what the op does not take goes to TransformerEngine"


# -------------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 12), (3, 2, 12)])
def test_swiglu_of_megatron_s_own_mlp(install, shape, bias):
    x, b = leaf(*shape), leaf(12, seed=1)
    leaves = (x, b) if bias else (x,)
    expected = run(lambda: mlp.bias_swiglu_impl(x, b if bias else None, False, False), *leaves)
    install("activation")
    found = run(lambda: mlp.bias_swiglu_impl(x, b if bias else None, False, False), *leaves)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_bias_gelu_of_megatron_s_own_mlp(install):
    x, b = leaf(3, 2, 12), leaf(12, seed=1)
    expected, gradients = run(lambda: mlp.bias_gelu_impl(x, b), x)
    install("activation")
    found, again = run(lambda: mlp.bias_gelu_impl(x, b), x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again, gradients, rtol=1e-5, atol=1e-6)


def test_swiglu_with_a_bound_or_an_fp8_store_is_megatron_s(install, monkeypatch):
    asked = []

    def bias_swiglu(input, bias, *others):
        asked.append(others)
        return "theirs"

    monkeypatch.setattr(mlp, "bias_swiglu_impl", bias_swiglu)
    install("activation")
    x = torch.randn(2, 6)
    assert mlp.bias_swiglu_impl(x, None, True, False) == "theirs"
    assert mlp.bias_swiglu_impl(x, None, False, True) == "theirs"
    assert mlp.bias_swiglu_impl(x, None, False, False, 7.0) == "theirs"
    assert asked == [(True, False), (False, True), (False, False, 7.0)]


@needs_library
def test_activations_call_the_op(install):
    x, b = leaf(3, 2, 12), leaf(12)
    install("activation")
    with CompiledCalls() as counted:
        run(lambda: mlp.bias_swiglu_impl(x, b, False, False), x, b)
        run(lambda: mlp.bias_gelu_impl(x, b), x, b)
    assert counted.calls == {"activation": 2, "activation_backward": 2}


# ------------------------------------------------------------------------------------------------------ cross entropy


def loss_functions(parallel_state):
    group = parallel_state.get_tensor_model_parallel_group()
    return {
        "plain": lambda logits, labels: tensor_parallel.vocab_parallel_cross_entropy(logits, labels, tp_group=group),
        "plain, no group": lambda logits, labels: tensor_parallel.vocab_parallel_cross_entropy(logits, labels),
        "fused": lambda logits, labels: language_module.fused_vocab_parallel_cross_entropy(logits, labels, group),
    }


# Megatron's own writes into fp32 logits, so they are a copy each time. 37 is no multiple of any vector width.
SEQUENCE, BATCH, VOCABULARY = 6, 3, 37
LABELS = torch.arange(SEQUENCE * BATCH).view(SEQUENCE, BATCH) * 5 % VOCABULARY


@pytest.mark.parametrize("kind", ["plain", "plain, no group", pytest.param("fused", marks=needs_library)])
def test_loss_is_megatron_s(one_process, install, kind):
    weight = leaf(SEQUENCE, BATCH, VOCABULARY, size=3.0)

    def losses():
        return loss_functions(one_process)[kind](weight * 1, LABELS)

    expected, [expected_gradient] = run(losses, weight)
    install("cross_entropy")
    found, [gradient] = run(losses, weight)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    if kind != "fused":
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-7)
    else:
        # Megatron's own is cut to bf16; ours is that of the plain form.
        plain = run(lambda: torch.nn.functional.cross_entropy(
            weight.flatten(0, 1), LABELS.flatten(), reduction="none").view(SEQUENCE, BATCH), weight)[1][0]  # fmt: skip
        torch.testing.assert_close(gradient, plain, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(gradient, expected_gradient, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_label_smoothing_as_megatron_counts_it(one_process, install, smoothing):
    weight = leaf(SEQUENCE, BATCH, VOCABULARY, size=3.0)

    def losses():
        return tensor_parallel.vocab_parallel_cross_entropy(weight * 1, LABELS, label_smoothing=smoothing)

    expected, [expected_gradient] = run(losses, weight)
    install("cross_entropy")
    found, [gradient] = run(losses, weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


@needs_library
def test_bf16_logits_are_neither_copied_to_fp32_nor_kept(one_process, install):
    weight = leaf(SEQUENCE, BATCH, VOCABULARY, dtype=torch.bfloat16, size=3.0)
    exact = torch.nn.functional.cross_entropy(
        weight.detach().double().flatten(0, 1), LABELS.flatten(), reduction="none"
    ).view(SEQUENCE, BATCH)
    install("cross_entropy")
    logits = weight * 1
    kept = []
    with (
        CompiledCalls() as counted,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        loss = tensor_parallel.vocab_parallel_cross_entropy(logits, LABELS)
    with counted:
        loss.sum().backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
    assert not any(t.numel() == logits.numel() and t.data_ptr() != logits.data_ptr() for t in kept)
    assert counted.calls == {"cross_entropy_statistics": 1, "cross_entropy_merge": 1, "cross_entropy_backward_": 1}
    # The gradient lies where the logits were.
    assert torch.equal(logits.detach(), weight.grad)


@needs_library
def test_a_leaf_is_not_written_over(one_process, install):
    logits = leaf(SEQUENCE, BATCH, VOCABULARY)
    before = logits.detach().clone()
    install("cross_entropy")
    tensor_parallel.vocab_parallel_cross_entropy(logits, LABELS).sum().backward()
    assert torch.equal(logits.detach(), before)


@needs_library
def test_ids_below_zero_have_no_loss(one_process, install):
    weight = leaf(SEQUENCE, BATCH, VOCABULARY)
    labels = LABELS.clone()
    labels[1], labels[2, 0] = -100, -1
    install("cross_entropy")
    found, [gradient] = run(lambda: tensor_parallel.vocab_parallel_cross_entropy(weight * 1, labels), weight)
    assert not found[labels < 0].any()
    assert not gradient[labels < 0].any()
    assert found[labels >= 0].all()


# ---------------------------------------------------------------------------------------------------------- optimizer


def optimizer_of(module, **changes):
    settings = {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95,
                "adam_eps": 1e-8, "clip_grad": 0.0}  # fmt: skip
    built = get_megatron_optimizer(OptimizerConfig(**settings | changes), [module])
    return getattr(built, "chained_optimizers", [built])[0]


class TwoLayers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        from megatron.core.distributed import DistributedDataParallelConfig
        from megatron.core.transformer.transformer_config import TransformerConfig

        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(9, 5), torch.nn.Linear(5, 1)
        self.config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        self.ddp_config = DistributedDataParallelConfig()

    def train_steps(self, steps):
        built = optimizer_of(self)
        for step in range(steps):
            for index, parameter in enumerate(self.parameters()):
                generator = torch.Generator().manual_seed(31 * step + index)
                parameter.grad = None
                parameter.main_grad = torch.randn(parameter.shape, generator=generator)
            built.step()
        return built.optimizer, [parameter.detach().clone() for parameter in self.parameters()]


@pytest.mark.skipif(not optimizer.USING_PYTORCH_OPTIMIZER, reason="Adam comes from Apex or TransformerEngine here")
def test_megatron_builds_our_adamw_and_it_steps_as_torch_s(one_process, install):
    theirs, expected = TwoLayers().train_steps(5)
    assert type(theirs) is torch.optim.AdamW
    install("adamw")
    with CompiledCalls() as counted:
        ours, found = TwoLayers().train_steps(5)
    assert type(ours) is MegatronAdamW
    assert torch.optim.AdamW is not MegatronAdamW, "torch itself is left alone"
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert [group["weight_decay"] for group in ours.param_groups] == [g["weight_decay"] for g in theirs.param_groups]
    if backend.library_status().path is not None:
        assert counted.calls["adamw_"] >= 5


@pytest.mark.skipif(not optimizer.USING_PYTORCH_OPTIMIZER, reason="Adam comes from Apex or TransformerEngine here")
def test_adam_with_coupled_decay_stays_torch_s(one_process, install):
    install("adamw")
    assert type(optimizer_of(TwoLayers(), decoupled_weight_decay=False).optimizer) is torch.optim.Adam


def test_the_rest_of_torch_is_found_behind_the_replaced_name(install):
    install("adamw")
    assert optimizer.torch is not torch
    assert optimizer.torch.Tensor is torch.Tensor
    assert optimizer.torch.optim.SGD is torch.optim.SGD
    assert optimizer.torch.__version__ == torch.__version__
    with pytest.raises(AttributeError):
        _ = optimizer.torch.no_such_name
