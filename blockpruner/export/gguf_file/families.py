"""The table of model families as llama.cpp knows them: names, and what its code for each can compute.

llama.cpp has code of its own for every family ("arch"), and what a file's settings cannot tell it, that code assumes.
What it would assume wrongly is refused here. As of llama.cpp 0.5.0-dev (October 2026), `src/models/*.cpp`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

_LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_POST_NORMS = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
_SANDWICH = _LAYER_TENSORS | _POST_NORMS | {"pre_feedforward_layernorm": "ffn_norm"}
MODEL_TENSORS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
"""The tensors outside the layers."""
UNWRITTEN_MODULES = frozenset({"self_attn.rotary_emb"})
"""Buffers in old checkpoints, which every engine computes itself."""

DECI = "deci"
"""llama.cpp's Llama whose layers may lack blocks."""


@dataclass(frozen=True)
class Family:
    """One family."""

    arch: str
    """llama.cpp's name."""
    tensors: Mapping[str, str] = field(default_factory=lambda: _LAYER_TENSORS)
    """A module within a layer, and llama.cpp's name for it."""
    activation: str = "silu"
    turns_neighbours: bool = False
    """Whether rotary positions turn the values 2i and 2i+1 of a head, where transformers turns i and i + half."""
    norm_offset: float = 0.0
    """What is added to a norm's weight."""
    has_windows: bool = False
    """Whether attention can be limited to a window, by layer."""
    reads_rotary_factors: bool = False
    """Whether rotary frequencies can be scaled one by one (`rope_freqs.weight`)."""
    splits_hidden_size: bool = False
    """Whether a head's size can only be the hidden size by the number of heads."""
    head: Literal["any", "tied", "own"] = "any"
    """Whether the output head is the embedding."""
    as_deci: bool = False
    """Whether its layers are a Llama's, so that they may lack blocks."""


FAMILIES: Mapping[str, Family] = {
    "gemma": Family("gemma", activation="gelu_pytorch_tanh", norm_offset=1.0, head="tied"),
    "gemma2": Family(
        "gemma2",
        tensors=_SANDWICH,
        activation="gelu_pytorch_tanh",
        norm_offset=1.0,
        has_windows=True,
        head="tied",
    ),
    "gemma3_text": Family(
        "gemma3",
        tensors=_SANDWICH | _HEAD_NORMS,
        activation="gelu_pytorch_tanh",
        norm_offset=1.0,
        has_windows=True,
    ),
    "llama": Family("llama", turns_neighbours=True, reads_rotary_factors=True, as_deci=True),
    "mistral": Family("llama", turns_neighbours=True, reads_rotary_factors=True, as_deci=True),
    "olmo2": Family("olmo2", tensors=_LAYER_TENSORS | _HEAD_NORMS | _POST_NORMS, splits_hidden_size=True, head="own"),
    "qwen2": Family("qwen2", splits_hidden_size=True, as_deci=True),
    "qwen3": Family("qwen3", tensors=_LAYER_TENSORS | _HEAD_NORMS),
}
"""By transformers' `model_type`."""

LLAMA_AS_DECI = Family(DECI, turns_neighbours=True, reads_rotary_factors=True)
"""How a family with `as_deci` is written where blocks do not alternate. A Qwen2 is a Llama with biases at query, key
and value."""


@dataclass(frozen=True)
class Heads:
    """An attention's sizes, the same in every layer."""

    num_heads: int
    num_key_value_heads: int
    head_size: int

    @classmethod
    def of(cls, config: Any) -> Heads:
        """As transformers' configuration has them."""
        num_heads = int(config.num_attention_heads)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        return cls(num_heads, int(getattr(config, "num_key_value_heads", None) or num_heads), int(head_size))


_LARGEST = {"gemma2": 46, "gemma3": 62}
"""Numbers of layers by which llama.cpp recognises the 27B models, whose scores it scales in another way."""


def query_scale(arch: str, config: Any, num_layers: int) -> float:
    """What queries must be multiplied by, so that llama.cpp's scaling of attention scores becomes the model's own.

    llama.cpp divides scores by the root of a head's size, but in the 27B Gemmas by the root of the hidden size by the
    number of heads; a Gemma's configuration has any number (`query_pre_attn_scalar`).
    """
    heads = Heads.of(config)
    theirs = config.hidden_size // heads.num_heads if _LARGEST.get(arch) == num_layers else heads.head_size
    ours = getattr(config, "query_pre_attn_scalar", None) or heads.head_size
    return float((theirs / ours) ** 0.5)
