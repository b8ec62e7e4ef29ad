"""A decoder architecture as a value: what it is called, which one it comes from and how it differs."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.registry import Registry

POSITIONS = ("sinusoidal", "sinusoidal_every_layer", "rope", "learned", "none")
NORMS = ("layernorm", "rmsnorm")
PLACEMENTS = ("pre", "post")
GATED_ACTIVATIONS = ("reglu", "geglu", "swiglu")
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "swish", *GATED_ACTIVATIONS)

# The feed-forward width is C·hidden rounded to this, so that TP = 8 always divides it.
FFN_MULTIPLE = 8


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One architecture. Raises `UserError` where the sizes do not fit together."""

    name: str
    """The word for `--ru-variant`."""
    parent: str | None = None
    """The variant this one was derived from."""
    difference: str
    """One sentence: all that sets it apart from its parent."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    vocab_size: int
    """Rows of the embedding before padding. A real tokenizer's own size wins over it."""
    seq_length: int
    """Context in tokens."""
    max_position_embeddings: int | None = None
    """Positions there are tables for; None: as many as `seq_length`."""
    mlp_ratio: float = 4.0
    """C = feed-forward width / hidden size."""
    query_heads_per_kv_head: int = 1
    """Query heads that share one key-value head (grouped-query attention); 1 is multi-head attention."""
    kv_channels: int | None = None
    """Size of a head; None: hidden_size / num_attention_heads."""

    positions: str = "rope"
    """"sinusoidal" is added to the embedding once, "sinusoidal_every_layer" to the input of every attention,
    "rope" turns queries and keys, "learned" is a trained table added to the embedding, "none" is none."""
    rotary_base: int = 10000
    """The angle of pair k at position p is p / rotary_base^(2k/d)."""
    rotary_percent: float = 1.0
    """Share of a head's channels that RoPE turns."""
    norm: str = "rmsnorm"
    """"layernorm" (gain and bias) or "rmsnorm" (gain)."""
    norm_epsilon: float = 1e-5
    """Added to the variance or the mean square under the root."""
    norm_placement: str = "pre"
    """"pre": x + f(norm(x)) and a final norm; "post": norm(x + f(x)) and no final norm."""
    activation: str = "swiglu"
    """One of ACTIVATIONS. The gated ones have a third matrix; "gelu" is exact, "gelu_tanh" is GPT-2's."""
    bias: bool = False
    """Whether the linear layers (query, key, value, output, feed-forward) have biases."""
    sliding_window: int | None = None
    """Tokens that attention sees. Only contexts within it are run, where it changes nothing."""
    tied_embeddings: bool = False
    """Whether the output projection is the embedding matrix."""
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0

    recipe: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """How it was trained, where known: Megatron's argument names, plus `tokens` and `tokens_per_batch`."""

    def __post_init__(self) -> None:
        self._check_kind("positions", POSITIONS)
        self._check_kind("norm", NORMS)
        self._check_kind("norm_placement", PLACEMENTS)
        self._check_kind("activation", ACTIVATIONS)
        for size in (
            "num_layers", "hidden_size", "num_attention_heads", "vocab_size", "seq_length",
            "query_heads_per_kv_head", "mlp_ratio", "norm_epsilon", "rotary_base",
        ):  # fmt: skip
            self._require(getattr(self, size) > 0, f"{size} is {getattr(self, size)}, expected more than 0")
        for rate in ("attention_dropout", "hidden_dropout"):
            self._require(0 <= getattr(self, rate) < 1, f"{rate} is {getattr(self, rate)}, expected 0 <= {rate} < 1")
        self._require(
            self.kv_channels is not None or self.hidden_size % self.num_attention_heads == 0,
            f"hidden size {self.hidden_size} does not divide by {self.num_attention_heads} attention heads",
        )
        self._require(
            self.num_attention_heads % self.query_heads_per_kv_head == 0,
            f"{self.num_attention_heads} attention heads do not divide into groups of "
            f"{self.query_heads_per_kv_head} query heads per key-value head",
        )
        self._require(
            0 < self.rotary_percent <= 1,
            f"rotary_percent is {self.rotary_percent}, expected 0 < rotary_percent <= 1",
        )
        self._require(
            self.positions != "rope" or int(self.head_size * self.rotary_percent) % 2 == 0,
            f"RoPE turns pairs of channels, but a head has "
            f"{int(self.head_size * self.rotary_percent)} of them to turn; choose an even head size",
        )
        self._require(
            self.seq_length <= self.position_count,
            f"a context of {self.seq_length} tokens is longer than max_position_embeddings, {self.position_count}",
        )
        self._require(
            self.sliding_window is None or self.seq_length <= self.sliding_window,
            f"a context of {self.seq_length} tokens is longer than its attention window of "
            f"{self.sliding_window} tokens, and windowed attention is not built: use at most that many",
        )

    @property
    def ffn_hidden_size(self) -> int:
        """Feed-forward width: C·hidden_size to the nearest multiple of 8."""
        return max(round(self.mlp_ratio * self.hidden_size / FFN_MULTIPLE), 1) * FFN_MULTIPLE

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def num_query_groups(self) -> int:
        """Key-value heads."""
        return self.num_attention_heads // self.query_heads_per_kv_head

    @property
    def position_count(self) -> int:
        """Positions there are tables for."""
        return self.max_position_embeddings or self.seq_length

    @property
    def gated(self) -> bool:
        """Whether the feed-forward block has a gate, and so a third matrix."""
        return self.activation in GATED_ACTIVATIONS

    @property
    def final_norm(self) -> bool:
        """Whether a norm follows the last layer; post-norm layers end in one already."""
        return self.norm_placement == "pre"

    def changes_from(self, parent: "Variant") -> dict[str, tuple[Any, Any]]:
        """Architecture fields that differ: {field: (the parent's value, this one's)}."""
        return {
            name: (getattr(parent, name), getattr(self, name))
            for name in ARCHITECTURE_FIELDS
            if getattr(parent, name) != getattr(self, name)
        }

    def _check_kind(self, name: str, known: tuple[str, ...]) -> None:
        value = getattr(self, name)
        self._require(value in known, f"{name} is {value!r}, expected one of {', '.join(known)}")

    def _require(self, holds: bool, sentence: str) -> None:
        if not holds:
            raise UserError(f"variant {self.name}: {sentence}")


ARCHITECTURE_FIELDS = tuple(
    item.name for item in dataclasses.fields(Variant) if item.name not in {"name", "parent", "difference", "recipe"}
)


def derive(parent: Variant, name: str, difference: str, **changes: Any) -> Variant:
    """The parent with `changes` and nothing else; a recipe is not inherited."""
    fresh = {"recipe": {}, **changes}
    return dataclasses.replace(parent, name=name, parent=parent.name, difference=difference, **fresh)


def register(variant: Variant) -> Variant:
    """Makes the variant known by its name and returns it. Raises ValueError when the name is taken."""
    return VARIANTS.register(variant.name)(variant)


def all_variants() -> dict[str, Variant]:
    """Every variant of `megatron_ru.models.variants` by name, in the order of the names."""
    return dict(VARIANTS.items())


def find_variant(name: str) -> Variant:
    """The variant of that name. Raises `UserError` with the closest names when there is none."""
    return VARIANTS[name]


VARIANTS: Registry[Variant] = Registry("variant", package="megatron_ru.models.variants")
