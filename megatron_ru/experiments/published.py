"""What was published about the architectures that `megatron-ru ladder` trains.

E. Kosarev, master's thesis, Moscow State University, 2024: losses of 2.6B to 3.6B models after the same number of
tokens. Where it gives no number for a step, there is none here.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """One table: its lines in the order of printing."""

    name: str
    title: str
    losses: Mapping[str, float | None]
    """Variant to loss."""
    better: tuple[tuple[str, str], ...] = ()
    """(better, worse) as said in words."""
    note: str = ""

    def order(self) -> list[tuple[str, str]]:
        """All (better, worse) pairs that are known, by number or by word."""
        known = [(name, loss) for name, loss in self.losses.items() if loss is not None]
        pairs = [(a, b) for a, first in known for b, second in known if first < second]
        return list(dict.fromkeys([*pairs, *self.better]))


_RMSNORM = "gpt2_rope_preln_rmsnorm"

TABLES: dict[str, PublishedTable] = {
    table.name: table
    for table in (
        PublishedTable(
            name="ladder",
            title="the ladder: each step changes one thing of the step above",
            losses={
                "gpt2_pos_every_layer": None,
                "gpt2": None,
                "gpt2_rope": None,
                "gpt2_rope_preln": None,
                _RMSNORM: 2.246,
                f"{_RMSNORM}_swiglu": 2.192,
                f"{_RMSNORM}_swiglu_mlpdim": 2.181,
                f"{_RMSNORM}_swiglu_mlpdim_gqa": None,
            },
            better=(("gpt2", "gpt2_pos_every_layer"), (f"{_RMSNORM}_swiglu_mlpdim", "gpt2")),
            note="published for the whole ladder: the loss falls by 13 % to 2.181; the numbers of three steps are "
            "those of the same models in the other two tables",
        ),
        PublishedTable(
            name="activations",
            title="activations, with and without biases",
            losses={
                "activation_relu": 2.259,
                "activation_relu_nobias": 2.274,
                "activation_gelu": 2.246,
                "activation_gelu_nobias": 2.249,
                "activation_swish": 2.252,
                "activation_swish_nobias": 2.257,
                "activation_reglu": 2.211,
                "activation_reglu_nobias": 2.214,
                "activation_geglu": 2.196,
                "activation_geglu_nobias": 2.193,
                "activation_swiglu": 2.191,
                "activation_swiglu_nobias": 2.192,
            },
            note="the gated ones have a third matrix of the same width, and so more parameters",
        ),
        PublishedTable(
            name="mlp-ratio",
            title="MLP ratio C = feed-forward width / hidden size",
            losses={
                "mlp_ratio_1": 2.389,
                "mlp_ratio_1_5": 2.339,
                "mlp_ratio_2": 2.289,
                "mlp_ratio_8_3": 2.223,
                "mlp_ratio_3": 2.185,
                "mlp_ratio_3_5": 2.181,
                "mlp_ratio_4": 2.192,
            },
        ),
    )
}
"""The tables by the words of `--table`."""
