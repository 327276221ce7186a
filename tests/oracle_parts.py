"""The parts that hand-written forward passes are put together from: norms, activations, rotary turns, attention.

Plain torch, for one sequence. Like `tests/oracles.py`, shares no line with transformers and none with the library.

Shapes: `T` tokens of a sequence, `D` hidden, `H` size of a head, `F` inner size of a feed-forward block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor

RemovedBlocks = AbstractSet[tuple[int, str]]
"""Blocks that are not there: (layer_index, "mha") or (layer_index, "mlp"). A `BlockKind` equals its string."""

Config = Mapping[str, Any]
"""config.json, or `model.config.to_dict()`."""


class Reader:
    """Reads tensors by name in one dtype."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Read from a state dict."""
        self._tensors, self._dtype = tensors, dtype

    def __call__(self, name: str) -> Tensor:
        """A tensor."""
        return self._tensors[name].detach().cpu().to(self._dtype)

    def linear(self, name: str, x_TD: Tensor, *, bias: bool) -> Tensor:
        """x W^T, plus the bias where the family has one."""
        y = x_TD @ self(f"{name}.weight").T
        return y + self(f"{name}.bias") if bias else y

    def layer_norm(self, name: str, x_TD: Tensor, eps: float) -> Tensor:
        """A layer norm with weight and bias."""
        return layer_norm(x_TD, self(f"{name}.weight"), eps) + self(f"{name}.bias")


Forward = Callable[[Reader, Config, Tensor, RemovedBlocks], Tensor]
"""(reader, config, token ids [T], removed) -> logits [T, V]."""


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x over its root mean square."""
    return x_TD / ((x_TD * x_TD).mean(dim=-1, keepdim=True) + eps).sqrt() * weight_D


def layer_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x less its mean, over its standard deviation."""
    x_TD = x_TD - x_TD.mean(dim=-1, keepdim=True)
    return rms_norm(x_TD, weight_D, eps)


def activation(name: str, x: Tensor) -> Tensor:
    """The function that a configuration names."""
    if name == "relu":
        return x * (x > 0)
    if name == "silu":
        return x / (1 + (-x).exp())
    if name == "gelu":
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    assert name in ("gelu_new", "gelu_pytorch_tanh")
    return x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)).tanh()) / 2


def softmax(scores: Tensor) -> Tensor:
    """exp over the sum of exp, along the last dimension."""
    weights = (scores - scores.max(dim=-1, keepdim=True).values).exp()
    return weights / weights.sum(dim=-1, keepdim=True)


def attend(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    scale: float | None = None,
    window: int | None = None,
    cap: float | None = None,
) -> Tensor:
    """Causal attention, [T, heads * H].

    Args:
        queries: [T, H] of each head.
        keys: of each group of heads; neighbouring heads share one.
        values: likewise.
        scale: of the scores; None: 1 / sqrt(H).
        window: how many of the last tokens, itself included, a token sees; None: all of them.
        cap: squeezes the scores into (-cap, cap).
    """
    outputs = []
    for head, query_TH in enumerate(queries):
        group = head // (len(queries) // len(keys))
        scores_TT = query_TH @ keys[group].T * (query_TH.shape[-1] ** -0.5 if scale is None else scale)
        if cap is not None:
            scores_TT = cap * (scores_TT / cap).tanh()
        scores_TT = scores_TT.masked_fill(~_visible(len(query_TH), window), -math.inf)
        outputs.append(softmax(scores_TT) @ values[group])
    return torch.cat(outputs, dim=-1)


def _visible(num_tokens: int, window: int | None) -> Tensor:
    """Bool [T, T]: may the token of the row see that of the column."""
    rows = [
        [column <= row and (window is None or row - column < window) for column in range(num_tokens)]
        for row in range(num_tokens)
    ]
    return torch.tensor(rows)


def heads_of(x: Tensor, head_size: int) -> list[Tensor]:
    """[T, heads * H] -> [T, H] of each head."""
    return list(x.split(head_size, dim=-1))


