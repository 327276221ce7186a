"""What a model must answer: forward passes and perplexity written out by hand, in plain torch.

Reads only tensors (a state dict) and numbers (config.json as a dictionary). Shares no line with transformers and none
with the library under test, so that agreement means something. Slow and plain on purpose: loops over layers, heads and
sequences, whole attention matrices.

Shapes: `B` sequences, `T` tokens of a sequence, `D` hidden, `H` size of a head, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RemovedBlocks = AbstractSet[tuple[int, str]]
"""Blocks that are not there: (layer_index, "mha") or (layer_index, "mlp"). A `BlockKind` equals its string."""

Config = Mapping[str, Any]
"""config.json, or `model.config.to_dict()`."""


def oracle_logits(
    tensors: Mapping[str, Tensor],
    config: Config,
    token_ids_BT: Tensor,
    removed: RemovedBlocks = frozenset(),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The logits [B, T, V] of a model without the removed blocks.

    Args:
        tensors: the model's state dict, by the names of a checkpoint.
        config: its configuration; `model_type` picks the row of `ORACLES`.
        token_ids_BT: token ids [B, T] without padding (give a padded row alone, without its pads).
        removed: the blocks to leave out; nothing of them is read.
        dtype: float32 or float64; all arithmetic is done in it.
    """
    read = _Reader(tensors, dtype)
    forward = ORACLES[config["model_type"]]
    return torch.stack([forward(read, config, token_ids_T, removed) for token_ids_T in token_ids_BT])


def oracle_sequence_nll(logits_BTV: Tensor, token_ids_BT: Tensor) -> Tensor:
    """Each sequence's mean negative log-likelihood per predicted token, in nats: float64 [B]."""
    means = []
    for logits_TV, token_ids_T in zip(logits_BTV.double(), token_ids_BT.tolist(), strict=True):
        nats = []
        for position, next_token in enumerate(token_ids_T[1:]):
            scores_V = logits_TV[position] - logits_TV[position].max()
            nats.append(math.log(float(scores_V.exp().sum())) - float(scores_V[next_token]))
        means.append(math.fsum(nats) / len(nats))
    return torch.tensor(means, dtype=torch.float64)


def oracle_perplexity(nll_B: Tensor) -> float:
    """exp of the mean over sequences of each sequence's mean token NLL."""
    return math.exp(math.fsum(nll_B.tolist()) / len(nll_B))


