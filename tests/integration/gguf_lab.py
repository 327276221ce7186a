"""What the tests of format gguf share: models in awkward shapes, and tokenizers of every kind that it knows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from blockpruner.blocks import Block, mha, mlp
from tests.integration.export_lab import REMOVED, Source
from tests.tiny_models import BOS, EOS, PAD, UNK, save_tiny_model, tiny_rows

_LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}

SHAPES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biases, tied": ("llama-bias-tied", {}),
    "llama, wide heads": ("llama", {"head_dim": 16}),
    "llama, Llama 3's positions": ("llama", {"rope_parameters": _LLAMA_3}),
    "llama, linear positions": ("llama", {"rope_parameters": _LINEAR}),
    "mistral": ("mistral", {}),
    "mistral, long window": ("mistral-window", {"sliding_window": 600, "max_position_embeddings": 1024}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "olmo2": ("olmo2", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16, "tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {}),
}
"""A family of `TINY_FAMILIES`, and what of its configuration is other than there."""
LACK_BLOCKS = frozenset({"llama", "mistral", "qwen2"})
"""The families whose layers may lack blocks in llama.cpp."""

AT_RANDOM: Mapping[str, tuple[Block, ...]] = {
    "at random 1": (mlp(2), mha(1), mlp(0), mha(3)),
    "at random 2": (mha(0), mlp(1), mlp(3), mha(2), mlp(2)),
    "no window left": (mha(1), mlp(1), mha(3), mlp(3)),
    "windows alone left": (mha(0), mlp(0), mha(2), mlp(2)),
    "at random 3": (mlp(0), mlp(1), mha(1), mha(2), mlp(3)),
}
"""Drawn once, and two that leave a Gemma attention of one type."""
CUTS = REMOVED | AT_RANDOM
CASES = [(shape, cut) for shape in SHAPES for cut in CUTS]


def alternate(removed: tuple[Block, ...]) -> bool:
    """Whether of four layers' blocks the surviving ones alternate, attention first."""
    kept = [block for layer in range(4) for block in (mha(layer), mlp(layer)) if block not in removed]
    return [block.block_kind for block in kept] == [mha(0).block_kind, mlp(0).block_kind] * (len(kept) // 2)


def is_held(shape: str, cut: str) -> bool:
    return alternate(CUTS[cut]) or SHAPES[shape][0].partition("-")[0] in LACK_BLOCKS


HELD = [(shape, cut) for shape, cut in CASES if is_held(shape, cut)]


def make_source(root: Path, shape: str) -> Source:
    family, overrides = SHAPES[shape]
    return Source.of(save_tiny_model(root / shape.replace(" ", "-"), family, **overrides))


# --- tokenizers -------------------------------------------------------------------------------------------------------

_CONTRACTIONS, _WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = [
    "The keeper's lantern, 1234567 stones; she'd carried  them   home.",
    "  two spaces before, and a tab\there\n\n\nthree lines\r\nlater ",
    "Grüße aus Köln, naïve café: 東京 and emoji \U0001f600!",
    "x" * 40 + " 3.14159 -- a+b==c; WE'RE HERE'S",
    "",
]


def _split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _bytes(use_regex: bool = False) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


CUTTERS: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "GPT-2": ("gpt-2", lambda: _bytes(use_regex=True)),
    "SmolLM": ("smollm", lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(True), _bytes(use_regex=True)])),
    "Llama 3": (
        "llama-bpe",
        lambda: pre_tokenizers.Sequence([_split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"), _bytes()]),
    ),
    "Qwen 2": (
        "qwen2",
        lambda: pre_tokenizers.Sequence([_split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"), _bytes()]),
    ),
}
"""Ways to cut text into words, with llama.cpp's name for each."""


def byte_level(cutter: Any, **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that begins every text with `BOS`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = cutter
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*tiny_rows(200), *TEXTS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, **options)


def word_starts(*more: Any, prepends: bool = True) -> PreTrainedTokenizerFast:
    """A BPE tokenizer as those of Llama 2 (`prepends`) and Gemma are made from SentencePiece.

    `more` normalises first.
    """
    trained = Tokenizer(models.BPE())
    replaced = normalizers.Replace(" ", "▁")
    steps = [normalizers.Prepend("▁"), replaced] if prepends else [replaced]
    trained.normalizer = normalizers.Sequence(steps)
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for training alone: no token spans words
    trained.train_from_iterator(tiny_rows(200), trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    merges, spelled = [tuple(merge) for merge in learned["merges"]], learned["vocab"]
    tokens = [UNK, BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(spelled, key=spelled.__getitem__)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=UNK, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([*more, *steps])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNK, bos_token=BOS, eos_token=EOS)


TOKENIZERS: Mapping[str, Callable[[], PreTrainedTokenizerFast]] = {
    **{name: (lambda make=make: byte_level(make())) for name, (_, make) in CUTTERS.items()},
    "Llama 2": word_starts,
    "Gemma": lambda: word_starts(prepends=False),
}


def with_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Source:
    """A tiny Llama with a tokenizer beside it."""
    save_tiny_model(folder, "llama", vocab_size=len(tokenizer) + 3)  # as many embed more than they have tokens
    tokenizer.save_pretrained(folder)
    return Source.of(folder)
