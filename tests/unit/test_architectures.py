"""The table of families: which parameters belong to which block, and how many they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from blockpruner.architectures import (
    KNOWN_MODEL_TYPES,
    architecture_of,
    block_modules,
    block_sizes,
    num_parameters,
)
from blockpruner.blocks import Block, BlockKind, all_blocks, mha, mlp
from blockpruner.errors import UnsupportedArchitectureError
from tests.scorers import row_of
from tests.tiny_models import TINY_FAMILIES, tiny_model

LLAMA = architecture_of("llama")
every_family = pytest.mark.parametrize("family", TINY_FAMILIES)


def llama_2(hidden: int, intermediate: int, num_layers: int, num_heads: int) -> PreTrainedModel:
    """A Llama 2 without weights."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("hidden", "intermediate", "num_layers", "num_heads", "total", "num_mha", "num_mlp", "percent"),
    [(4096, 11008, 32, 32, 6_738_415_616, 12, 5, 21.99), (5120, 13824, 40, 40, 13_015_864_320, 17, 7, 25.12)],
    ids=["Llama-2-7B", "Llama-2-13B"],
)
def test_sizes_of_llama_2_give_the_papers_ratios(
    hidden: int, intermediate: int, num_layers: int, num_heads: int, total: int, num_mha: int, num_mlp: int,
    percent: float,
) -> None:  # fmt: skip
    """Table 1 of the paper: the blocks that were removed and the ratio of parameters that they are."""
    model = llama_2(hidden, intermediate, num_layers, num_heads)
    size_of = {BlockKind.MHA: 4 * hidden**2 + hidden, BlockKind.MLP: 3 * hidden * intermediate + hidden}
    sizes = block_sizes(LLAMA, model)
    assert sizes == {block: size_of[block.block_kind] for block in all_blocks(num_layers)}
    assert num_parameters(model) == total
    removed = [mha(index) for index in range(num_mha)] + [mlp(index) for index in range(num_mlp)]
    assert round(100 * sum(sizes[block] for block in removed) / num_parameters(model), 2) == percent


WITH_LAYER_NORM = ("falcon", "gpt2", "gpt_neox", "opt")


def closed_form(model: PreTrainedModel, layer_index: int) -> dict[str, int]:
    """Parameters of a layer's attention, of its feed-forward, and of what they share, from the configuration alone."""
    config = model.config
    if config.model_type in WITH_LAYER_NORM:
        return layer_norm_form(config)
    hidden = config.hidden_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    query, key = head * config.num_attention_heads, head * config.num_key_value_heads
    bias = getattr(config, "attention_bias", False)
    attention = hidden * (query + 2 * key) + query * hidden
    if bias or config.model_type in ("qwen2", "qwen2_moe"):
        attention += query + 2 * key
    if bias:
        attention += hidden
    if config.model_type in ("qwen3", "qwen3_moe", "gemma3_text"):
        attention += 2 * head
    if config.model_type == "olmo2" or getattr(config, "use_qk_norm", False):
        attention += query + key
    num_norms = {"cohere": 0, "cohere2": 0, "gemma2": 2, "gemma3_text": 2}.get(config.model_type, 1)
    feed_forward = gated_form(config, layer_index) + num_norms * hidden
    return {"mha": attention + num_norms * hidden, "mlp": feed_forward, "shared": 0 if num_norms else hidden}


