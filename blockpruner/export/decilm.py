"""Format `decilm` (`nemotron-nas`): Llama's layers, each with what is left of it, for engines other than transformers.

vLLM, SGLang, TensorRT-LLM and MLX-LM read it; with a few lines of model code (`auto_map`) it loads in transformers too.

A layer of which nothing is left is left out, and a missing block has neither weights nor a norm. There is one
exception: the first layer must have an attention, for vLLM and SGLang begin the residual stream there. Where it has
lost it, that attention stays, with zeros in its output projection: it changes no logit, and costs its memory and time.
Repacking would not help, since what comes first is a feed-forward block either way. All attentions keep the same number
of key-value heads, because SGLang knows no other case.

What is refused is what one of the four engines would compute otherwise, or not load. MLX-LM knows no windows and takes
the heads' size from `hidden_size`; SGLang and TensorRT-LLM skip the biases of feed-forward blocks in silence. With the
biases of attention only TensorRT-LLM does so: models that have them, all Qwen2, are for the other three, and their card
says it. A Qwen2 has no bias in its output projection, where these engines expect one: it gets zeros.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from blockpruner.blocks import Block, BlockKind, mha, mlp
from blockpruner.errors import ExportError
from blockpruner.export.attention import head_dim, window
from blockpruner.export.code import TEMPLATES, ModelCode
from blockpruner.export.settings import refuse_unknown_lists
from blockpruner.export.source import ExportSource
from blockpruner.export.weights import TensorSource, dtype_of, write_tensors
from blockpruner.surgery import Places

_AUTO_MAP = {
    "AutoConfig": "configuration_decilm.DeciLMConfig",
    "AutoModel": "modeling_decilm.DeciLMModel",
    "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
}
_FAMILIES = ("llama", "mistral", "qwen2")
_ROPE_PARAMETERS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset({"factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}),
}
"""The rotary embeddings that the engines agree on, with the parameters that they all read."""
_MULTIPLE = 256
"""The engines round a feed-forward block's width up to a multiple of this."""
_COPIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_act"),
    *("max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "attention_dropout"),
    *("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"),
)
"""Settings that are taken over as they are. No others, for engines act on some that mean nothing here: a window that
is not used, types of layers by their old numbers."""


def check(source: ExportSource) -> None:
    """Refuse what this format cannot hold, or some engine would read wrongly.

    Raises:
        ExportError: with the reason.
    """
    family, config = source.checkpoint.model_type, source.config
    if family not in _FAMILIES:
        raise ExportError(f"format decilm is there for {', '.join(_FAMILIES)}, and this is a {family}")
    assert source.packed.layers  # an attention is left, or it has raised
    if window(source) is not None:
        raise ExportError(f"format decilm has no sliding windows, and this {family} has (of {config.sliding_window})")
    num_heads, num_groups = int(config.num_attention_heads), int(config.num_key_value_heads)
    if head_dim(source) * num_heads != config.hidden_size or num_heads % num_groups:
        raise ExportError(
            f"format decilm needs attention heads that divide the hidden size ({config.hidden_size}) among them and "
            f"are a multiple of the key-value heads; here {num_heads} of {head_dim(source)}, and {num_groups}"
        )
    if config.hidden_act != "silu" or getattr(config, "mlp_bias", False):
        raise ExportError(
            "format decilm has feed-forward blocks with SiLU and without biases; this model has "
            f"{config.hidden_act}{' and biases' if getattr(config, 'mlp_bias', False) else ''}"
        )
    _refuse_rope(config.rope_parameters)
    _refuse_width(int(config.hidden_size), int(config.intermediate_size))
    refuse_unknown_lists(source, ("layer_types",))


def carried(source: ExportSource) -> tuple[Block, ...]:
    """The removed block that stays with zeros: the first layer's attention."""
    first = mha(_layers(source)[0])
    return () if first in source.kept else (first,)


def places(source: ExportSource) -> Places:
    """The layer of each surviving block."""
    numbers = {old: str(new) for new, old in enumerate(_layers(source))}
    return {block: numbers[block.layer_index] for block in source.kept}


def write(source: ExportSource, out_dir: Path, shard_bytes: int) -> None:
    """Write weights, config.json and the two files of code."""
    numbers = {old: str(new) for new, old in enumerate(_layers(source))}
    written = frozenset((*source.kept, *carried(source)))

    def new_name(name: str, block: Block | None) -> str | None:
        if block is None:
            return name
        if block not in written or name.endswith("rotary_emb.inv_freq"):  # as in old checkpoints; MLX-LM refuses it
            return None
        return source.architecture.placed(name, numbers[block.layer_index])

    zeros = tuple(f"layers.{numbers[block.layer_index]}.self_attn.o_proj." for block in carried(source))
    tensors = [
        tensor.zeroed() if any(zero in tensor.name for zero in zeros) else tensor for tensor in source.tensors(new_name)
    ]
    write_tensors([*tensors, *_output_biases(source, numbers)], out_dir, shard_bytes)
    (out_dir / "config.json").write_text(json.dumps(_settings(source), indent=2) + "\n", encoding="utf-8")
    code_of({}).write(out_dir)


