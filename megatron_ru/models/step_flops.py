"""How many floating-point operations a training step needs, and which share of a GPU's peak that is. No torch here.

Counted are the matrix products of the model as it is defined, with causal attention: what recomputation or padding adds
is no useful work. Mixtures of experts are left out: which products run there depends on the router.
"""

import re
from dataclasses import dataclass
from typing import Any

from megatron_ru.models.variant import Variant

FORMULA = "6 x matmul parameters x tokens + 6 x layers x tokens x sequence x heads x head size (causal attention)"
MFU_FORMULA = "MFU = FLOPs / (seconds x GPUs x peak)"

# Dense TFLOP/s in bf16 (fp16 on Volta and Turing, which have none), from the makers' data sheets. The first whose
# words stand in the device's name is taken, so longer ones come before their beginnings.
_PEAKS = (
    ("GB300", 2500.0), ("B300", 2250.0), ("GB200", 2500.0), ("B200", 2250.0),
    ("GH200", 989.0), ("H200 NVL", 835.0), ("H200", 989.0),
    ("H100 NVL", 835.0), ("H100 PCIE", 756.0), ("H100", 989.0), ("H800 PCIE", 756.0), ("H800", 989.0), ("H20", 148.0),
    ("A100", 312.0), ("A800", 312.0), ("A40", 149.7), ("A30", 165.0), ("A10G", 70.0), ("A10", 125.0),
    ("L40S", 362.0), ("L40", 181.0), ("L4", 121.0),
    ("V100S", 130.0), ("V100", 125.0), ("T4", 65.0),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes that decide what a step costs."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_size: int
    gated: bool
    """Whether the feed-forward block has a third matrix."""
    vocabulary: int
    """Rows of the output projection, padding included."""
    sequence: int

    @property
    def matmul_parameters(self) -> int:
        """Parameters that every token is multiplied with: those of the layers and the output projection.

        The embedding is looked up, so it counts only as the output projection, tied or not.
        """
        query, key = self.heads * self.head_size, self.kv_heads * self.head_size
        layer = 2 * self.hidden * query + 2 * self.hidden * key + (3 if self.gated else 2) * self.hidden * self.ffn
        return self.layers * layer + self.vocabulary * self.hidden

    @property
    def matmul_flops_per_token(self) -> int:
        """Of the matrix products with parameters: 2 forward, 4 backward for each of them."""
        return 6 * self.matmul_parameters

    @property
    def attention_flops_per_token(self) -> int:
        """Of scores and their product with the values: two products of sequence x head size, the half of them that is
        causal, 2 forward and 4 backward."""
        return 6 * self.layers * self.sequence * self.heads * self.head_size

    @property
    def flops_per_token(self) -> int:
        """Forward and backward."""
        return self.matmul_flops_per_token + self.attention_flops_per_token


def shape_of_variant(variant: Variant, *, vocabulary_multiple: int = 128) -> Shape:
    """The shape of a variant, its vocabulary padded to the multiple."""
    return Shape(
        layers=variant.num_layers,
        hidden=variant.hidden_size,
        ffn=variant.ffn_hidden_size,
        heads=variant.num_attention_heads,
        kv_heads=variant.num_query_groups,
        head_size=variant.head_size,
        gated=variant.gated,
        vocabulary=-(-variant.vocab_size // vocabulary_multiple) * vocabulary_multiple,
        sequence=variant.seq_length,
    )


def shape_of_arguments(args: Any) -> Shape | None:
    """The shape that Megatron's parsed arguments describe; None for a mixture of experts, latent attention, a hybrid or
    anything else whose products this formula does not know, and before the size of the vocabulary is known."""
    unknown = ("num_experts", "multi_latent_attention", "hybrid_layer_pattern", "hybrid_override_pattern",
               "is_hybrid_model", "mtp_num_layers", "linear_attention_freq", "experimental_attention_variant",
               "heterogeneous_layers_config_path")  # fmt: skip
    if any(getattr(args, name, None) for name in unknown) or not getattr(args, "padded_vocab_size", None):
        return None
    heads = args.num_attention_heads
    return Shape(
        layers=args.num_layers,
        hidden=args.hidden_size,
        ffn=args.ffn_hidden_size or 4 * args.hidden_size,
        heads=heads,
        kv_heads=args.num_query_groups if getattr(args, "group_query_attention", False) else heads,
        head_size=args.kv_channels or args.hidden_size // heads,
        gated=bool(getattr(args, "swiglu", False)),
        vocabulary=args.padded_vocab_size,
        sequence=args.seq_length,
    )


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 TFLOP/s (10¹², fp16 where there is no bf16) of the GPU of that name; None where it is not known."""
    words = f" {' '.join(re.split(r'[\s_-]+', device_name.upper()))} "
    # Whole words: an RTX A4000 is no A40.
    return next((peak for known, peak in _PEAKS if f" {known} " in words), None)


def mfu(flops: float, seconds: float, gpus: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation, from 0 to 1: FLOPs / (seconds x GPUs x peak TFLOP/s); None without a peak."""
    if peak is None or seconds <= 0:
        return None
    return flops / (seconds * gpus * peak * 1e12)
