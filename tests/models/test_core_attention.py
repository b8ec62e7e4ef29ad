"""The core attention module as Megatron's attention calls it."""

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ru.foundation.errors import UserError
from megatron_ru.models.core_attention import CoreAttention
from megatron_ru.ops.attention import attention_reference


def core(attention_type="self", dropout=0.0, config=None, **keywords):
    settings = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "attention_dropout": dropout}
    made = TransformerConfig(**settings, bias_dropout_fusion=False)
    for name, value in (config or {}).items():
        setattr(made, name, value)
    return CoreAttention(made, 1, AttnMaskType.causal, attention_type, **keywords)


def sample(length=9, batch=2, heads=4, groups=2, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, batch, n, size, generator=generator) for n in (heads, groups, groups)]


def test_context_is_attention_with_heads_side_by_side():
    q, k, v = sample()
    found = core()(q, k, v, None, attn_mask_type=AttnMaskType.causal)
    assert found.shape == (9, 2, 32)
    expected = attention_reference(q, k, v, mask=None, scale=None).flatten(2)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_mask_and_scale():
    q, k, v = sample()
    mask = torch.zeros(2, 1, 9, 9, dtype=torch.bool)
    mask[1, :, :, :2] = True
    found = core(softmax_scale=0.7)(q, k, v, mask)
    expected = attention_reference(q, k, v, mask=mask, scale=0.7).flatten(2)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_later_keywords_of_megatron_are_accepted():
    q, k, v = sample()
    attention = core(cp_comm_type="p2p", pg_collection=None, k_channels=None, v_channels=None)
    torch.testing.assert_close(attention(q, k, v, None, num_splits=None), attention(q, k, v, None))


def test_context_parallelism_is_refused():
    message = (
        "^--context-parallel-size 2 was given, but this attention works on whole sequences; use 1, or "
        "--transformer-impl transformer_engine with TransformerEngine installed$"
    )
    with pytest.raises(UserError, match=message):
        core(config={"context_parallel_size": 2})


def test_cross_attention_is_refused():
    with pytest.raises(UserError, match=r"^cross attention was asked for, this module does self-attention only$"):
        core("cross")


@pytest.mark.parametrize("what", ["packed_seq_params", "attention_bias"])
def test_packed_sequences_and_biases_are_refused(what):
    with pytest.raises(UserError, match=r"^packed sequences and attention biases are not supported .* drop --sft"):
        core()(*sample(), None, **{what: torch.zeros(1)})


def test_dropout_only_in_training_and_as_told(one_process):
    q, k, v = sample()
    attention = core(dropout=0.5)
    kept = attention.eval()(q, k, v, None)
    expected = attention_reference(q, k, v, mask=None, scale=None).flatten(2)
    torch.testing.assert_close(kept.double(), expected, rtol=0, atol=1e-6)
    attention.train()
    assert not torch.allclose(attention(q, k, v, None), kept)
    # Megatron may set another rate than the config's.
    assert torch.allclose(core(dropout=0.5, attention_dropout=0.0).train()(q, k, v, None), kept)


def test_dropout_draws_from_the_state_of_the_rank(one_process):
    q, k, v = sample()
    attention = core(dropout=0.5).train()

    def dropped(default_seed, rank_seed):
        tensor_parallel.model_parallel_cuda_manual_seed(rank_seed, force_reset_rng=True)
        torch.manual_seed(default_seed)
        return attention(q, k, v, None)

    first = dropped(1, 5)
    assert torch.equal(dropped(2, 5), first), "the default state, the same on all ranks, was used"
    assert not torch.equal(dropped(1, 6), first)
    # With sequence parallelism Megatron forks the state further out.
    attention.config.sequence_parallel = True
    assert torch.equal(dropped(1, 5), dropped(1, 6))
    assert not torch.equal(dropped(1, 5), dropped(2, 5))
