"""Write a pruned model's folder: weights and configuration in some format, tokenizer, manifest.

The source checkpoint is read tensor by tensor; no model is built. Checking the result is `verify`'s business, the model
card `card`'s.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockpruner import __version__
from blockpruner.blocks import Block
from blockpruner.checkpoint import Checkpoint, file_digest
from blockpruner.export.formats import Format, format_for
from blockpruner.export.names import ExportDtype, ExportFormat, FormatChoice
from blockpruner.export.source import ExportSource
from blockpruner.export.weights import SHARD_BYTES
from blockpruner.merging import combinations
from blockpruner.trace import LayerMerge

MANIFEST_FILE = "pruning_manifest.json"


@dataclass(frozen=True)
class WrittenExport:
    """What was written."""

    path: Path
    format: ExportFormat
    kept: tuple[Block, ...]
    """The surviving blocks, in stream order."""
    dropped: tuple[Block, ...]
    """The removed blocks, in the order of their removal."""
    num_bytes: int
    """Of all files in the folder."""
    zeros: tuple[Block, ...] = ()
    """The removed blocks that are in the files nevertheless, with zeros in their last projections."""
    window: int | None = None
    """How many tokens a token sees where an attention in the files has a window; None: none has."""


def write_export(
    checkpoint: Checkpoint,
    removed: Sequence[Block],
    out_dir: Path,
    wanted: FormatChoice = "auto",
    *,
    dtype: ExportDtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    merges: Sequence[LayerMerge] = (),
) -> WrittenExport:
    """Write the checkpoint without the removed blocks into `out_dir`.

    Args:
        checkpoint: the model.
        removed: the blocks to leave out.
        out_dir: a folder, made if missing.
        wanted: the format; 'auto' chooses.
        dtype: of the weights; None: as they are.
        shard_bytes: size of a weights file at most.
        merges: what became of removed layers' weights, in order.

    Raises:
        ExportError: if the format cannot hold the surviving blocks.
        UnsupportedArchitectureError: if the checkpoint has tensors that belong to no known part.
    """
    source = ExportSource.of(checkpoint, removed, dtype, merges)
    chosen = format_for(source, wanted)
    out_dir.mkdir(parents=True, exist_ok=True)
    chosen.write(source, out_dir, shard_bytes)
    for name in checkpoint.files(chosen.companions):
        (out_dir / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(checkpoint.path / name, out_dir / name)
    _write_manifest(source, chosen, out_dir)
    num_bytes = sum(file.stat().st_size for file in files_in(out_dir))
    return WrittenExport(
        out_dir,
        chosen.name,
        source.kept,
        source.removed,
        num_bytes,
        chosen.zeros(source),
        chosen.window(source),
    )


def add_to_manifest(folder: Path, name: str) -> None:
    """List a file that was written after the others, with its digest."""
    path = folder / MANIFEST_FILE
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["files"][name] = file_digest(folder / name)
    path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def files_in(folder: Path) -> list[Path]:
    """All files below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _write_manifest(source: ExportSource, chosen: Format, out_dir: Path) -> None:
    manifest: dict[str, Any] = {
        "tool": f"blockpruner {__version__}",
        "source_model": source.checkpoint.public_name,
        "source_fingerprint": source.checkpoint.fingerprint,
        "format": chosen.name,
        "kept": [block.model_dump(mode="json") for block in source.kept],
        "dropped_in_order": [block.model_dump(mode="json") for block in source.removed],
        "places": {str(block): place for block, place in chosen.places(source).items()},
        "zeros": [block.model_dump(mode="json") for block in chosen.zeros(source)],
        "files": {file.relative_to(out_dir).as_posix(): file_digest(file) for file in files_in(out_dir)},
    }
    if source.merges:
        manifest["merged_layers"] = combinations(source.merges)
    (out_dir / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
