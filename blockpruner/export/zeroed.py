"""Format `zeroed`: the model in its full shape, with zeros in the last projections of the removed blocks.

For engines that know only the stock shape, and for families whose blocks cannot be repacked. It computes what the
pruned model computes, and saves nothing: not in size, not in speed.
"""

from __future__ import annotations

import json
from pathlib import Path

from blockpruner.blocks import Block
from blockpruner.export.source import ExportSource
from blockpruner.export.weights import TensorSource, write_tensors
from blockpruner.surgery import Places


def check(source: ExportSource) -> None:
    """Every model has this form."""


def places(source: ExportSource) -> Places:
    """Every block stays in its layer."""
    return {block: str(block.layer_index) for block in source.kept}


def write(source: ExportSource, out_dir: Path, shard_bytes: int) -> None:
    """Write weights and config.json."""

    def name_of(name: str, block: Block | None) -> str | None:
        is_beyond = block is not None and block.layer_index >= source.num_layers  # what no layer of the model reads
        return None if is_beyond else name

    sources = [_bypassed(source, tensor) for tensor in source.tensors(name_of)]
    write_tensors(sources, out_dir, shard_bytes)
    (out_dir / "config.json").write_text(json.dumps(source.settings(), indent=2) + "\n", encoding="utf-8")


def _bypassed(source: ExportSource, tensor: TensorSource) -> TensorSource:
    block = source.architecture.block_of_tensor(tensor.name)
    if block is None or block not in source.removed:
        return tensor
    outputs = source.architecture.block(block.block_kind).outputs
    return tensor.zeroed() if not set(tensor.name.split(".")).isdisjoint(outputs) else tensor