def code_of(_: Mapping[str, Any]) -> ModelCode:
    """The code of every export in this format, whatever its config.json."""
    names = ("configuration_decilm.py", "modeling_decilm.py")
    return ModelCode({name: (TEMPLATES / f"{name}.txt").read_text(encoding="utf-8") for name in names}, _AUTO_MAP)


def engine_width(ffn_mult: float, hidden_size: int) -> int:
    """The width that the engines give a feed-forward block."""
    width = int(2 * ffn_mult * hidden_size / 3)
    return width + -width % _MULTIPLE


def _layers(source: ExportSource) -> list[int]:
    """The layers of the original of which something is left."""
    return sorted({block.layer_index for block in source.kept})


def _refuse_rope(parameters: dict[str, Any]) -> None:
    kind = parameters["rope_type"]
    known = _ROPE_PARAMETERS.get(kind)
    if known is None:
        raise ExportError(f"format decilm has rotary embeddings {', '.join(_ROPE_PARAMETERS)}, and this model {kind}")
    if unknown := sorted(parameters.keys() - known - {"rope_type", "rope_theta", "type"}):
        raise ExportError(f"the engines that read decilm do not agree on the rotary setting {', '.join(unknown)}")


def _ffn_mult(hidden_size: int, intermediate_size: int) -> float:
    return 3 * intermediate_size / (2 * hidden_size)


def _refuse_width(hidden_size: int, intermediate_size: int) -> None:
    ffn_mult = _ffn_mult(hidden_size, intermediate_size)
    for value in (ffn_mult, round(ffn_mult, 6)):  # MLX-LM rounds it
        width = engine_width(value, hidden_size)
        if width != intermediate_size:
            raise ExportError(
                f"format decilm gives the width of a feed-forward block as a factor, which engines round up to a "
                f"multiple of {_MULTIPLE}: they would make {width} of this model's {intermediate_size}"
            )


def _has_attention_bias(source: ExportSource) -> bool:
    return source.checkpoint.model_type == "qwen2" or bool(getattr(source.config, "attention_bias", False))


def _output_biases(source: ExportSource, numbers: dict[int, str]) -> list[TensorSource]:
    """Zeros for the output projections of a family with biases on the other projections only."""
    if source.checkpoint.model_type != "qwen2":
        return []
    biases = []
    for block in (*source.kept, *carried(source)):
        if block.block_kind is not BlockKind.MHA:
            continue
        name = f"model.layers.{numbers[block.layer_index]}.self_attn.o_proj.bias"
        weight = source.checkpoint.tensors[f"model.layers.{block.layer_index}.self_attn.o_proj.weight"]
        dtype = source.torch_dtype or dtype_of(weight)
        size = weight.shape[0]
        biases.append(TensorSource(name, size * dtype.itemsize, partial(torch.zeros, size, dtype=dtype), dtype))
    return biases


def _settings(source: ExportSource) -> dict[str, Any]:
    config, given = source.config, source.settings()
    rope = {key: value for key, value in config.rope_parameters.items() if key != "type"}
    settings: dict[str, Any] = {
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": dict(_AUTO_MAP),
        "num_hidden_layers": len(_layers(source)),
        **{key: getattr(config, key) for key in _COPIED},
        "head_dim": head_dim(source),
        "attention_bias": _has_attention_bias(source),
        "mlp_bias": False,
        # In the words of transformers 5, of those before it and of the engines.
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "block_configs": _block_configs(source),
    }
    dtype = given.get("dtype") or given.get("torch_dtype")
    return settings | ({"torch_dtype": dtype} if dtype else {})  # known to all versions of transformers


def _block_configs(source: ExportSource) -> list[dict[str, Any]]:
    """What each layer has; with these keys and no others, for MLX-LM refuses unknown ones."""
    config = source.config
    written = frozenset((*source.kept, *carried(source)))
    group_size = config.num_attention_heads // config.num_key_value_heads
    ffn_mult = _ffn_mult(config.hidden_size, config.intermediate_size)
    return [
        {
            "attention": {
                "no_op": mha(index) not in written,
                "replace_with_linear": False,
                "sparsify": None,
                "n_heads_in_group": group_size if mha(index) in written else None,
                "window_length": None,
                "num_sink_tokens": None,
                "use_prefill_window_in_sink_attention": False,
                "unshifted_sink": False,
            },
            "ffn": {
                "no_op": mlp(index) not in written,
                "replace_with_linear": False,
                "sparsify": None,
                "ffn_mult": ffn_mult if mlp(index) in written else None,
            },
        }
        for index in _layers(source)
    ]
