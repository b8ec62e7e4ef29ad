"""Small GPT models built as a run builds them, with the seams of a run in place."""

import dataclasses
from argparse import Namespace

import pytest
import torch


@pytest.fixture(scope="module")
def build_gpt(one_process):
    """build_gpt(variant name, sizes=…, config=…, model=…) gives (GPTModel in fp32, refined Variant).

    `sizes` refine the variant, `config` are fields of Megatron's TransformerConfig, `model` keywords of GPTModel.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_ru.models.layer_spec import layer_spec
    from megatron_ru.models.variant import find_variant
    from megatron_ru.models.variant_arguments import megatron_arguments
    from megatron_ru.plugin.arguments import HOST_SPEC
    from megatron_ru.plugin.run import install_run, undo_run

    known = {item.name for item in dataclasses.fields(TransformerConfig)}
    functions = {"gelu": torch.nn.functional.gelu, "swish": torch.nn.functional.silu}

    def build(name, *, sizes=None, config=None, model=None, init="whole", meta="auto", seed=7, ops="all",
              hand_over=None):  # fmt: skip
        variant = dataclasses.replace(find_variant(name), **{**TINY, **(sizes or {})})
        values = megatron_arguments(variant)
        settings = {key: value for key, value in values.items() if key in known}
        settings |= {
            "gated_linear_unit": values["swiglu"],
            "activation_func": functions["swish" if values["swiglu"] else "gelu"],
            # Fused forms are other people's kernels; the sums are the same.
            "bias_dropout_fusion": False, "bias_activation_fusion": False, "apply_rope_fusion": False,
            "masked_softmax_fusion": False, "persist_layer_norm": False, "gradient_accumulation_fusion": False,
        }  # fmt: skip
        settings |= {"hidden_dropout": 0.0, "attention_dropout": 0.0, **(config or {})}
        options = Namespace(
            ru_variant=name,
            ru_metrics=None,
            ru_profile=None,
            ru_profile_steps=None,
            ru_attention="fused",
            ru_fp8=None,
            ru_recompute="off",
            ru_memory_budget=None,
            ru_validate_from_start=False,
            ru_nan_grads=None,
            ru_nan_names=False,
            ru_checkpoints="megatron",
            ru_keep=None,
            ru_keep_every=None,
            ru_init=init,
            ru_meta_init=meta,
            ru_ops=ops,
            gradient_accumulation_fusion=False,
            seed=seed,
            spec=HOST_SPEC,
            log_interval=1,
        )
        install_run(options, hand_over=hand_over)
        try:
            gpt = GPTModel(
                TransformerConfig(**settings),
                layer_spec(options, variant),
                vocab_size=variant.vocab_size,
                max_sequence_length=variant.position_count,
                position_embedding_type=values["position_embedding_type"],
                rotary_percent=values.get("rotary_percent", 1.0),
                rotary_base=values.get("rotary_base", 10000),
                share_embeddings_and_output_weights=variant.tied_embeddings,
                **(model or {}),
            )
        finally:
            undo_run()
        return gpt, variant

    return build


# Four heads fit every variant: those with four query heads per key-value head have one group then.
TINY = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 61, "seq_length": 24,
    "max_position_embeddings": None, "kv_channels": None, "sliding_window": None,
}  # fmt: skip
