"""What a layer keeps for its backward pass, beside sums made by hand, and that measuring leaves no trace."""

import pytest
import torch

from megatron_ru.models.recompute_plan import WHOLE
from megatron_ru.ops.backend import select, selected
from tests.models.conftest import build_gpt  # noqa: F401

SEQUENCE, BATCH, HIDDEN, HEADS, GROUPS = 24, 2, 32, 4, 2
STATES = 4 * SEQUENCE * BATCH * HIDDEN
"""Bytes of hidden states in fp32."""
WAYS = [(), ("core_attn",), ("mlp",), WHOLE]


@pytest.fixture
def kept(one_process):
    from megatron_ru.plugin.layer_cost import kept_bytes

    return kept_bytes


@pytest.fixture
def costs(build_gpt, one_process):  # noqa: F811
    from megatron_ru.plugin.layer_cost import layer_costs

    def measure(gpt, ops="all", **keywords):
        before = ",".join(selected()) or "none"
        select(ops)
        try:
            layer, angles = gpt.decoder.layers[0], gpt.rotary_pos_emb(SEQUENCE)
            return layer_costs(
                layer,
                lambda hidden: layer(hidden, attention_mask=None, rotary_pos_emb=angles)[0],
                torch.empty(SEQUENCE, BATCH, HIDDEN),
                **{"ways": WAYS, "device": "cpu", "slowest": lambda seconds: seconds} | keywords,
            )
        finally:
            select(before)

    return measure


def test_a_storage_counts_once_and_weights_and_results_do_not(kept):
    weight = torch.nn.Parameter(torch.ones(8, 8))

    def run():
        x = torch.randn(16, 8).requires_grad_()
        y = x @ weight  # keeps x
        z = y.view(8, 16).exp()  # keeps its result
        return (z * z.view_as(z)).sin().exp()  # keeps z, what sin took, and the result

    assert kept(run) == 3 * 16 * 8 * 4


def test_what_is_emptied_or_unused_in_the_end_does_not_count(kept):
    def run():
        x = torch.randn(16, 8).requires_grad_()
        y = x * 2
        z = y.sin()  # keeps y
        (y * y).exp()  # nobody uses that
        y.untyped_storage().resize_(0)
        return z

    assert kept(run) == 0


def test_a_checkpoint_keeps_its_input(kept):
    from megatron.core import tensor_parallel

    def run():
        x = torch.randn(16, 8).requires_grad_()
        return tensor_parallel.checkpoint(lambda x: x.sin().exp().sin(), False, x)

    assert kept(run) == 16 * 8 * 4


def test_what_a_llama_layer_keeps(build_gpt, costs):  # noqa: F811
    gpt, _ = build_gpt("llama3_tiny", sizes={"query_heads_per_kv_head": 2})
    found, beyond = costs(gpt)
    ffn = gpt.config.ffn_hidden_size
    head = HIDDEN // HEADS
    rows = 4 * SEQUENCE * BATCH
    mlp = rows * (2 * ffn + ffn)  # both halves of the first product, and the activation
    attention = rows * HEADS  # logarithms of the sums of each head's scores
    nothing = (
        5 * STATES  # input, first norm, context, sum, second norm
        + 2 * rows  # one over the root mean square of either norm
        + rows * head * (HEADS + 2 * GROUPS)  # queries, keys and values lie in their projection
        + attention
        + mlp
    )
    assert {cost.way: cost.kept for cost in found} == {
        (): nothing, ("mlp",): nothing - mlp, WHOLE: STATES,
        # Megatron saves the kind of mask as a number of four bytes.
        ("core_attn",): nothing - attention + 4,
    }  # fmt: skip
    assert all(cost.seconds > 0 for cost in found)
    assert beyond == 0


def test_measuring_leaves_everything_as_it_was(build_gpt, costs):  # noqa: F811
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    gpt, _ = build_gpt("llama3_tiny", config={"hidden_dropout": 0.1, "attention_dropout": 0.1})
    layer = gpt.decoder.layers[0]
    called = []
    for parameter in layer.parameters():
        parameter.main_grad = torch.full_like(parameter, 3.0)
        parameter.grad_added_to_main_grad = False
        parameter.register_post_accumulate_grad_hook(called.append)
    add = layer.mlp_bda
    weights = [parameter.clone() for parameter in layer.parameters()]
    states = torch.get_rng_state(), get_cuda_rng_tracker().get_states()
    found, _ = costs(gpt)
    assert len(found) == len(WAYS)
    assert called == []
    assert torch.equal(torch.get_rng_state(), states[0])
    tracked = get_cuda_rng_tracker().get_states()
    assert all(torch.equal(tracked[name], state) for name, state in states[1].items())
    for parameter, weight in zip(layer.parameters(), weights, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, weight)
        assert torch.equal(parameter.main_grad, torch.full_like(parameter, 3.0))
        assert parameter.grad_added_to_main_grad is False
    assert layer.mlp_bda is add
    assert (layer.recompute_mlp, layer.self_attention.checkpoint_core_attention) == (False, False)


def test_slow_layers_are_timed_less_often(build_gpt, costs):  # noqa: F811
    gpt, _ = build_gpt("llama3_tiny")
    runs = []
    gpt.decoder.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    counts = {}
    for seconds in (1e-3, 10.0):
        runs.clear()
        costs(gpt, ways=[()], slowest=lambda _, seconds=seconds: seconds)
        counts[seconds] = len(runs)
    # Twice for the bytes, once before the first time, once to know how long it takes.
    assert counts == {1e-3: 4 + 5, 10.0: 4 + 1}
