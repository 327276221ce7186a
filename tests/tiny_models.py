"""Tiny random models and a tiny tokenizer, built on the spot: a few layers of every family, in milliseconds.

Every weight is random, the norms' and the biases' too, and large enough that each block changes the logits: whoever
forgets a norm, a bias or a block gets other numbers. Knows nothing of the library under test.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 128
PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
"""Token ids 0 to 3."""

_WORDS = (
    *("river", "stone", "lantern", "keeper", "morning", "harbour", "silver", "winter", "garden", "letter", "narrow"),
    *("walked", "carried", "opened", "found", "remembered", "quiet", "yellow", "heavy", "distant", "slowly", "often"),
    *("never", "again", "under", "behind", "the", "a", "and", "of", "to", "in", "was", "she", "he", "they"),
)


def _builder(model_type: str, **family_config: Any) -> Callable[..., PreTrainedModel]:
    """A function that builds a random model of a family; its keywords override the configuration."""

    def build(*, seed: int = 0, **overrides: Any) -> PreTrainedModel:
        values: dict[str, Any] = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        config = AutoConfig.for_model(model_type, **(values | family_config | overrides))
        model = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=torch.float32))
        _randomise(model, seed)
        return cast(PreTrainedModel, model.eval().requires_grad_(False))

    return build


def _grouped(model_type: str, **family_config: Any) -> Callable[..., PreTrainedModel]:
    """`_builder` for families with grouped queries, which all have `intermediate_size` too."""
    return _builder(model_type, **({"intermediate_size": 48, "num_key_value_heads": 2} | family_config))


_MIXED_TYPES = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
_MIXED_WINDOWS = {"use_sliding_window": True, "sliding_window": 6, "layer_types": _MIXED_TYPES}
_TYPED_WINDOWS = {"sliding_window": 6, "layer_types": _MIXED_TYPES}
_EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 500.0, **parameters}


TINY_FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": _grouped("llama"),
    "llama-bias-tied": _grouped(
        "llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rope_parameters=_rope()
    ),
    "mistral": _grouped("mistral", sliding_window=None),
    "mistral-window": _grouped("mistral", sliding_window=6),
    "qwen2": _grouped("qwen2"),
    "qwen2-mixed-windows": _grouped("qwen2", **_MIXED_WINDOWS),
    "qwen3": _grouped("qwen3", head_dim=16, tie_word_embeddings=True),
    "qwen3-mixed-windows": _grouped("qwen3", head_dim=8, **_MIXED_WINDOWS),
    "cohere": _grouped("cohere", logit_scale=1.25, tie_word_embeddings=True),
    "cohere-norms-bias": _grouped("cohere", logit_scale=1.25, use_qk_norm=True, attention_bias=True),
    "cohere2": _grouped("cohere2", logit_scale=1.25, **_TYPED_WINDOWS),
    "falcon": _builder("falcon", new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=48),
    "falcon-one-norm": _builder(
        "falcon", new_decoder_architecture=True, num_ln_in_parallel_attn=1, num_kv_heads=2, ffn_hidden_size=48
    ),
    "falcon-multi-query": _builder("falcon", ffn_hidden_size=48, tie_word_embeddings=True),
    "falcon-sequential": _builder("falcon", parallel_attn=False, multi_query=False, bias=True, ffn_hidden_size=48),
    "gemma": _grouped("gemma", head_dim=16, num_key_value_heads=1, tie_word_embeddings=True),
    "gemma2": _grouped(
        "gemma2",
        head_dim=16,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=2.0,
        **_TYPED_WINDOWS,
    ),
    "gemma3_text": _grouped(
        "gemma3_text",
        head_dim=16,
        query_pre_attn_scalar=24,
        rope_parameters={"full_attention": _rope(), "sliding_attention": _rope(rope_theta=50.0)},
        **_TYPED_WINDOWS,
    ),
    "gpt2": _builder("gpt2", n_inner=48, tie_word_embeddings=True),
    "gpt2-scaled": _builder("gpt2", n_inner=48, scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False),
    "gpt_neox": _builder("gpt_neox", intermediate_size=48, rope_parameters=_rope(partial_rotary_factor=0.5)),
    "gpt_neox-sequential": _builder(
        "gpt_neox", intermediate_size=48, use_parallel_residual=False, attention_bias=False
    ),
    "mixtral": _grouped("mixtral", num_local_experts=4),
    "mixtral-window": _grouped("mixtral", num_local_experts=4, sliding_window=6),
    "olmo2": _grouped("olmo2"),
    "opt": _builder("opt", ffn_dim=48, tie_word_embeddings=True),
    "phi3": _grouped("phi3"),
    "phi3-partial-window": _grouped("phi3", sliding_window=6, rope_parameters=_rope(partial_rotary_factor=0.5)),
    "qwen2_moe": _grouped("qwen2_moe", shared_expert_intermediate_size=40, **_EXPERTS),
    "qwen2_moe-mixed": _grouped(
        "qwen2_moe",
        shared_expert_intermediate_size=40,
        mlp_only_layers=[1],
        norm_topk_prob=True,
        **_EXPERTS,
        **_MIXED_WINDOWS,
    ),
    "qwen3_moe": _grouped("qwen3_moe", head_dim=16, norm_topk_prob=True, mlp_only_layers=[2], **_EXPERTS),
}
"""Builders by the `model_type` of the family, and after a hyphen the variant."""


def tiny_model(family: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of `TINY_FAMILIES`: float32, on the CPU, in eval mode, with `overrides` of its configuration.

    A model with layer types of its own needs them anew when `num_hidden_layers` changes.
    """
    return TINY_FAMILIES[family](seed=seed, **overrides)


def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter anew, in the order of the names, so that equal shapes and seeds give equal models."""
    generator = torch.Generator().manual_seed(seed)
    adds_one = model.config.model_type.startswith("gemma")  # whose norms multiply by 1 + weight
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            is_norm = name.endswith("norm.weight")
            if parameter.dim() > 1 and not is_norm:  # about the scale that keeps a layer's output as large as its input
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
            else:  # norm weights and biases: neither ones nor zeros
                parameter.uniform_(0.4, 1.6, generator=generator)
            if is_norm and adds_one:
                parameter.sub_(1.0)


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` tokens, trained here; begins every text with `BOS`, as Llama's does.

    It spells all of ASCII; any other character becomes `UNK`.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    printable = "".join(map(chr, range(33, 127)))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS, UNK],
        initial_alphabet=[*printable, "\u0120", "\u010a"],  # how ByteLevel spells a space and a line feed
        show_progress=False,
    )
    tokenizer.train_from_iterator(tiny_rows(200), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=256,
    )


def tiny_rows(num_rows: int, seed: int = 0) -> list[str]:
    """Rows of made-up English, each a line of 6 to 14 words: something to calibrate on."""
    draw = random.Random(seed)
    rows = (draw.choices(_WORDS, k=draw.randint(6, 14)) for _ in range(num_rows))
    return [f"{' '.join(words).capitalize()}." for words in rows]


def tiny_token_ids(num_sequences: int, sequence_length: int, seed: int = 0) -> Tensor:
    """Random token ids [num_sequences, sequence_length], none of them a special token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB_SIZE, (num_sequences, sequence_length), generator=generator)


def save_tiny_model(folder: Path, family: str = "llama", *, seed: int = 0, **overrides: Any) -> Path:
    """Write a tiny model and its tokenizer as a Hugging Face model folder, and return the folder."""
    tiny_model(family, seed=seed, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