class _Reader:
    """Reads tensors by name in one dtype."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._tensors, self._dtype = tensors, dtype

    def __call__(self, name: str) -> Tensor:
        return self._tensors[name].detach().cpu().to(self._dtype)

    def linear(self, name: str, x_TD: Tensor, *, bias: bool) -> Tensor:
        """x W^T, plus the bias where the family has one."""
        y = x_TD @ self(f"{name}.weight").T
        return y + self(f"{name}.bias") if bias else y


@dataclass(frozen=True)
class _Traits:
    """Where the families with RMS norm, RoPE and a gated MLP differ."""

    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    query_key_norm: bool
    windows: tuple[int | None, ...]
    """For each layer how many of the last tokens, itself included, a token sees; None: all of them."""


def _llama(config: Config) -> _Traits:
    bias = bool(config["attention_bias"])
    return _Traits(bias, bias, bool(config["mlp_bias"]), False, (None,) * config["num_hidden_layers"])


def _mistral(config: Config) -> _Traits:
    return _Traits(False, False, False, False, (config["sliding_window"],) * config["num_hidden_layers"])


def _qwen2(config: Config) -> _Traits:
    return _Traits(True, False, False, False, _windows_by_type(config))


def _qwen3(config: Config) -> _Traits:
    bias = bool(config["attention_bias"])
    return _Traits(bias, bias, False, True, _windows_by_type(config))


def _windows_by_type(config: Config) -> tuple[int | None, ...]:
    windows = {"full_attention": None, "sliding_attention": config["sliding_window"]}
    return tuple(windows[layer_type] for layer_type in config["layer_types"])


def _rms_rope_decoder(
    traits_of: Callable[[Config], _Traits],
) -> Callable[[_Reader, Config, Tensor, RemovedBlocks], Tensor]:
    """The forward pass of a family with RMS norm, RoPE and a gated MLP, for one sequence."""

    def forward(read: _Reader, config: Config, token_ids_T: Tensor, removed: RemovedBlocks) -> Tensor:
        assert config["hidden_act"] == "silu"
        traits, eps = traits_of(config), config["rms_norm_eps"]
        x_TD = read("model.embed_tokens.weight")[token_ids_T]
        for index in range(config["num_hidden_layers"]):
            layer = f"model.layers.{index}"
            if (index, "mha") not in removed:
                normed_TD = _rms_norm(x_TD, read(f"{layer}.input_layernorm.weight"), eps)
                x_TD = x_TD + _attention(read, f"{layer}.self_attn", config, traits, traits.windows[index], normed_TD)
            if (index, "mlp") not in removed:
                normed_TD = _rms_norm(x_TD, read(f"{layer}.post_attention_layernorm.weight"), eps)
                x_TD = x_TD + _gated_mlp(read, f"{layer}.mlp", normed_TD, bias=traits.mlp_bias)
        x_TD = _rms_norm(x_TD, read("model.norm.weight"), eps)
        head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
        return x_TD @ read(head).T

    return forward


ORACLES: dict[str, Callable[[_Reader, Config, Tensor, RemovedBlocks], Tensor]] = {
    "llama": _rms_rope_decoder(_llama),
    "mistral": _rms_rope_decoder(_mistral),
    "qwen2": _rms_rope_decoder(_qwen2),
    "qwen3": _rms_rope_decoder(_qwen3),
}
"""By `model_type`: (reader, config, token ids [T], removed) -> logits [T, V]."""


def _attention(read: _Reader, name: str, config: Config, traits: _Traits, window: int | None, x_TD: Tensor) -> Tensor:
    num_heads, num_groups = config["num_attention_heads"], config["num_key_value_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // num_heads
    query, key, value = (
        read.linear(f"{name}.{part}_proj", x_TD, bias=traits.qkv_bias).split(head_size, dim=-1) for part in "qkv"
    )
    outputs = []
    for head in range(num_heads):
        group = head // (num_heads // num_groups)  # neighbouring heads share a key and a value
        query_TH, key_TH, value_TH = query[head], key[group], value[group]
        if traits.query_key_norm:
            query_TH = _rms_norm(query_TH, read(f"{name}.q_norm.weight"), config["rms_norm_eps"])
            key_TH = _rms_norm(key_TH, read(f"{name}.k_norm.weight"), config["rms_norm_eps"])
        query_TH, key_TH = _rotate(query_TH, config), _rotate(key_TH, config)
        scores_TT = query_TH @ key_TH.T / math.sqrt(head_size)
        scores_TT = scores_TT.masked_fill(~_visible(len(x_TD), window), -math.inf)
        weights_TT = (scores_TT - scores_TT.max(dim=-1, keepdim=True).values).exp()
        outputs.append(weights_TT / weights_TT.sum(dim=-1, keepdim=True) @ value_TH)
    return read.linear(f"{name}.o_proj", torch.cat(outputs, dim=-1), bias=traits.output_bias)


def _gated_mlp(read: _Reader, name: str, x_TD: Tensor, *, bias: bool) -> Tensor:
    gate = read.linear(f"{name}.gate_proj", x_TD, bias=bias)
    gate = gate / (1 + (-gate).exp())
    return read.linear(f"{name}.down_proj", gate * read.linear(f"{name}.up_proj", x_TD, bias=bias), bias=bias)


def _rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return x_TD / ((x_TD * x_TD).mean(dim=-1, keepdim=True) + eps).sqrt() * weight_D


def _visible(num_tokens: int, window: int | None) -> Tensor:
    """Bool [T, T]: may the token of the row see that of the column."""
    rows = [
        [column <= row and (window is None or row - column < window) for column in range(num_tokens)]
        for row in range(num_tokens)
    ]
    return torch.tensor(rows)


def _rotate(x_TH: Tensor, config: Config) -> Tensor:
    """Rotary embedding: pair i of a head, (x[i], x[i + H/2]), turned by position * theta^(-2i/H)."""
    rope = config["rope_parameters"]
    assert rope["rope_type"] == "default"
    num_tokens, head_size = x_TH.shape
    first, second = x_TH.split(head_size // 2, dim=-1)
    frequencies = [rope["rope_theta"] ** (-2 * pair / head_size) for pair in range(head_size // 2)]
    angles = torch.tensor([[position * f for f in frequencies] for position in range(num_tokens)], dtype=torch.float64)
    cos, sin = angles.cos().to(x_TH.dtype), angles.sin().to(x_TH.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
