"""Post-norm layers."""

import torch
from megatron.core.transformer.identity_op import IdentityOp
from torch.nn import functional as F

from megatron_ru.models.norms import LayerNorm
from megatron_ru.models.post_norm import PostNormTransformerLayer


def test_the_layer_norms_after_each_residual_sum(build_gpt):
    model, _ = build_gpt("gpt2_tiny")
    layer = model.decoder.layers[0].eval()
    assert type(layer) is PostNormTransformerLayer
    norms = layer.self_attn_bda.norm, layer.mlp_bda.norm
    with torch.no_grad():
        for parameter in (p for norm in norms for p in norm.parameters()):
            parameter.uniform_(0.5, 1.5)
    x = torch.randn(6, 2, 32)
    found, _ = layer(x, attention_mask=None)

    def normed(x, norm):
        return F.layer_norm(x, (32,), norm.weight, norm.bias, layer.config.layernorm_epsilon)

    attended, bias = layer.self_attention(x, None)
    x = normed(x + attended + bias, norms[0])
    fed, bias = layer.mlp(x)
    torch.testing.assert_close(found, normed(x + fed + bias, norms[1]))


def test_there_is_no_other_norm(build_gpt):
    model, variant = build_gpt("gpt2_tiny")
    assert isinstance(model.decoder.final_layernorm, IdentityOp)
    for layer in model.decoder.layers:
        assert isinstance(layer.input_layernorm, IdentityOp)
        assert isinstance(layer.pre_mlp_layernorm, IdentityOp)
    norms = [module for module in model.modules() if isinstance(module, LayerNorm)]
    assert len(norms) == 2 * variant.num_layers
    assert len({id(norm.weight) for norm in norms}) == len(norms)
    # Every layer's output has mean zero and variance one while the gains are one.
    out, _ = model.decoder.layers[1](torch.randn(6, 2, 32) * 9, attention_mask=None)
    torch.testing.assert_close(out.mean(-1), torch.zeros(6, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.var(-1, unbiased=False), torch.ones(6, 2), rtol=1e-3, atol=0)


def test_pre_norm_models_keep_megatron_s_layer_and_end_in_a_norm(build_gpt):
    model, _ = build_gpt("gpt2_rope_preln")
    assert not isinstance(model.decoder.layers[0], PostNormTransformerLayer)
    assert isinstance(model.decoder.layers[0].input_layernorm, LayerNorm)
    assert isinstance(model.decoder.final_layernorm, LayerNorm)


def test_dropout_comes_before_the_sum_and_the_norm(build_gpt):
    model, _ = build_gpt("gpt2_tiny", config={"hidden_dropout": 0.5})
    add = model.decoder.layers[0].self_attn_bda
    output, bias, residual = torch.ones(4, 1, 32), torch.zeros(32), torch.arange(32.0).expand(4, 1, 32)
    torch.manual_seed(3)
    found = add(True, False)((output, bias), residual, 0.5)
    torch.manual_seed(3)
    expected = F.layer_norm(residual + F.dropout(output + bias, 0.5), (32,), eps=add.norm.eps)
    torch.testing.assert_close(found, expected)
    kept = add(False, False)((output, bias), residual, 0.5)
    torch.testing.assert_close(kept, F.layer_norm(residual + output, (32,), eps=add.norm.eps))
