"""Format `transformers`: any arrangement of blocks, with a few lines of model code in the export (`auto_map`).

A layer is one attention and a list of feed-forward blocks. Every layer then has an entry in the KV cache, so that all
of generation works as in the family.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from blockpruner.architectures import architecture_of
from blockpruner.blocks import Block
from blockpruner.errors import CheckpointError, ExportError
from blockpruner.export.code import TEMPLATES, ModelCode
from blockpruner.export.settings import fewer_layers
from blockpruner.export.source import ExportSource
from blockpruner.export.weights import write_tensors
from blockpruner.surgery import Places, custom_places

_PREFIX = "blockpruned_"
"""What the exports' model types begin with."""
_PRE_NORM, _SANDWICH = "modeling_pre_norm", "modeling_sandwich"
_MODELING = {
    "gemma": _PRE_NORM,
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen3": _PRE_NORM,
}
"""Families whose code the export can use, by where their layers have norms."""
_MODULES = {"gemma3_text": "gemma3"}
_BASES = {"gemma3_text": "Gemma3Text"}
"""How the configuration's and the base model's classes begin, where not like the others."""


def check(source: ExportSource) -> None:
    """Refuse what this format cannot hold.

    Raises:
        ExportError: with the reason.
    """
    if source.checkpoint.model_type not in _MODELING:
        raise ExportError(
            f"format transformers is there for {', '.join(_MODELING)}, and this is a {source.checkpoint.model_type}"
        )
    _layer_settings(source)


def places(source: ExportSource) -> Places:
    """The layer of each surviving block, and a feed-forward block's place in its list."""
    return custom_places(source.packed)


def write(source: ExportSource, out_dir: Path, shard_bytes: int) -> None:
    """Write weights, config.json and the two files of code."""
    where = places(source)

    def new_name(name: str, block: Block | None) -> str | None:
        if block is None:
            return name
        return source.architecture.placed(name, where[block]) if block in where else None

    write_tensors(source.tensors(new_name), out_dir, shard_bytes)
    model_type, family = source.checkpoint.model_type, source.architecture.class_prefix
    settings = source.settings(
        **_layer_settings(source),
        model_type=f"{_PREFIX}{model_type}",
        architectures=[f"BlockPruned{family}ForCausalLM"],
        **_code(model_type, family).write(out_dir),
    )
    (out_dir / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _layer_settings(source: ExportSource) -> dict[str, Any]:
    layers = source.packed.layers
    return fewer_layers(source, [layer.mha for layer in layers], [None] * len(layers)) | {
        "num_leading_mlps": len(layers[0].leading_mlps),
        "mlps_per_layer": [len(layer.mlps) for layer in layers],
    }


def code_of(config: Mapping[str, Any]) -> ModelCode:
    """The code that belongs to an export's config.json.

    Raises:
        CheckpointError: if it is no export in this format.
    """
    model_type = str(config["model_type"]).removeprefix(_PREFIX)
    if model_type not in _MODELING:
        raise CheckpointError(f"model type {config['model_type']!r} is none that format transformers writes")
    return _code(model_type, architecture_of(model_type).class_prefix)


def _code(model_type: str, family: str) -> ModelCode:
    words = {
        "family": family,
        "module": _MODULES.get(model_type, model_type),
        "config": _BASES.get(model_type, family),
        "base": _BASES.get(model_type, family),
        "model_type": model_type,
    }
    templates = {"configuration_blockpruned": "configuration", "modeling_blockpruned": _MODELING[model_type]}
    files = {
        f"{file}.py": Template((TEMPLATES / f"{template}.py.txt").read_text(encoding="utf-8")).substitute(words)
        for file, template in templates.items()
    }
    prefix = f"BlockPruned{family}"
    auto_map = {
        "AutoConfig": f"configuration_blockpruned.{prefix}Config",
        "AutoModel": f"modeling_blockpruned.{prefix}Model",
        "AutoModelForCausalLM": f"modeling_blockpruned.{prefix}ForCausalLM",
    }
    return ModelCode(files, auto_map)
