"""Format `transformers`: any arrangement of blocks, with a few lines of model code in the export (`auto_map`).

A layer is one attention and a list of feed-forward blocks. Every layer then has an entry in the KV cache, so that all
of generation works as in the family.
"""

from __future__ import annotations

import json
from pathlib import Path
from string import Template
from typing import Any

from blockpruner.blocks import Block
from blockpruner.errors import ExportError
from blockpruner.export.settings import fewer_layers
from blockpruner.export.source import ExportSource
from blockpruner.export.weights import write_tensors
from blockpruner.surgery import Places, custom_places

_TEMPLATES = Path(__file__).parent / "templates"
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
    settings = source.settings(**_layer_settings(source), **_write_code(source, out_dir))
    (out_dir / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _layer_settings(source: ExportSource) -> dict[str, Any]:
    layers = source.packed.layers
    return fewer_layers(source, [layer.mha for layer in layers], [None] * len(layers)) | {
        "num_leading_mlps": len(layers[0].leading_mlps),
        "mlps_per_layer": [len(layer.mlps) for layer in layers],
    }


def _write_code(source: ExportSource, out_dir: Path) -> dict[str, Any]:
    """Write the two code files and return the settings that point to them."""
    model_type, family = source.checkpoint.model_type, source.architecture.class_prefix
    words = {
        "family": family,
        "module": _MODULES.get(model_type, model_type),
        "config": _BASES.get(model_type, family),
        "base": _BASES.get(model_type, family),
        "model_type": model_type,
    }
    files = {"configuration_blockpruned": "configuration", "modeling_blockpruned": _MODELING[model_type]}
    for file, template in files.items():
        text = Template((_TEMPLATES / f"{template}.py.txt").read_text(encoding="utf-8")).substitute(words)
        (out_dir / f"{file}.py").write_text(text, encoding="utf-8")
    prefix = f"BlockPruned{family}"
    return {
        "model_type": f"blockpruned_{model_type}",
        "architectures": [f"{prefix}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_blockpruned.{prefix}Config",
            "AutoModel": f"modeling_blockpruned.{prefix}Model",
            "AutoModelForCausalLM": f"modeling_blockpruned.{prefix}ForCausalLM",
        },
    }
