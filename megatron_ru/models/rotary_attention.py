"""Self-attention whose queries and keys are rotated together."""

from typing import Any

from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from megatron_ru.models.rotary import rotary_tables, rotates
from megatron_ru.ops.backend import switch
from megatron_ru.ops.qkv import rotary_qkv
from megatron_ru.ops.rope import rope

_ROPE = switch("rope")


class RotarySelfAttention(SelfAttention):
    """Megatron's self-attention, with one call of the op `rope` for queries and keys where Megatron makes two.

    Whatever is not plain training (inference caches, packed sequences, other angles for the keys than for the queries)
    and a run without the op go Megatron's own way.
    """

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self._angles: Tensor | None = None
        self._scale = _yarn_get_concentration_factor_from_config(self.config)

    def forward(self, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Any:
        """As Megatron's; hidden_states [sequence, batch, hidden]."""
        angles = None if arguments or not _ROPE.on else self._shared_angles(keywords)
        if angles is None:
            return super().forward(hidden_states, *arguments, **keywords)
        self._angles = angles
        try:
            return super().forward(hidden_states, **{**keywords, "rotary_pos_emb": None})
        finally:
            self._angles = None

    def get_query_key_value_tensors(self, *arguments: Any, **keywords: Any) -> Any:
        """Megatron's (query, key, value, and the gate if there is one); query and key are rotated already while
        `forward` wants it so, and the query is then [sequence, batch, kv_heads, heads of each, head_dim] where it can
        be a view of the projection, else [sequence, batch, heads, head_dim]."""
        if self._angles is None:
            return super().get_query_key_value_tensors(*arguments, **keywords)
        if self._takes_projection_whole(keywords):
            mixed, _ = super().get_query_key_value_tensors(*arguments, **{**keywords, "split_qkv": False})
            heads = mixed.unflatten(-1, (-1, self.hidden_size_per_attention_head))
            if rotates(heads.flatten(1, 2), self._angles) and _ROPE.takes(heads):
                interleaved = self.config.rotary_interleaved
                cos, sin = rotary_tables(self._angles, interleaved=interleaved, scale=self._scale)
                return rotary_qkv(heads, cos, sin, interleaved=interleaved, in_place=True)
            # The same cut that Megatron makes.
            query, key, value = heads[..., :-2, :].flatten(2, 3), heads[..., -2, :], heads[..., -1, :]
            return (*self._rotate(query, key, self._angles), value)
        query, key, *others = super().get_query_key_value_tensors(*arguments, **keywords)
        return (*self._rotate(query, key, self._angles), *others)

    def _rotate(self, query: Tensor, key: Tensor, angles: Tensor) -> tuple[Tensor, Tensor | None]:
        if not (rotates(query, angles) and rotates(key, angles) and _ROPE.takes(query)):
            _ROPE.fell_back(query)
            # One by one, as Megatron does.
            keywords = {"config": self.config, "mscale": self._scale, "cp_group": self.pg_collection.cp}
            query, key = (apply_rotary_pos_emb(each, angles, **keywords) for each in (query, key))
            return query, key
        interleaved = self.config.rotary_interleaved
        cos, sin = rotary_tables(angles, interleaved=interleaved, scale=self._scale)
        return rope(query, key, cos, sin, interleaved=interleaved)

    def _takes_projection_whole(self, keywords: dict[str, Any]) -> bool:
        """Whether the projection's output holds nothing but whole groups of queries, their key and their value."""
        config = self.config
        return (
            keywords.get("split_qkv", True)
            and not keywords.get("output_gate")
            and all(isinstance(norm, (type(None), IdentityOp)) for norm in (self.q_layernorm, self.k_layernorm))
            # Fewer key heads than ranks: Megatron gathers the projection and each rank takes a part of a group.
            and self.num_query_groups_per_partition * self.pg_collection.tp.size() == config.num_query_groups
        )

    def _shared_angles(self, keywords: dict[str, Any]) -> Tensor | None:
        """The angles of queries and keys alike in a call of plain training, else None."""
        angles = keywords.get("rotary_pos_emb")
        if isinstance(angles, tuple):
            angles = angles[0] if angles[0] is angles[1] else None
        others = ("inference_context", "inference_params", "packed_seq_params", "key_value_states")
        config = self.config
        plain = (
            angles is not None
            and all(keywords.get(name) is None for name in others)
            and not config.fused_single_qkv_rope
            and not (config.no_rope_freq and config.no_rope_freq[self.layer_number - 1])
        )
        return angles if plain else None