def gated_form(config: PreTrainedConfig, layer_index: int) -> int:
    """A gated feed-forward, or a mixture of them with its router."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    num_experts = getattr(config, "num_experts", 0)
    if not num_experts or layer_index in getattr(config, "mlp_only_layers", ()):
        return 3 * hidden * intermediate + (2 * intermediate + hidden) * getattr(config, "mlp_bias", False)
    size = num_experts * (3 * hidden * getattr(config, "moe_intermediate_size", intermediate) + hidden)
    if config.model_type == "qwen2_moe":
        size += 3 * hidden * config.shared_expert_intermediate_size + hidden
    return size


def layer_norm_form(config: PreTrainedConfig) -> dict[str, int]:
    """The families with layer norms and plain feed-forward."""
    hidden, norm = config.hidden_size, 2 * config.hidden_size
    key_value, attention_bias, is_biased, shares = 2 * hidden, True, True, False
    inner = {"gpt2": "n_inner", "gpt_neox": "intermediate_size", "opt": "ffn_dim", "falcon": "ffn_hidden_size"}
    width = getattr(config, inner[config.model_type])
    if config.model_type == "gpt_neox":
        attention_bias = config.attention_bias
    if config.model_type == "falcon":
        groups = config.num_kv_heads if config.new_decoder_architecture or not config.multi_query else 1
        key_value, attention_bias, is_biased = 2 * groups * config.head_dim, config.bias, config.bias
        shares = config.parallel_attn and (config.num_ln_in_parallel_attn or 1) == 1
    attention = hidden * (hidden + key_value) + hidden * hidden + attention_bias * (2 * hidden + key_value)
    feed_forward = 2 * hidden * width + is_biased * (width + hidden)
    own = 0 if shares else norm
    return {"mha": attention + own, "mlp": feed_forward + own, "shared": norm if shares else 0}


@every_family
def test_sizes_of_every_family(family: str) -> None:
    model = tiny_model(family)
    assert block_sizes(row_of(model), model) == {
        block: closed_form(model, block.layer_index)[block.block_kind.value] for block in all_blocks(4)
    }


@every_family
def test_tied_embeddings_count_once(family: str) -> None:
    model = tiny_model(family)
    config = model.config
    num_positions = {"gpt2": 256, "opt": 258}.get(config.model_type, 0)
    num_vectors = config.vocab_size * (1 if config.tie_word_embeddings else 2) + num_positions
    final_norm = 2 if config.model_type in WITH_LAYER_NORM else 1
    layers = sum(sum(closed_form(model, index).values()) for index in range(4))
    assert num_parameters(model) == layers + (num_vectors + final_norm) * config.hidden_size


def test_tied_embeddings_count_once_without_weights_too() -> None:
    config = LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    counts = {}
    for config.tie_word_embeddings in (False, True):
        with torch.device("meta"):
            counts[config.tie_word_embeddings] = num_parameters(LlamaForCausalLM(config))
    assert counts[False] - counts[True] == 100 * 16


@every_family
def test_every_tensor_of_a_layer_belongs_to_one_block(family: str) -> None:
    """Or serves both: the sizes by tensor names equal the sizes by modules."""
    model = tiny_model(family)
    row = row_of(model)
    counted: dict[Block | None, int] = {}
    for name, tensor in model.state_dict().items():
        block = row.block_of_tensor(name)
        counted[block] = counted.get(block, 0) + tensor.numel()
        is_shared = any(f".{module}." in name for module in row.shared)
        assert (block is None) == (is_shared or not name.startswith(f"{row.layers}."))
    del counted[None]
    assert counted == block_sizes(row, model)


@every_family
def test_every_tensor_of_a_file_belongs_to_one_block_too(family: str, tiny_folder: Callable[[str], Path]) -> None:
    """In a file some have other names: a mixture's experts one by one, a head by its old name."""
    model = tiny_model(family)
    row = row_of(model)
    counted: dict[Block | None, int] = {}
    with safe_open(tiny_folder(family) / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
            block = row.block_of_tensor(name)
            counted[block] = counted.get(block, 0) + file.get_tensor(name).numel()
    del counted[None]
    assert counted == block_sizes(row, model)


@pytest.mark.parametrize(
    ("tensor", "block"),
    [
        ("model.layers.0.self_attn.q_proj.weight", mha(0)),
        ("model.layers.11.self_attn.k_norm.weight", mha(11)),
        ("model.layers.3.input_layernorm.weight", mha(3)),
        ("model.layers.3.post_attention_layernorm.weight", mlp(3)),
        ("model.layers.21.mlp.down_proj.bias", mlp(21)),
        ("model.embed_tokens.weight", None),
        ("model.norm.weight", None),
        ("lm_head.weight", None),
    ],
)
def test_the_block_of_a_tensor(tensor: str, block: Block | None) -> None:
    assert LLAMA.block_of_tensor(tensor) == block


@pytest.mark.parametrize(
    "tensor",
    ["model.layers.0.adapter.weight", "model.layers.x.mlp.up_proj.weight", "model.layers.0.mlp_extra.weight"],
)
def test_a_tensor_of_a_layer_that_belongs_to_no_block_is_refused(tensor: str) -> None:
    with pytest.raises(UnsupportedArchitectureError) as caught:
        LLAMA.block_of_tensor(tensor)
    assert tensor in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_the_modules_of_a_block() -> None:
    model = tiny_model("llama")
    layer = model.model.layers[2]
    assert list(block_modules(LLAMA, model, mha(2))) == [layer.self_attn, layer.input_layernorm]
    assert list(block_modules(LLAMA, model, mlp(2))) == [layer.mlp, layer.post_attention_layernorm]


@pytest.mark.parametrize(
    ("family", "shared"),
    [
        ("cohere", "model.layers.2.input_layernorm.weight"),
        ("cohere2", "model.layers.0.input_layernorm.weight"),
        ("falcon-one-norm", "transformer.h.1.input_layernorm.bias"),
        ("falcon-multi-query", "transformer.h.1.input_layernorm.weight"),
    ],
)
def test_a_norm_that_serves_both_blocks_belongs_to_neither(family: str, shared: str) -> None:
    model = tiny_model(family)
    row = row_of(model)
    assert row.block_of_tensor(shared) is None
    layer = row.decoder_layers(model)[1]
    for block in (mha(1), mlp(1)):
        assert layer.get_submodule("input_layernorm") not in list(block_modules(row, model, block))


@pytest.mark.parametrize(
    ("family", "is_parallel"),
    [
        *(("falcon", True), ("falcon-one-norm", True), ("falcon-multi-query", True), ("falcon-sequential", False)),
        *(("gpt_neox", True), ("gpt_neox-sequential", False), ("cohere", True), ("cohere2", True), ("llama", False)),
    ],
)
def test_whether_the_blocks_of_a_layer_read_the_same_input(family: str, is_parallel: bool) -> None:
    assert row_of(tiny_model(family)).is_parallel == is_parallel


def test_every_known_family_is_tested() -> None:
    """A family without a tiny model and an oracle has no business in the table."""
    assert {name: tiny_model(name).config.model_type for name in TINY_FAMILIES} == {
        name: name.partition("-")[0] for name in TINY_FAMILIES
    }
    assert set(KNOWN_MODEL_TYPES) == {name.partition("-")[0] for name in TINY_FAMILIES}


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is false, as in opt-350m"),
        ("falcon", {"alibi": True}, "ALiBi"),
        ("falcon", {"new_decoder_architecture": True, "parallel_attn": False}, "transformers cannot run this Falcon"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "transformers cannot run this Falcon"),
        ("gpt2", {"add_cross_attention": True}, "cross-attention"),
        ("bloom", {}, "add the residual themselves"),
        ("mpt", {}, "add the residual themselves"),
    ],
)
def test_what_can_never_be_the_identity_is_refused_with_the_reason(
    model_type: str, settings: dict[str, Any], reason: str
) -> None:
    config = AutoConfig.for_model(model_type, **settings)
    with pytest.raises(UnsupportedArchitectureError, match=reason) as caught:
        architecture_of(model_type).for_config(config)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "settings", [{"new_decoder_architecture": True, "parallel_attn": False}, {"num_ln_in_parallel_attn": 2}]
)
def test_transformers_indeed_cannot_run_such_a_falcon(settings: dict[str, Any]) -> None:
    with pytest.raises(AttributeError):
        tiny_model("falcon-multi-query", **settings)(input_ids=torch.zeros(1, 3, dtype=torch.long))


def test_an_unknown_family_is_named_and_the_known_ones_listed() -> None:
    with pytest.raises(UnsupportedArchitectureError) as caught:
        architecture_of("qwen22")
    text = str(caught.value)
    assert "'qwen22'" in text
    assert all(known in text for known in KNOWN_MODEL_TYPES)
    assert "did you mean 'qwen2'?" in text
    assert len(text.splitlines()) == 1
