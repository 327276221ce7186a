"""Model folders that are wrong, as data: what is changed in a good one, and words of the line that says it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

HUGE = 10**12

CONFIGS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"num_hidden_layers": HUGE}, "asks for 1000000000000 layers (num_hidden_layers)"),
    ({"text_config": {"n_layer": 10**9}}, "asks for 1000000000 layers (n_layer)"),
    ({"num_hidden_layers": -1}, "says that it has -1 layers"),
    ({"num_hidden_layers": "4"}, "expected int, got str"),
    ({"num_hidden_layers": 4.0}, "expected int, got float"),
    ({"num_hidden_layers": None}, "expected int, got NoneType"),
    ({"hidden_size": HUGE}, "asks for 1,225,000,000,000,000 parameters, and the weight files hold 39,200"),
    ({"hidden_size": -64}, "describes no model"),
    ({"hidden_size": 0}, "has 39 of another shape"),
    ({"hidden_size": float("nan")}, "expected int, got float"),
    ({"vocab_size": HUGE}, "parameters, and the weight files hold 39,200"),
    ({"intermediate_size": 10**15}, "parameters, and the weight files hold 39,200"),
    ({"head_dim": 10**10}, "parameters, and the weight files hold 39,200"),
    ({"num_attention_heads": 0}, "describes no model"),
    ({"num_attention_heads": 10**9}, "says that num_attention_heads is 1000000000; no model has so many"),
    ({"num_key_value_heads": -3}, "describes no model"),
    ({"num_labels": HUGE}, "says that num_labels is 1000000000000; no model has so many"),
    ({"rope_parameters": {"rope_type": "evil"}}, "describes no model"),
    ({"rope_parameters": []}, "describes no model"),
    ({"hidden_act": "evil"}, "describes no model: 'evil'"),
    ({"pad_token_id": 10**9}, "describes no model"),
    ({"dtype": "evil"}, "describes no model"),
    ({"layer_types": ["x"]}, "describes no model"),
    ({"quantization_config": []}, "describes no model"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "needs a library that is not installed"),
    ({"model_type": "\x1b[2J\n"}, r"unknown architecture '\x1b[2J\n'"),
    ({"model_type": "../llama"}, "did you mean 'llama'"),
    ({"model_type": 3}, "names no model_type"),
    ({"auto_map": 3}, "describes no model"),
    ({"transformers_weights": "adapter_model.bin"}, "names its weights itself (transformers_weights)"),
    ({"transformers_weights": "../other.safetensors"}, "names its weights itself (transformers_weights)"),
    ({"_attn_implementation": "evil/kernel"}, "asks for code of the hub (_attn_implementation: 'evil/kernel')"),
    ({"attn_implementation": {"": "evil/kernel"}}, "asks for code of the hub (attn_implementation"),
)
"""Changes of config.json."""

_JSON = {"nothing": b"", "no text": b"\xff\xfe", "half": b'{"model_type": "llama"', "brackets": b"[" * 100_000}
FILES: dict[str, tuple[str, bytes, str]] = {
    **{f"config.json of {what}": ("config.json", content, "is not valid JSON") for what, content in _JSON.items()},
    **{
        f"{name} of {what}": (name, content, "cannot be loaded")
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        for what, content in {**_JSON, "null": b"null", "a list": b"[1]"}.items()
    },
    "config.json of a number without end": (
        "config.json",
        b'{"a":' + b"9" * 5000 + b"}",
        "is not valid JSON (ValueError)",
    ),
    "tokenizer_config.json with a length of text": (
        "tokenizer_config.json",
        b'{"tokenizer_class": "TokenizersBackend", "model_max_length": ""}',
        "the tokenizer of",
    ),
    "adapter": ("adapter_config.json", b'{"base_model_name_or_path": "../other"}', "holds an adapter"),
    "weights of nothing": ("model.safetensors", b"", "0 bytes hold no header"),
    "weights of zeros": ("model.safetensors", b"\0" * 100, "has a damaged safetensors header"),
    "weights of a pickle": ("model.safetensors", b"\x80\x04cos\nsystem\n(S'id'\ntR.", "bytes hold no header"),
    "weights with a header of brackets": (
        "model.safetensors",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        "has a damaged safetensors header",
    ),
}
"""A file in place of a good one, or beside."""

HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "negative shape": (lambda entry: entry.update(shape=[-64]), "damaged safetensors header"),
    "shape of text": (lambda entry: entry.update(shape="64"), "damaged safetensors header"),
    "huge shape": (lambda entry: entry.update(shape=[10**30]), "damaged safetensors header"),
    "shape of fractions": (lambda entry: entry.update(shape=[32.0]), "damaged safetensors header"),
    "unknown dtype": (lambda entry: entry.update(dtype="\x1b[2J"), "damaged safetensors header"),
    "another dtype": (lambda entry: entry.update(dtype="F64"), "invalid shape, data type, or offset"),
    "no dtype": (lambda entry: entry.pop("dtype"), "damaged safetensors header"),
    "offsets of text": (lambda entry: entry.update(data_offsets="ab"), "damaged safetensors header"),
    "offsets that overlap": (lambda entry: entry.update(data_offsets=[0, 128]), "header asks for"),
    "negative offsets": (lambda entry: entry.update(data_offsets=[-128, 0]), "header asks for"),
    "huge offsets": (lambda entry: entry.update(data_offsets=[0, 10**300]), "is truncated"),
}
"""Changes of what a safetensors header says of the last tensor."""

INDICES: dict[str, tuple[object, str]] = {
    "no map": ({}, "holds no weight_map"),
    "a list": ([1], "holds no weight_map"),
    "a file outside": ({"weight_map": {"a": "../other.safetensors"}}, "other.safetensors, named by"),
    "an absolute path": ({"weight_map": {"a": "/etc/other.safetensors"}}, "other.safetensors, named by"),
    "a pickle": ({"weight_map": {"a": "pytorch_model.bin"}}, "pytorch_model.bin, named by"),
    "a folder": ({"weight_map": {"a": "."}}, "named by"),
    "a null character": ({"weight_map": {"a": "a\0.safetensors"}}, "named by"),
    "a number": ({"weight_map": {"a": 3}}, "3, named by"),
}
"""What is written in model.safetensors.index.json, where the weights are called pytorch_model.bin."""


def change_header(weights: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write another header before the same bytes."""
    content = weights.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])
    change(header["model.norm.weight"])
    encoded = json.dumps(header).encode()
    weights.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[end:])