def fused_heads(x: Tensor, head_size: int, num_heads: int, num_groups: int) -> tuple[list[Tensor], ...]:
    """Queries, keys and values of a projection in which each group's queries are followed by its key and its value."""
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for group in x.split((num_heads // num_groups + 2) * head_size, dim=-1):
        *own, key, value = heads_of(group, head_size)
        queries += own
        keys.append(key)
        values.append(value)
    assert len(queries) == num_heads
    return queries, keys, values


def rotate(x_TH: Tensor, rope: Mapping[str, Any], *, interleaved: bool = False) -> Tensor:
    """Rotary embedding: pair i of a head, turned by position * theta^(-2i/H).

    A pair is (x[i], x[i + H/2]), or (x[2i], x[2i+1]) if interleaved. Where only a part of a head is turned, H is the
    size of that part, and the rest stays.
    """
    assert rope["rope_type"] == "default"
    size = int(x_TH.shape[-1] * (rope.get("partial_rotary_factor") or 1))
    turned_TH, rest_TH = x_TH[:, :size], x_TH[:, size:]
    frequencies = [rope["rope_theta"] ** (-2 * pair / size) for pair in range(size // 2)]
    angles = torch.tensor([[position * f for f in frequencies] for position in range(len(x_TH))], dtype=torch.float64)
    cos, sin = angles.cos().to(x_TH.dtype), angles.sin().to(x_TH.dtype)
    first, second = (turned_TH[:, 0::2], turned_TH[:, 1::2]) if interleaved else turned_TH.split(size // 2, dim=-1)
    first, second = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        return torch.cat([torch.stack([first, second], dim=-1).flatten(1), rest_TH], dim=-1)
    return torch.cat([first, second, rest_TH], dim=-1)


def plain_mlp(read: Reader, into: str, out: str, act: str, x_TD: Tensor, *, bias: bool = True) -> Tensor:
    """Up, activation, down."""
    return read.linear(out, activation(act, read.linear(into, x_TD, bias=bias)), bias=bias)


def gated_mlp(read: Reader, name: str, act: str, x_TD: Tensor, *, bias: bool = False) -> Tensor:
    """The activated gate times up, then down."""
    gate_TF = activation(act, read.linear(f"{name}.gate_proj", x_TD, bias=bias))
    return read.linear(f"{name}.down_proj", gate_TF * read.linear(f"{name}.up_proj", x_TD, bias=bias), bias=bias)


def stacked_gated_mlp(gate_up: Tensor, down: Tensor, act: str, x_TD: Tensor) -> Tensor:
    """A gated feed-forward without biases whose gate and up matrices are one, gate first."""
    gate_TF, up_TF = (x_TD @ gate_up.T).split(len(gate_up) // 2, dim=-1)
    return activation(act, gate_TF) * up_TF @ down.T


def mixture(read: Reader, name: str, x_TD: Tensor, act: str, num_chosen: int, *, normalised: bool) -> Tensor:
    """Each token's sum over the experts that its router prefers, weighted by their probabilities."""
    gate_up, down = read(f"{name}.experts.gate_up_proj"), read(f"{name}.experts.down_proj")
    probabilities_TE = softmax(x_TD @ read(f"{name}.gate.weight").T)
    rows = []
    for x_D, probabilities_E in zip(x_TD, probabilities_TE, strict=True):
        chosen = sorted(range(len(down)), key=lambda expert: -float(probabilities_E[expert]))[:num_chosen]
        total = sum(probabilities_E[expert] for expert in chosen) if normalised else 1
        rows.append(
            sum(
                probabilities_E[expert] / total * stacked_gated_mlp(gate_up[expert], down[expert], act, x_D[None])[0]
                for expert in chosen
            )
        )
    return torch.stack(rows)


def tied(config: Config, embedding: str) -> str:
    """The name of the output embedding's tensor."""
    return embedding if config["tie_word_embeddings"] else "lm_head.weight"
