"""Write a pruned model's folder: weights, configuration, code where it needs some, tokenizer, manifest.

The source checkpoint is read tensor by tensor; no model is built. Checking the result is `verify`'s business, the model
card `card`'s.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, Literal

from transformers import AutoConfig

from blockpruner import __version__
from blockpruner.architectures import EXPORTABLE_MODEL_TYPES, Architecture, architecture_of
from blockpruner.blocks import Block, survivors
from blockpruner.checkpoint import COMPANION_FILES, Checkpoint, file_digest
from blockpruner.errors import ExportError
from blockpruner.export.weights import SHARD_BYTES, copied, write_tensors
from blockpruner.surgery import PackedModel, custom_names, pack, rename, stock_names

ExportFormat = Literal["stock", "transformers"]

MANIFEST_FILE = "pruning_manifest.json"
_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class WrittenExport:
    """What was written."""

    path: Path
    format: ExportFormat
    packed: PackedModel
    kept: tuple[Block, ...]
    dropped: tuple[Block, ...]
    num_bytes: int
    """Of all files in the folder."""


def require_exportable(architecture: Architecture) -> None:
    """Refuse a family that cannot be written yet.

    Raises:
        ExportError: naming the family and those that can be written.
    """
    if not architecture.exportable:
        raise ExportError(
            f"models of type {architecture.model_type!r} cannot be exported yet, only "
            f"{', '.join(EXPORTABLE_MODEL_TYPES)}; `blockpruner search` works for this model, and so does "
            "`blockpruner evaluate` of the model as it is"
        )


def choose_format(packed: PackedModel, wanted: Literal["auto", "stock", "transformers"]) -> ExportFormat:
    """The format to write: for 'auto' stock where the surviving blocks alternate, else custom code.

    Raises:
        ExportError: if stock is wanted and the blocks do not alternate.
    """
    if wanted == "stock" and not packed.is_stock:
        raise ExportError(
            "format stock needs attention and feed-forward blocks that alternate, and the surviving ones do not; "
            "use --format transformers, or another number of blocks"
        )
    if wanted == "auto":
        return "stock" if packed.is_stock else "transformers"
    return wanted


def write_export(
    checkpoint: Checkpoint,
    removed: Sequence[Block],
    out_dir: Path,
    wanted: Literal["auto", "stock", "transformers"] = "auto",
    *,
    shard_bytes: int = SHARD_BYTES,
) -> WrittenExport:
    """Write the checkpoint without the removed blocks into `out_dir`.

    Raises:
        ExportError: if the family cannot be exported, or the surviving blocks do not fit the wanted format.
        UnsupportedArchitectureError: if the checkpoint has tensors that belong to no known part.
    """
    config = AutoConfig.from_pretrained(checkpoint.path)
    architecture = architecture_of(checkpoint.model_type).for_config(config)
    require_exportable(architecture)
    packed = pack(config.num_hidden_layers, removed)
    chosen = choose_format(packed, wanted)
    out_dir.mkdir(parents=True, exist_ok=True)
    prefixes = (stock_names if chosen == "stock" else custom_names)(architecture, packed)
    kept = survivors(config.num_hidden_layers, removed)
    write_tensors(copied(checkpoint, _tensor_names(architecture, checkpoint, kept, prefixes)), out_dir, shard_bytes)
    settings = _packed_config(checkpoint, config, packed)
    if chosen == "transformers":
        settings |= _write_code(architecture, packed, out_dir)
    (out_dir / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for name in COMPANION_FILES:
        if (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, out_dir / name)
    written = _describe(checkpoint, packed, chosen, removed, out_dir, config.num_hidden_layers)
    _write_manifest(checkpoint, written)
    return written


def _tensor_names(
    architecture: Architecture, checkpoint: Checkpoint, kept: Sequence[Block], prefixes: dict[str, str]
) -> dict[str, str]:
    """Source name to new name of every tensor to write; layers beyond the configured ones are left out."""
    names = {}
    for name in checkpoint.tensors:
        block = architecture.block_of_tensor(name)
        if block is None:
            names[name] = name
        elif block in kept:
            names[name] = rename(name, prefixes)
    return names


def _packed_config(checkpoint: Checkpoint, config: Any, packed: PackedModel) -> dict[str, Any]:
    """The source's own config.json with fewer layers; every list with an entry a layer follows the attention's origin.

    Other settings stay in the words of the source: engines other than transformers 5 read `rope_theta` at the top
    level, which `config.to_dict()` drops.
    """
    settings = {key: value for key, value in checkpoint.config.items() if key not in ("_name_or_path", "auto_map")}
    settings["num_hidden_layers"] = len(packed.layers)
    layer_types = getattr(config, "layer_types", None)  # derived where the source does not list them
    if layer_types is not None:
        assert len(layer_types) == config.num_hidden_layers
        settings["layer_types"] = [layer_types[layer.mha] for layer in packed.layers]
        if "max_window_layers" in settings:  # read only where layer_types is absent
            settings["max_window_layers"] = min(settings["max_window_layers"], len(packed.layers))
    return settings


def _write_code(architecture: Architecture, packed: PackedModel, out_dir: Path) -> dict[str, Any]:
    """Write the two code files and return the settings that point to them."""
    words = {"family": architecture.class_prefix, "module": architecture.model_type}
    for name in ("configuration_blockpruned", "modeling_blockpruned"):
        template = Template((_TEMPLATES / f"{name}.py.txt").read_text(encoding="utf-8"))
        (out_dir / f"{name}.py").write_text(template.substitute(words), encoding="utf-8")
    prefix = f"BlockPruned{architecture.class_prefix}"
    return {
        "model_type": f"blockpruned_{architecture.model_type}",
        "architectures": [f"{prefix}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_blockpruned.{prefix}Config",
            "AutoModel": f"modeling_blockpruned.{prefix}Model",
            "AutoModelForCausalLM": f"modeling_blockpruned.{prefix}ForCausalLM",
        },
        "num_leading_mlps": len(packed.layers[0].leading_mlps),
        "mlps_per_layer": [len(layer.mlps) for layer in packed.layers],
    }


def _describe(
    checkpoint: Checkpoint,
    packed: PackedModel,
    chosen: ExportFormat,
    removed: Sequence[Block],
    out_dir: Path,
    num_layers: int,
) -> WrittenExport:
    return WrittenExport(
        path=out_dir,
        format=chosen,
        packed=packed,
        kept=survivors(num_layers, removed),
        dropped=tuple(removed),
        num_bytes=sum(file.stat().st_size for file in out_dir.iterdir()),
    )


def _write_manifest(checkpoint: Checkpoint, written: WrittenExport) -> None:
    manifest = {
        "tool": f"blockpruner {__version__}",
        "source_model": checkpoint.name,
        "source_fingerprint": checkpoint.fingerprint,
        "format": written.format,
        "kept": [block.model_dump(mode="json") for block in written.kept],
        "dropped_in_order": [block.model_dump(mode="json") for block in written.dropped],
        "layers": [layer.model_dump(mode="json") for layer in written.packed.layers],
        "files": {file.name: file_digest(file) for file in sorted(written.path.iterdir())},
    }
    (written.path / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
