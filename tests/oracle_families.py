"""Forward passes by family, written out by hand from the parts of `tests/oracle_parts.py`, for one sequence.

First the families with RMS norms, rotary positions and gated feed-forward, then those with layer norms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from tests.oracle_parts import (
    Config,
    Forward,
    Reader,
    RemovedBlocks,
    activation,
    attend,
    fused_heads,
    gated_mlp,
    heads_of,
    layer_norm,
    mixture,
    plain_mlp,
    rms_norm,
    rotate,
    stacked_gated_mlp,
    tied,
)

Mlp = Callable[[Reader, Config, str, int, Tensor], Tensor]
"""(reader, config, the module's name, layer index, input [T, D]) -> [T, D]."""


@dataclass(frozen=True)
class _Traits:
    """Where the families with RMS norms, rotary positions and gated feed-forward differ."""

    windows: tuple[int | None, ...]
    """For each layer how many of the last tokens, itself included, a token sees; None: all of them."""
    mlp: Mlp
    qkv_bias: bool = False
    output_bias: bool = False
    is_qkv_fused: bool = False
    query_key_norm: Literal["head", "all heads"] | None = None
    norm_adds_one: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    mha_norms: tuple[str | None, str | None] = ("input_layernorm", None)
    """Before and after the attention."""
    mlp_norms: tuple[str | None, str | None] = ("post_attention_layernorm", None)

    def norm(self, read: Reader, config: Config, name: str, x_TD: Tensor) -> Tensor:
        """One of the family's norms."""
        return rms_norm(x_TD, read(f"{name}.weight") + self.norm_adds_one, config["rms_norm_eps"])


def _everything(config: Config) -> tuple[int | None, ...]:
    return (None,) * config["num_hidden_layers"]


def _same_window(config: Config) -> tuple[int | None, ...]:
    return (config["sliding_window"],) * config["num_hidden_layers"]


def _windows_by_type(config: Config) -> tuple[int | None, ...]:
    windows = {"full_attention": None, "sliding_attention": config["sliding_window"]}
    return tuple(windows[layer_type] for layer_type in config["layer_types"])


def _gated(read: Reader, config: Config, name: str, _: int, x_TD: Tensor) -> Tensor:
    return gated_mlp(read, name, config["hidden_act"], x_TD, bias=bool(config.get("mlp_bias")))


def _gemma_gated(read: Reader, config: Config, name: str, _: int, x_TD: Tensor) -> Tensor:
    return gated_mlp(read, name, config.get("hidden_activation") or config["hidden_act"], x_TD)


def _fused_gated(read: Reader, config: Config, name: str, _: int, x_TD: Tensor) -> Tensor:
    gate_up, down = read(f"{name}.gate_up_proj.weight"), read(f"{name}.down_proj.weight")
    return stacked_gated_mlp(gate_up, down, config["hidden_act"], x_TD)


def _mixture(read: Reader, config: Config, name: str, index: int, x_TD: Tensor) -> Tensor:
    """A mixture of experts, beside one that every token goes to if there is one; a plain block in some layers."""
    if index in config.get("mlp_only_layers", ()):
        return gated_mlp(read, name, config["hidden_act"], x_TD)
    assert config.get("decoder_sparse_step", 1) == 1
    chosen, normalised = config["num_experts_per_tok"], config.get("norm_topk_prob", True)
    y_TD = mixture(read, name, x_TD, config["hidden_act"], chosen, normalised=normalised)
    if "shared_expert_intermediate_size" not in config:
        return y_TD
    opened = 1 / (1 + (-read.linear(f"{name}.shared_expert_gate", x_TD, bias=False)).exp())
    return y_TD + opened * gated_mlp(read, f"{name}.shared_expert", config["hidden_act"], x_TD)


def _llama(config: Config) -> _Traits:
    bias = bool(config["attention_bias"])
    return _Traits(_everything(config), _gated, bias, bias)


def _mistral(config: Config) -> _Traits:
    return _Traits(_same_window(config), _gated)


def _qwen2(config: Config) -> _Traits:
    return _Traits(_windows_by_type(config), _gated, qkv_bias=True)


def _qwen3(config: Config) -> _Traits:
    bias = bool(config["attention_bias"])
    return _Traits(_windows_by_type(config), _gated, bias, bias, query_key_norm="head")


def _phi3(config: Config) -> _Traits:
    return _Traits(_same_window(config), _fused_gated, is_qkv_fused=True)


def _olmo2(config: Config) -> _Traits:
    return _Traits(
        _everything(config),
        _gated,
        query_key_norm="all heads",
        mha_norms=(None, "post_attention_layernorm"),
        mlp_norms=(None, "post_feedforward_layernorm"),
    )


def _mixtral(config: Config) -> _Traits:
    return _Traits(_same_window(config), _mixture)


def _qwen2_moe(config: Config) -> _Traits:
    return _Traits(_windows_by_type(config), _mixture, qkv_bias=bool(config["qkv_bias"]))


def _qwen3_moe(config: Config) -> _Traits:
    bias = bool(config["attention_bias"])
    return _Traits(_same_window(config), _mixture, bias, bias, query_key_norm="head")


def _gemma(config: Config) -> _Traits:
    return _Traits(_everything(config), _gemma_gated, norm_adds_one=True, embedding_scale=config["hidden_size"] ** 0.5)


def _gemma2(config: Config) -> _Traits:
    return _Traits(
        _windows_by_type(config),
        _gemma_gated,
        norm_adds_one=True,
        embedding_scale=config["hidden_size"] ** 0.5,
        attention_scale=config["query_pre_attn_scalar"] ** -0.5,
        attention_cap=config["attn_logit_softcapping"],
        logit_cap=config["final_logit_softcapping"],
        mha_norms=("input_layernorm", "post_attention_layernorm"),
        mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    )


def _gemma3(config: Config) -> _Traits:
    return _Traits(
        _windows_by_type(config),
        _gemma_gated,
        query_key_norm="head",
        norm_adds_one=True,
        embedding_scale=config["hidden_size"] ** 0.5,
        attention_scale=config["query_pre_attn_scalar"] ** -0.5,
        mha_norms=("input_layernorm", "post_attention_layernorm"),
        mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    )


def _rms_rope_decoder(traits_of: Callable[[Config], _Traits]) -> Forward:
    """The forward pass of a family with RMS norms, rotary positions and gated feed-forward."""

    def forward(read: Reader, config: Config, token_ids_T: Tensor, removed: RemovedBlocks) -> Tensor:
        traits = traits_of(config)
        x_TD = read("model.embed_tokens.weight")[token_ids_T] * traits.embedding_scale
        for index in range(config["num_hidden_layers"]):
            layer = f"model.layers.{index}"
            for kind, (before, after) in (("mha", traits.mha_norms), ("mlp", traits.mlp_norms)):
                if (index, kind) in removed:
                    continue
                y_TD = traits.norm(read, config, f"{layer}.{before}", x_TD) if before else x_TD
                if kind == "mha":
                    y_TD = _attention(read, f"{layer}.self_attn", config, traits, index, y_TD)
                else:
                    y_TD = traits.mlp(read, config, f"{layer}.mlp", index, y_TD)
                x_TD = x_TD + (traits.norm(read, config, f"{layer}.{after}", y_TD) if after else y_TD)
        x_TD = traits.norm(read, config, "model.norm", x_TD)
        logits_TV = x_TD @ read(tied(config, "model.embed_tokens.weight")).T
        return traits.logit_cap * (logits_TV / traits.logit_cap).tanh() if traits.logit_cap else logits_TV

    return forward


def _attention(read: Reader, name: str, config: Config, traits: _Traits, index: int, x_TD: Tensor) -> Tensor:
    num_heads, num_groups = config["num_attention_heads"], config["num_key_value_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // num_heads
    if traits.is_qkv_fused:
        sizes = [head_size * number for number in (num_heads, num_groups, num_groups)]
        query, key, value = read.linear(f"{name}.qkv_proj", x_TD, bias=traits.qkv_bias).split(sizes, dim=-1)
    else:
        query, key, value = (read.linear(f"{name}.{part}_proj", x_TD, bias=traits.qkv_bias) for part in "qkv")
    if traits.query_key_norm == "all heads":
        query, key = (traits.norm(read, config, f"{name}.{part}_norm", x) for part, x in (("q", query), ("k", key)))
    queries, keys, values = (heads_of(x, head_size) for x in (query, key, value))
    if traits.query_key_norm == "head":
        queries = [traits.norm(read, config, f"{name}.q_norm", x) for x in queries]
        keys = [traits.norm(read, config, f"{name}.k_norm", x) for x in keys]
    rope = _rope_of(config, index)
    y_TD = attend(
        [rotate(x, rope) for x in queries],
        [rotate(x, rope) for x in keys],
        values,
        scale=traits.attention_scale,
        window=traits.windows[index],
        cap=traits.attention_cap,
    )
    return read.linear(f"{name}.o_proj", y_TD, bias=traits.output_bias)


def _rope_of(config: Config, index: int) -> Any:
    """The rotary parameters of a layer, which can differ by its type."""
    rope = config["rope_parameters"]
    return rope if "rope_type" in rope else rope[config["layer_types"][index]]


def _cohere(read: Reader, config: Config, token_ids_T: Tensor, removed: RemovedBlocks) -> Tensor:
    """Cohere and Cohere 2: one norm for both blocks of a layer, without bias; neither sees the other's output."""
    x_TD = read("model.embed_tokens.weight")[token_ids_T]
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        if {(index, "mha"), (index, "mlp")} <= removed:
            continue
        normed_TD = layer_norm(x_TD, read(f"{layer}.input_layernorm.weight"), config["layer_norm_eps"])
        if (index, "mha") not in removed:
            x_TD = x_TD + _cohere_attention(read, f"{layer}.self_attn", config, index, normed_TD)
        if (index, "mlp") not in removed:
            x_TD = x_TD + gated_mlp(read, f"{layer}.mlp", config["hidden_act"], normed_TD)
    x_TD = layer_norm(x_TD, read("model.norm.weight"), config["layer_norm_eps"])
    return x_TD @ read(tied(config, "model.embed_tokens.weight")).T * config["logit_scale"]


def _cohere_attention(read: Reader, name: str, config: Config, index: int, x_TD: Tensor) -> Tensor:
    """In Cohere 2 only the layers with a window have positions."""
    head_size, bias = config["hidden_size"] // config["num_attention_heads"], bool(config["attention_bias"])
    queries, keys, values = (heads_of(read.linear(f"{name}.{part}_proj", x_TD, bias=bias), head_size) for part in "qkv")
    if config.get("use_qk_norm"):  # a weight for each head
        eps, query_weights, key_weights = (
            config["layer_norm_eps"],
            read(f"{name}.q_norm.weight"),
            read(f"{name}.k_norm.weight"),
        )
        queries = [layer_norm(x, weight_H, eps) for x, weight_H in zip(queries, query_weights, strict=True)]
        keys = [layer_norm(x, weight_H, eps) for x, weight_H in zip(keys, key_weights, strict=True)]
    window = _windows_by_type(config)[index] if "layer_types" in config else None
    if window is not None or "layer_types" not in config:
        queries, keys = ([rotate(x, config["rope_parameters"], interleaved=True) for x in xs] for xs in (queries, keys))
    return read.linear(f"{name}.o_proj", attend(queries, keys, values, window=window), bias=bias)


def _gpt2(read: Reader, config: Config, token_ids_T: Tensor, removed: RemovedBlocks) -> Tensor:
    eps, width = config["layer_norm_epsilon"], config["n_embd"]
    x_TD = read("transformer.wte.weight")[token_ids_T] + read("transformer.wpe.weight")[: len(token_ids_T)]

    def linear(name: str, x: Tensor) -> Tensor:  # GPT-2 keeps its matrices the other way round
        return x @ read(f"{name}.weight") + read(f"{name}.bias")

    for index in range(config["n_layer"]):
        layer = f"transformer.h.{index}"
        if (index, "mha") not in removed:
            qkv = linear(f"{layer}.attn.c_attn", read.layer_norm(f"{layer}.ln_1", x_TD, eps))
            head_size = width // config["n_head"]
            scale = head_size**-0.5 if config["scale_attn_weights"] else 1.0
            scale /= index + 1 if config["scale_attn_by_inverse_layer_idx"] else 1
            heads = [heads_of(part, head_size) for part in qkv.split(width, dim=-1)]
            x_TD = x_TD + linear(f"{layer}.attn.c_proj", attend(*heads, scale=scale))
        if (index, "mlp") not in removed:
            inner = linear(f"{layer}.mlp.c_fc", read.layer_norm(f"{layer}.ln_2", x_TD, eps))
            x_TD = x_TD + linear(f"{layer}.mlp.c_proj", activation(config["activation_function"], inner))
    x_TD = read.layer_norm("transformer.ln_f", x_TD, eps)
    return x_TD @ read(tied(config, "transformer.wte.weight")).T


def _opt(read: Reader, config: Config, token_ids_T: Tensor, removed: RemovedBlocks) -> Tensor:
    eps, act = 1e-5, config["activation_function"]
    positions = read("model.decoder.embed_positions.weight")[2 : 2 + len(token_ids_T)]  # the first two serve padding
    x_TD = read("model.decoder.embed_tokens.weight")[token_ids_T] + positions
    for index in range(config["num_hidden_layers"]):
        layer = f"model.decoder.layers.{index}"
        if (index, "mha") not in removed:
            normed_TD = read.layer_norm(f"{layer}.self_attn_layer_norm", x_TD, eps)
            head_size = config["hidden_size"] // config["num_attention_heads"]
            heads = [
                heads_of(read.linear(f"{layer}.self_attn.{part}_proj", normed_TD, bias=True), head_size)
                for part in "qkv"
            ]
            x_TD = x_TD + read.linear(f"{layer}.self_attn.out_proj", attend(*heads), bias=True)
        if (index, "mlp") not in removed:
            normed_TD = read.layer_norm(f"{layer}.final_layer_norm", x_TD, eps)
            x_TD = x_TD + plain_mlp(read, f"{layer}.fc1", f"{layer}.fc2", act, normed_TD)
    x_TD = read.layer_norm("model.decoder.final_layer_norm", x_TD, eps)
    return x_TD @ read(tied(config, "model.decoder.embed_tokens.weight")).T


def _gpt_neox(read: Reader, config: Config, token_ids_T: Tensor, removed: RemovedBlocks) -> Tensor:
    x_TD = read("gpt_neox.embed_in.weight")[token_ids_T]
    eps, bias, act = config["layer_norm_eps"], config["attention_bias"], config["hidden_act"]
    for index in range(config["num_hidden_layers"]):
        layer = f"gpt_neox.layers.{index}"
        entered_TD = x_TD
        if (index, "mha") not in removed:
            normed_TD = read.layer_norm(f"{layer}.input_layernorm", x_TD, eps)
            groups = config["num_attention_heads"]
            x_TD = x_TD + _fused_attention(read, f"{layer}.attention", config, groups, bias, normed_TD)
        if (index, "mlp") not in removed:
            seen_TD = entered_TD if config["use_parallel_residual"] else x_TD
            normed_TD = read.layer_norm(f"{layer}.post_attention_layernorm", seen_TD, eps)
            into, out = f"{layer}.mlp.dense_h_to_4h", f"{layer}.mlp.dense_4h_to_h"
            x_TD = x_TD + plain_mlp(read, into, out, act, normed_TD)
    x_TD = read.layer_norm("gpt_neox.final_layer_norm", x_TD, eps)
    return x_TD @ read(tied(config, "gpt_neox.embed_in.weight")).T


def _falcon(read: Reader, config: Config, token_ids_T: Tensor, removed: RemovedBlocks) -> Tensor:
    x_TD = read("transformer.word_embeddings.weight")[token_ids_T]
    eps, bias, act, is_new = (
        config[key] for key in ("layer_norm_epsilon", "bias", "activation", "new_decoder_architecture")
    )
    heads = config["num_attention_heads"]
    groups = config["num_kv_heads"] if is_new else 1 if config["multi_query"] else heads
    mha_norm, mlp_norm = "input_layernorm", "input_layernorm"
    if not config["parallel_attn"]:
        mlp_norm = "post_attention_layernorm"
    elif is_new and config["num_ln_in_parallel_attn"] != 1:
        mha_norm, mlp_norm = "ln_attn", "ln_mlp"
    for index in range(config["num_hidden_layers"]):
        layer = f"transformer.h.{index}"
        entered_TD = x_TD
        if (index, "mha") not in removed:
            normed_TD = read.layer_norm(f"{layer}.{mha_norm}", x_TD, eps)
            x_TD = x_TD + _fused_attention(read, f"{layer}.self_attention", config, groups, bias, normed_TD)
        if (index, "mlp") not in removed:
            normed_TD = read.layer_norm(f"{layer}.{mlp_norm}", entered_TD if config["parallel_attn"] else x_TD, eps)
            into, out = f"{layer}.mlp.dense_h_to_4h", f"{layer}.mlp.dense_4h_to_h"
            x_TD = x_TD + plain_mlp(read, into, out, act, normed_TD, bias=bias)
    x_TD = read.layer_norm("transformer.ln_f", x_TD, eps)
    return x_TD @ read(tied(config, "transformer.word_embeddings.weight")).T


def _fused_attention(read: Reader, name: str, config: Config, groups: int, bias: bool, x_TD: Tensor) -> Tensor:
    """The rotary attention of GPT-NeoX and Falcon: one matrix for queries, keys and values, group by group."""
    num_heads, rope = config["num_attention_heads"], config["rope_parameters"]
    qkv = read.linear(f"{name}.query_key_value", x_TD, bias=bias)
    queries, keys, values = fused_heads(qkv, config["hidden_size"] // num_heads, num_heads, groups)
    y_TD = attend([rotate(x, rope) for x in queries], [rotate(x, rope) for x in keys], values)
    return read.linear(f"{name}.dense", y_TD, bias=bias)


ORACLES: dict[str, Forward] = {
    "cohere": _cohere,
    "cohere2": _cohere,
    "falcon": _falcon,
    "gemma": _rms_rope_decoder(_gemma),
    "gemma2": _rms_rope_decoder(_gemma2),
    "gemma3_text": _rms_rope_decoder(_gemma3),
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "llama": _rms_rope_decoder(_llama),
    "mistral": _rms_rope_decoder(_mistral),
    "mixtral": _rms_rope_decoder(_mixtral),
    "olmo2": _rms_rope_decoder(_olmo2),
    "opt": _opt,
    "phi3": _rms_rope_decoder(_phi3),
    "qwen2": _rms_rope_decoder(_qwen2),
    "qwen2_moe": _rms_rope_decoder(_qwen2_moe),
    "qwen3": _rms_rope_decoder(_qwen3),
    "qwen3_moe": _rms_rope_decoder(_qwen3_moe),
}
"""By `model_type`."""
