"""The table of families: which parameters belong to which block, and how many they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from blockpruner.architectures import KNOWN_MODEL_TYPES, architecture_of, block_modules, block_sizes, num_parameters
from blockpruner.blocks import Block, BlockKind, all_blocks, mha, mlp
from blockpruner.errors import UnsupportedArchitectureError
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


def closed_form(model: PreTrainedModel) -> tuple[int, int]:
    """Parameters of an attention and of a feed-forward block, from the configuration alone."""
    config = model.config.to_dict()
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    query, key_value = head * config["num_attention_heads"], 2 * head * config["num_key_value_heads"]
    attention = hidden * (query + key_value) + query * hidden + hidden
    feed_forward = 3 * hidden * intermediate + hidden
    if config["model_type"] == "qwen2" or config.get("attention_bias"):
        attention += query + key_value
    if config.get("attention_bias"):
        attention += hidden
    if config.get("mlp_bias"):
        feed_forward += 2 * intermediate + hidden
    if config["model_type"] == "qwen3":
        attention += 2 * head
    return attention, feed_forward


@every_family
def test_sizes_of_every_family(family: str) -> None:
    model = tiny_model(family)
    attention, feed_forward = closed_form(model)
    sizes = block_sizes(architecture_of(model.config.model_type), model)
    assert list(sizes) == list(all_blocks(4))
    assert list(sizes.values()) == [attention, feed_forward] * 4


@every_family
def test_tied_embeddings_count_once(family: str) -> None:
    model = tiny_model(family)
    num_embeddings = model.config.vocab_size * model.config.hidden_size
    outside = num_embeddings * (1 if model.config.tie_word_embeddings else 2) + model.config.hidden_size
    assert num_parameters(model) == 4 * sum(closed_form(model)) + outside


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
def test_every_tensor_of_a_layer_belongs_to_one_block(family: str, tiny_folder: Callable[[str], Path]) -> None:
    """In the file as in the model: the sizes by tensor names equal the sizes by modules."""
    model = tiny_model(family)
    architecture = architecture_of(model.config.model_type)
    counted: dict[Block | None, int] = {}
    with safe_open(tiny_folder(family) / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
            block = architecture.block_of_tensor(name)
            counted[block] = counted.get(block, 0) + file.get_tensor(name).numel()
            assert (block is None) == (not name.startswith("model.layers."))
    del counted[None]
    assert counted == block_sizes(architecture, model)


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


def test_every_known_family_is_tested() -> None:
    """A family without a tiny model and an oracle has no business in the table."""
    assert {"llama", "mistral", "qwen2", "qwen3"} <= set(KNOWN_MODEL_TYPES)
    assert set(KNOWN_MODEL_TYPES) == {tiny_model(family).config.model_type for family in TINY_FAMILIES}


def test_an_unknown_family_is_named_and_the_known_ones_listed() -> None:
    with pytest.raises(UnsupportedArchitectureError) as caught:
        architecture_of("qwen22")
    text = str(caught.value)
    assert "'qwen22'" in text
    assert all(known in text for known in KNOWN_MODEL_TYPES)
    assert "did you mean 'qwen2'?" in text
    assert len(text.splitlines()) == 1
